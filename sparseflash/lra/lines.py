"""The lines of a text file too large for memory, by number: one pass finds where they begin."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.progress import track

_CHUNK = 1 << 24


class Lines:
    """``lines[i]`` is line i as bytes, without its end. Blank lines at the end of the file do not count.

    Args:
        path: the file.
        header: lines at the top that are not counted.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no lines.
    """

    def __init__(self, path: Path, header: int = 0) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        self.path, self.header, self._digest = path, header, ""
        self._starts = _starts(path)[header:]
        if len(self._starts) < 2:
            raise ValueError(f"{path} has no lines" + (" after its header" if header else ""))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> bytes:
        start, end = self._starts[index : index + 2].tolist()
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start).rstrip(b"\r\n")

    def digest(self, check: Callable[[int, bytes], object]) -> str:
        """SHA-256 of the file, every line of which is given to ``check`` with its number the first time."""
        if self._digest:
            return self._digest
        found = hashlib.sha256()
        with self.path.open("rb") as file:
            for _ in range(self.header):
                found.update(file.readline())
            for index in track(range(len(self)), f"checking {self.path.name}"):
                line = file.readline()
                found.update(line)
                check(index, line.rstrip(b"\r\n"))
        self._digest = found.hexdigest()
        return self._digest

    def where(self, index: int) -> str:
        """The file and the number of a line, from 1, as editors count."""
        return f"{self.path}, line {index + self.header + 1}"


def _starts(path: Path) -> NDArray[np.int64]:
    """Where each line begins, and the end of the last that is not blank."""
    found, end = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        for begin in track(range(0, path.stat().st_size, _CHUNK), f"reading {path.name}"):
            chunk = file.read(_CHUNK)
            found.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + begin + 1)
            if filled := len(chunk.rstrip(b"\r\n")):
                end = begin + filled
    starts = np.concatenate(found)
    return np.append(starts[starts < end], end)
