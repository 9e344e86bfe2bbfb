"""Files and folders that are whole or not there, and never written, or removed, through a link."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sparseflash.patterns.shown import shown

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_WRITE = os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


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
    file = open(os.open(temporary, _WRITE | os.O_EXCL, 0o666), "wb")  # noqa: SIM115 - closed below, before the file gets its name
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


def append_to(path: Path) -> BinaryIO:
    """A file opened at its end, made if need be.

    Raises:
        ValueError: it is a link.
    """
    try:
        return open(os.open(path, _WRITE | os.O_APPEND, 0o666), "ab")
    except OSError:
        if path.is_symlink():
            raise ValueError(f"{path} is a link, and nothing is written through links: remove it") from None
        raise


def new_folder_beside(path: Path) -> Path:
    """A folder that was not there before, under a name that nobody can guess, to be renamed to ``path``."""
    folder = temporary_beside(path)
    folder.mkdir()
    return folder


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, a file, or a link: never what a link leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def remove_leftovers(folder: Path, of: str = "") -> None:
    """Remove the temporary files and folders that processes left which were killed.

    Args:
        folder: nobody else may write there now.
        of: the name whose temporary ones are removed; by default those of all names.
    """
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.name.startswith(f".{of}." if of else "."):
            remove_tree(path)


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
                f"{shown(part)} is a link, to {shown(os.readlink(part))}, and nothing is written through links inside "
                f"{inside}: put a folder or file of its own there"
            )
    raise ValueError(f"{path} does not lie in {inside}")
