"""A limit on the memory of compiling, checked before the memory is allocated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MAX_BYTES = 8 << 30  # limit of compiling, unless the caller allows more

_most: ContextVar[int | None] = ContextVar("sparseflash_compile_bytes", default=None)


class MemoryBoundError(ValueError):
    """Compiling would exceed the limit on its memory."""


@contextmanager
def at_most(max_bytes: int) -> Iterator[None]:
    """Inside the block, :func:`reserve` refuses allocations of more than ``max_bytes``.

    Example:
        >>> with at_most(1 << 20):
        ...     reserve(1 << 20, 40)
        Traceback (most recent call last):
        sparseflash.patterns.memory.MemoryBoundError: 1,048,576 entries would take about 0.0419 GB...
    """
    token = _most.set(max_bytes)
    try:
        yield
    finally:
        _most.reset(token)


def reserve(entries: int, bytes_each: int) -> None:
    """Check an allocation of ``entries``, with the bytes that compiling needs for each.

    Raises:
        MemoryBoundError: the limit of :func:`at_most` would be exceeded. Outside of it there is no limit.
    """
    most = _most.get()
    if most is not None and entries * bytes_each > most:
        raise MemoryBoundError(
            f"{entries:,} entries would take about {entries * bytes_each / 1e9:,.3g} GB, and compiling may take "
            f"{most / 1e9:,.3g} GB: use larger blocks, cells or strides, or compile(..., max_bytes=...) to allow more"
        )
