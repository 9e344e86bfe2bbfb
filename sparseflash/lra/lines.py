"""The lines of a text file too large for memory, by number. One pass finds where each line begins."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.progress import track
from sparseflash.patterns.untrusted import open_untrusted

# Limits for files of unknown origin. The largest file of the release has 147,086 lines.
MOST_LINES = 1 << 22
MOST_LINE = 16 << 20
_CHUNK = 1 << 20


class Lines:
    """``lines[i]`` is line i as bytes, without its line ending. Blank lines at the end of the file do not count.

    Args:
        path: the file.
        header: lines at the top that are not counted.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no lines, more than `MOST_LINES`, a line of more than `MOST_LINE` bytes, or not a regular file.
    """

    def __init__(self, path: Path, header: int = 0, inside: Path | None = None) -> None:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        self.path, self.header, self._inside, self._digest = path, header, inside, ""
        self._starts = _starts(path, inside)[header:]
        if len(self._starts) < 2:
            raise ValueError(f"{path} has no lines" + (" after its header" if header else ""))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._starts[index : index + 2].tolist()
        with open_untrusted(self.path, self._inside) as (file, _):
            file.seek(start)
            return file.read(end - start).rstrip(b"\r\n")

    def digest(self, check: Callable[[int, bytes], object]) -> str:
        """SHA-256 of the file. The first call passes the number and the bytes of every line to ``check``."""
        if self._digest:
            return self._digest
        digest = hashlib.sha256()
        with open_untrusted(self.path, self._inside) as (file, _):
            for _ in range(self.header):
                digest.update(file.readline(MOST_LINE))
            for index in track(range(len(self)), f"checking {self.path.name}"):
                line = file.readline(MOST_LINE)
                digest.update(line)
                check(index, line.rstrip(b"\r\n"))
        self._digest = digest.hexdigest()
        return self._digest

    def where(self, index: int) -> str:
        """The file and the number of a line, counted from 1 as in editors."""
        return f"{self.path}, line {index + self.header + 1}"


def _starts(path: Path, inside: Path | None) -> NDArray[np.int64]:
    """Where each line begins, and where the last line that is not blank ends, int64 [lines + 1]."""
    parts, end, lines, last = [np.zeros(1, np.int64)], 0, 1, 0
    with open_untrusted(path, inside) as (file, size):
        for begin in track(range(0, size, _CHUNK), f"reading {path.name}"):
            chunk = file.read(_CHUNK)
            ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + begin + 1
            stops = np.concatenate(([last], ends, [begin + len(chunk)]))
            too_long = np.flatnonzero(np.diff(stops) > MOST_LINE)
            if len(too_long):
                raise ValueError(f"{path}, line {lines + int(too_long[0])}: longer than {MOST_LINE:,} bytes")
            last, lines = int(stops[-2]), lines + len(ends)
            if lines > MOST_LINES:
                raise ValueError(f"{path} has more than {MOST_LINES:,} lines")
            parts.append(ends)
            if filled := len(chunk.rstrip(b"\r\n")):
                end = begin + filled
    starts = np.concatenate(parts)
    return np.append(starts[starts < end], end)
