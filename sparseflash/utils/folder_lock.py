"""A lock that lets one process write into a folder at a time."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextmanager
def folder_lock(folder: Path, beside: bool = False) -> Iterator[None]:
    """Hold a folder while the block runs.

    The system releases the lock when its process ends, in any way, so there are no stale locks. On systems without such
    locks (Windows) nothing is locked.

    Args:
        folder: an existing folder.
        beside: the folder does not exist yet, so lock a file next to it.

    Raises:
        ValueError: another process holds it; the message names its id and host.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, folder_lock(Path(folder)):
        ...     with folder_lock(Path(folder)):
        ...         pass
        Traceback (most recent call last):
        ValueError: ... is in use by process ...
    """
    if fcntl is None:
        yield
        return
    path = folder.with_name(f".{folder.name}{NAME}") if beside else folder / NAME
    descriptor = _acquired(path, folder)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked: a process that waits for this file finds that its name is gone
        os.close(descriptor)


def _acquired(path: Path, folder: Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if path.is_symlink():
                raise ValueError(f"{path} is a link, and nothing is written through links: remove it") from None
            raise error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:  # writing would change the other link too
            os.close(descriptor)
            raise ValueError(f"{path} is not a regular file of one name: remove it")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.fstat(descriptor)
            if path.exists() and os.path.samestat(held, path.stat()):
                return descriptor
        except BlockingIOError:
            pid, _, host = os.read(descriptor, 300).decode(errors="replace").strip().partition(" ")
            os.close(descriptor)
            raise ValueError(
                f"{folder} is in use by process {pid or '(unknown)'} on {host or 'this host'}: wait until it "
                f"ends, or write into another folder"
            ) from None
        os.close(descriptor)  # the holder removed the file after we opened and before we locked it
