"""Any vectorised predicate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparseflash.patterns.grid import Ints
from sparseflash.patterns.pattern import Bools, Pattern

Predicate = Callable[[Ints, Ints], Bools]


@dataclass(frozen=True, repr=False)
class Where(Pattern):
    """See :func:`where`."""

    fn: Predicate
    registered: str | None = None
    name = "where"

    def allows(self, q: Ints, k: Ints) -> Bools:
        return self.fn(q, k)

    def __str__(self) -> str:
        if self.registered is not None:
            return f"{self.registered}()"
        return f"where({getattr(self.fn, '__qualname__', repr(self.fn))})"

    __repr__ = __str__


def where(fn: Predicate) -> Pattern:
    """Allowed where ``fn(q, k)`` is true.

    Every block is looked at: O(N^2) time, memory in proportion to the number of blocks, and a progress bar on a
    terminal once it has taken a second. A subclass of :class:`Pattern` with ``candidates`` and ``keys`` compiles in the
    size of its answer. Equal functions (the same object) share a cached mask.

    Args:
        fn: takes int64 positions that broadcast (queries, keys), gives booleans; numpy functions and operators do.

    Raises:
        TypeError: fn is not callable; when compiling, fn does not return booleans.
        ValueError: when compiling, fn returns another shape.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.where(lambda q, k: (q + k) % 3 == 0).compile(3, block=16).to_dense().astype(int)
        array([[1, 0, 0],
               [0, 0, 1],
               [0, 1, 0]])
    """
    if not callable(fn):
        raise TypeError(f"where: fn must be callable as fn(q, k), got {fn!r}")
    return Where(fn)
