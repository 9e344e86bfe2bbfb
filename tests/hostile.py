"""What somebody may put into a folder that he hands on: links, pipes, devices, sockets, sparse files."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st

SPARSE = 60 << 30


def clear(path: Path) -> None:
    """Nothing is there any more."""
    if path.is_symlink() or path.is_file() or path.is_fifo() or path.is_socket():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def _link(target: Callable[[Path, Path], object]) -> Callable[[Path, Path], None]:
    def plant(path: Path, outside: Path) -> None:
        where = target(path, outside)
        clear(path)
        path.symlink_to(str(where))

    return plant


def _socket(path: Path, outside: Path) -> None:
    clear(path)
    short = outside.parent / "s"  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(outside.parent)
        try:
            listening.bind("s")
        finally:
            os.chdir(here)
    short.rename(path)


def _pipe(path: Path, outside: Path) -> None:
    clear(path)
    os.mkfifo(path)


def _other(path: Path, outside: Path) -> None:
    """A folder where a file was, and the reverse."""
    was_folder = path.is_dir()
    clear(path)
    if was_folder:
        path.write_bytes(b"x")
    else:
        path.mkdir()


def _sparse(path: Path, outside: Path) -> None:
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink > 1:
        clear(path)
        path.touch()
    os.truncate(path, SPARSE)


def _hard(path: Path, outside: Path) -> None:
    clear(path)
    os.link(outside / "file", path)


def _copy_outside(path: Path, outside: Path) -> Path:
    """A place outside with what was here: a link there is followed by whoever does not look."""
    copy = outside / f"copy-{len(list(outside.iterdir()))}"
    if _small(path):
        shutil.copyfile(path, copy)
    elif path.is_dir() and not path.is_symlink():
        shutil.copytree(path, copy, ignore=_strange)
    return copy


def _small(path: Path) -> bool:
    return not path.is_symlink() and path.is_file() and path.stat().st_size < 1 << 20


def _strange(folder: str, names: list[str]) -> list[str]:
    """What was planted there before, and is not copied."""
    paths = [Path(folder) / name for name in names]
    return [path.name for path in paths if path.is_symlink() or not (path.is_dir() or _small(path))]


KINDS: dict[str, Callable[[Path, Path], None]] = {
    "link to a copy outside": _link(_copy_outside),
    "link to a file outside": _link(lambda path, outside: outside / "file"),
    "link to a folder outside": _link(lambda path, outside: outside / "folder"),
    "link to nothing": _link(lambda path, outside: outside / "nothing"),
    "link to itself": _link(lambda path, outside: path),
    "link to the folder above": _link(lambda path, outside: ".."),
    "endless device": _link(lambda path, outside: "/dev/zero"),
    "empty device": _link(lambda path, outside: "/dev/null"),
    "system file": _link(lambda path, outside: "/proc/self/environ"),
    "hard link": _hard,
    "pipe": _pipe,
    "socket": _socket,
    "other kind": _other,
    "sparse": _sparse,
}
kinds = st.sampled_from(sorted(KINDS))


def entries(folder: Path) -> list[str]:
    """All files and folders below one, by their paths inside it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make_outside(folder: Path) -> Path:
    """A place that nobody was told to touch."""
    outside = folder / "outside"
    (outside / "folder" / "deep").mkdir(parents=True)
    (outside / "file").write_bytes(b"mine")
    (outside / "folder" / "deep" / "file").write_bytes(b"mine")
    return outside


def content(folder: Path) -> dict[str, bytes | str | None]:
    """What a folder holds: bytes of files, targets of links, None for folders."""
    found: dict[str, bytes | str | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found
