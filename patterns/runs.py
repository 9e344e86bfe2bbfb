"""Matrices of block letters, stored as runs.

The masks this library meets are made of long stretches: a causal row is one run of FULL blocks and one PARTIAL
block, whatever its length. Storing runs instead of blocks keeps dense, causal and complemented masks at O(rows),
and makes every operation a sweep over run boundaries.

Letters: 0 EMPTY (never stored), 1 FULL, t >= 2 PARTIAL with tile ``t - 2``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sparseflash.patterns.intervals import Ints, positions, split, union

EMPTY, FULL, FIRST_TILE = 0, 1, 2

RUNS_AT_ONCE = 1 << 16

AnyArray = TypeVar("AnyArray", bound=NDArray[Any])


def frozen(array: AnyArray) -> AnyArray:
    """The array itself, from now on read-only, together with what it is a view of."""
    whole: Any = array
    while isinstance(whole, np.ndarray):
        whole.flags.writeable = False
        whole = whole.base
    return array


@dataclass(frozen=True, eq=False)
class Runs:
    """A matrix [rows, cols] of letters as sorted, disjoint runs of equal letters.

    A run lies inside one row; positions are linear (``row * cols + col``), so that one sorted array holds the
    matrix. Neighbouring runs of one row have different letters once :meth:`merged`.
    """

    shape: tuple[int, int]
    start: Ints  # [n] linear position of the first block
    stop: Ints  # [n] linear position past the last block
    letter: NDArray[np.int32]  # [n]

    @classmethod
    def from_blocks(cls, shape: tuple[int, int], rows: Ints, cols: Ints, letters: NDArray[np.int32]) -> Runs:
        """From single blocks, sorted by row and column and without duplicates."""
        linear = rows * shape[1] + cols
        return cls(shape, linear, linear + 1, letters).merged()

    @classmethod
    def from_intervals(cls, shape: tuple[int, int], rows: Ints, starts: Ints, stops: Ints, letter: int) -> Runs:
        """One letter on the union of column intervals ``[starts, stops)``; they may overlap or be empty."""
        start, stop = union(shape, rows, starts, stops)
        return cls(shape, start, stop, np.full(start.size, letter, np.int32))

    def __len__(self) -> int:
        return len(self.letter)

    @cached_property
    def row(self) -> Ints:
        """Row of each run."""
        return frozen(self.start // self.shape[1])

    @cached_property
    def length(self) -> Ints:
        """Blocks in each run."""
        return frozen(self.stop - self.start)

    def beside(self, other: Runs) -> Runs | None:
        """This matrix and another one in one, or None where both store a block."""
        start = np.concatenate([self.start, other.start])
        order = np.argsort(start, kind="stable")
        start, stop = start[order], np.concatenate([self.stop, other.stop])[order]
        if (start[1:] < stop[:-1]).any():
            return None
        return Runs(self.shape, start, stop, np.concatenate([self.letter, other.letter])[order])

    def letter_at(self, linear: Ints) -> NDArray[np.int32]:
        """Letters at linear positions; sorted positions are looked up fastest."""
        if not len(self):
            return np.zeros(linear.shape, np.int32)
        index = np.searchsorted(self.start, linear, side="right") - 1
        inside = (index >= 0) & (linear < self.stop[index])
        return np.where(inside, self.letter[index], np.int32(EMPTY))

    def mapped(self, new_letter: NDArray[np.int32]) -> Runs:
        """Every letter t replaced by ``new_letter[t]``."""
        return Runs(self.shape, self.start, self.stop, new_letter[self.letter])

    def merged(self) -> Runs:
        """EMPTY runs dropped, touching runs of one row with equal letters joined."""
        stored = np.flatnonzero(self.letter)  # EMPTY is 0
        start, stop, letter = self.start[stored], self.stop[stored], self.letter[stored]
        head = np.ones(letter.size, bool)
        head[1:] = (start[1:] != stop[:-1]) | (letter[1:] != letter[:-1]) | (start[1:] % self.shape[1] == 0)
        heads = np.flatnonzero(head)
        last = np.append(heads[1:], letter.size) - 1 if letter.size else heads
        return Runs(self.shape, start[heads], stop[last], letter[heads])

    def select_rows(self, rows: Ints) -> Runs:
        """The matrix whose row i is this one's row ``rows[i]``."""
        bounds = np.searchsorted(self.row, np.arange(self.shape[0] + 1))
        counts = (bounds[1:] - bounds[:-1])[rows]
        first = np.cumsum(counts) - counts
        index = np.arange(int(counts.sum())) - np.repeat(first - bounds[:-1][rows], counts)
        shift = np.repeat((np.arange(rows.size) - rows) * self.shape[1], counts)
        return Runs((rows.size, self.shape[1]), self.start[index] + shift, self.stop[index] + shift, self.letter[index])

    def blocks(self) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """Every stored block: rows, columns, letters, sorted. O(stored blocks)."""
        rows = np.repeat(self.row, self.length)
        cols = positions(self.start, self.stop) - rows * self.shape[1]
        return rows, cols, np.repeat(self.letter, self.length)

    def transposed(self, stacked: int = 1) -> Runs:
        """Each of ``stacked`` matrices, written one below the other, transposed; letters are kept.

        A vertical run begins where a block differs from the one above it, so consecutive rows are compared as
        runs and only the places where they differ are expanded: the cost is the size of the answer.
        """
        n, m = self.shape[0] // stacked, self.shape[1]
        padded = (stacked * (n + 1), m)  # one empty row below each matrix ends its vertical runs
        shift = self.row // n * m if stacked > 1 else 0
        here, above = self._shifted(shift, padded), self._shifted(shift + m, padded)
        index = np.int32 if max(padded[0], stacked * m) < 1 << 31 else np.int64
        changed = []
        for some in segments(here, above):
            differs = np.flatnonzero(some.a != some.b)
            start, stop = some.start[differs], some.stop[differs]
            row, col = split(positions(start, stop), m)
            if stacked > 1:
                col += row // (n + 1) * m
            changed.append((row.astype(index), col.astype(index), np.repeat(some.a[differs], stop - start)))
        del here, above
        row, col, letters = (np.concatenate(part) for part in zip(*changed, strict=True))
        del changed
        # Turning rows into columns is one counting sort, which scipy has.
        begin = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=padded[0]))])
        changes = csr_array((letters, col, begin), shape=(padded[0], stacked * m)).tocsc()
        del row, col, letters
        begins = np.flatnonzero(changes.data != EMPTY)
        line = np.repeat(np.arange(stacked * m, dtype=index), np.diff(changes.indptr))[begins].astype(np.int64) * n
        row = changes.indices % index(n + 1)
        return Runs((stacked * m, n), line + row[begins], line + row[begins + 1], changes.data[begins])

    def _shifted(self, shift: Ints | int, shape: tuple[int, int]) -> Runs:
        return Runs(shape, self.start + shift, self.stop + shift, self.letter)


class Segments(NamedTuple):
    """The common refinement of two matrices: stretches on which both have one letter."""

    start: Ints
    stop: Ints
    a: NDArray[np.int32]
    b: NDArray[np.int32]


def segments(a: Runs, b: Runs) -> Iterator[Segments]:
    """The refinement, some rows at a time: the arrays in between stay small enough to be used again."""
    rows, cols = a.shape
    portions = min(rows, -(-(len(a) + len(b)) // RUNS_AT_ONCE)) or 1
    edges = np.arange(portions + 1) * rows // portions * cols
    at_a, at_b = np.searchsorted(a.start, edges).tolist(), np.searchsorted(b.start, edges).tolist()
    for p in range(portions):
        yield _refined(a, slice(at_a[p], at_a[p + 1]), b, slice(at_b[p], at_b[p + 1]))


def _refined(a: Runs, of_a: slice, b: Runs, of_b: slice) -> Segments:
    events = np.concatenate([a.start[of_a], a.stop[of_a], b.start[of_b], b.stop[of_b]])
    order = np.argsort(events, kind="stable")  # merges sorted stretches, of which there are four
    bounds = events[order]
    ends = np.flatnonzero(np.append(bounds[1:] != bounds[:-1], True)[: bounds.size])  # last events of positions
    bounds = bounds[ends]
    # Runs of one matrix do not overlap: the letter here is the sum of those begun less those ended. One sum carries
    # both letters, a in the lower half and b in the upper one.
    low, high = a.letter[of_a].astype(np.int64), b.letter[of_b].astype(np.int64) << 32
    both = np.cumsum(np.concatenate([low, -low, high, -high])[order])[ends][:-1]
    return Segments(bounds[:-1], bounds[1:], (both & 0xFFFFFFFF).astype(np.int32), (both >> 32).astype(np.int32))


def combined(a: Runs, b: Runs) -> tuple[Runs, Ints, Ints]:
    """Lay two matrices over each other: runs whose letter numbers a pair, and the pairs' two letters.

    Pair p stands for ``(letters_a[p], letters_b[p])``; each distinct pair appears once.
    """
    segment = Segments(*(np.concatenate(part) for part in zip(*segments(a, b), strict=True)))
    width = int(b.letter.max(initial=1)) + 1
    code = segment.a.astype(np.int64) * width + segment.b
    pairs, index = distinct(code)
    runs = Runs(a.shape, segment.start, segment.stop, index.astype(np.int32))
    return runs, pairs // width, pairs % width


def distinct(values: Ints) -> tuple[Ints, Ints]:
    """Sorted distinct values and each value's index among them; no sorting where they lie close together."""
    low = int(values.min(initial=0))
    spread = int(values.max(initial=0)) - low + 1
    if spread > max(4 * values.size, 1 << 16):
        found, index = np.unique(values, return_inverse=True)
        return found, index.astype(np.int64)
    present = np.zeros(spread, bool)
    present[values - low] = True
    number = np.cumsum(present) - 1
    return np.flatnonzero(present) + low, number[values - low]
