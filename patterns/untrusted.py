"""Reading untrusted files: regular files only, with a limit on their size."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from sparseflash.patterns.shown import shown


@contextmanager
def open_untrusted(path: Path, inside: Path | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """An open regular file and its size in bytes.

    Opening never blocks: a pipe, a socket, a device or a folder is refused.

    Args:
        path: the file; links are followed.
        inside: a folder that links may not lead out of; None for a path that the user gave.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, or one outside ``inside``.

    Example:
        >>> with open_untrusted(Path(os.__file__)) as (file, size):
        ...     size == len(file.read(size + 1))
        True
        >>> open_untrusted(Path("/dev/zero")).__enter__()
        Traceback (most recent call last):
        ValueError: /dev/zero is not a regular file
    """
    if inside is not None:
        check_inside(path, inside)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        # A socket cannot be opened.
        raise ValueError(f"{shown(path)} is not a regular file ({error.strerror})") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ValueError(f"{shown(path)} is not a regular file")
    with open(descriptor, "rb") as file:
        yield file, found.st_size


def read_untrusted(path: Path, most: int, inside: Path | None = None) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Args:
        path: the file.
        most: limit in bytes.
        inside: see :func:`open_untrusted`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a regular file, one outside ``inside``, or a longer one.
    """
    with open_untrusted(path, inside) as (file, size):
        content = file.read(most + 1) if size <= most else b""
    if size > most or len(content) > most:
        raise ValueError(f"{shown(path)} has {max(size, len(content)):,} bytes; at most {most:,} are read")
    return content


def check_inside(path: Path, folder: Path) -> None:
    """Raise ValueError if a path leads out of a folder, by ``..`` or through a link."""
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # which of them depends on Python's version
        raise ValueError(f"{shown(path)} leads nowhere: links lead to each other") from None
    if not real.is_relative_to(root):
        raise ValueError(f"{shown(path)} leads out of {folder}, to {shown(real)}")
