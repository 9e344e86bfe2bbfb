"""Patterns from any vectorised predicate."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from sparseflash.patterns.advice import MANY_BLOCKS, SlowScan, faster_form
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.captured import state
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.predicate import Predicate, ask


@dataclass(frozen=True, repr=False)
class Where(Pattern):
    """See :func:`where`."""

    fn: Predicate
    registered: str | None = None
    name = "where"

    def __hash__(self) -> int:
        # The key of a cached mask includes the values that the function had captured when it was compiled.
        return hash((self.fn, self.registered, state(self.fn)))

    def allows(self, q: Ints, k: Ints) -> Bools:
        truth: Bools = ask(self.fn, q, k)
        return truth

    def compile_on(self, grid: Grid) -> BlockMask:
        mask = super().compile_on(grid)
        if grid.rows * grid.cols >= MANY_BLOCKS:
            looked = f"{self} was asked about all {grid.rows * grid.cols:,} blocks, O(N^2)"
            warnings.warn(f"{looked}; {faster_form(mask)}", SlowScan, stacklevel=3)
        return mask

    def __str__(self) -> str:
        if self.registered is not None:
            return f"{self.registered}()"
        return f"where({getattr(self.fn, '__qualname__', repr(self.fn))})"

    __repr__ = __str__


def where(fn: Predicate) -> Pattern:
    """Allowed where ``fn(q, k)`` is true.

    Compiling evaluates every block, in O(N^2) time and memory for the stored blocks. On a terminal it shows a progress
    bar after a second, and for long sequences it warns and names a structure of the mask that would make it linear. A
    subclass of :class:`Pattern` with ``candidates`` and ``keys`` compiles in time linear in the stored blocks.

    Masks are cached by the function and the values it captured: numbers, texts, arrays up to 4 MB and torch tensors in
    its closure, defaults and globals. **Other state** (larger arrays, dicts, objects, files, random numbers) is read
    once, when the mask is first compiled for given lengths. Make a new function when it changes. A graph of
    torch.compile keeps the mask that it was traced with.

    Args:
        fn: called with int64 positions of queries and keys that broadcast; returns booleans. It may be written for
            numpy arrays or for torch tensors: a function that raises for arrays is called with tensors.

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
