"""Files that are whole or not there, and never written through a link."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextmanager
def atomic_write(path: Path, inside: Path | None = None) -> Iterator[BinaryIO]:
    """A new file to write to, under a random name; it becomes ``path`` when the block ends well.

    A link at ``path`` is replaced, not followed. The file has the permissions of the umask. Where the block raises,
    nothing is left.

    Args:
        path: the file to be; its folder must exist.
        inside: the folder that the user gave, if ``path`` lies deeper: no folder on the way may be a link.

    Raises:
        FileNotFoundError: the folder of path does not exist.
        ValueError: a folder between ``inside`` and the file is a link.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(Path(folder) / "a.txt") as file:
        ...         written = file.write(b"whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    if inside is not None:
        check_no_links(path.parent, inside)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(path.parent)!r} to write {path.name} into")
    temporary = temporary_beside(path)
    file = open(os.open(temporary, _NEW, 0o666), "wb")  # noqa: SIM115 - closed below, before the file gets its name
    try:
        with file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, inside: Path | None = None) -> None:
    """A text file in UTF-8, whole or not there; see :func:`atomic_write`."""
    with atomic_write(path, inside) as file:
        file.write(text.encode())


def temporary_beside(path: Path) -> Path:
    """A name beside ``path`` that nobody can guess; it begins with a dot.

    Example:
        >>> temporary_beside(Path("runs/a.txt")).name[:7]
        '.a.txt.'
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}")


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed left of their temporary files; nobody else may write there now."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def make_folder(folder: Path, inside: Path) -> Path:
    """Make a folder below the one that the user gave, and refuse links on the way.

    Args:
        folder: the folder to make, with its parents, unless it is there.
        inside: the folder that the user gave, which may be a link.

    Raises:
        ValueError: ``folder`` or a folder between the two is a link, or a file.
    """
    check_no_links(folder, inside)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} should be a folder, but is a file") from None
    return folder


def check_no_links(path: Path, inside: Path) -> None:
    """Raise ValueError where ``path``, or a folder between it and ``inside``, is a link: it may lead anywhere."""
    for part in (path, *path.parents):
        if part == inside:
            return
        if part.is_symlink():
            raise ValueError(
                f"{part} is a link, to {os.readlink(part)}, and nothing is written through links inside {inside}: "
                f"put a folder or file of its own there"
            )
    raise ValueError(f"{path} does not lie in {inside}")
