"""Matrices of block codes, stored as runs.

The masks this library meets are made of long stretches: a causal row is one run of FULL blocks and one PARTIAL
block, whatever its length. Storing runs instead of blocks keeps dense, causal and complemented masks at O(rows),
and makes every operation a sweep over run boundaries.

Block codes: 0 EMPTY (never stored), 1 FULL, t >= 2 PARTIAL with tile ``t - 2``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints, positions, union

EMPTY, FULL, FIRST_TILE = 0, 1, 2

AnyArray = TypeVar("AnyArray", bound=NDArray[Any])


def frozen(array: AnyArray) -> AnyArray:
    """The array, made read-only together with the arrays that it is a view of."""
    whole: Any = array
    while isinstance(whole, np.ndarray):
        whole.flags.writeable = False
        whole = whole.base
    return array


@dataclass(frozen=True, eq=False)
class Runs:
    """A matrix [rows, cols] of block codes as sorted, disjoint runs of equal codes.

    A run lies inside one row; positions are linear (``row * cols + col``), so that one sorted array holds the
    matrix. Neighbouring runs of one row have different codes once :meth:`merged`.
    """

    shape: tuple[int, int]
    start: Ints  # [n] linear position of the first block
    stop: Ints  # [n] linear position past the last block
    code: NDArray[np.int32]  # [n]

    @classmethod
    def from_blocks(cls, shape: tuple[int, int], rows: Ints, cols: Ints, codes: NDArray[np.int32]) -> Runs:
        """From single blocks, sorted by row and column and without duplicates."""
        linear = rows * shape[1] + cols
        return cls(shape, linear, linear + 1, codes).merged()

    @classmethod
    def from_intervals(cls, shape: tuple[int, int], rows: Ints, starts: Ints, stops: Ints, code: int) -> Runs:
        """One code on the union of column intervals ``[starts, stops)``; they may overlap or be empty."""
        start, stop = union(shape, rows, starts, stops)
        return cls(shape, start, stop, np.full(start.size, code, np.int32))

    def __len__(self) -> int:
        return len(self.code)

    @property
    def letter(self) -> NDArray[np.int32]:
        """The former name of ``code``."""
        warnings.warn("Runs.letter is now Runs.code", DeprecationWarning, stacklevel=2)
        return self.code

    @cached_property
    def row(self) -> Ints:
        """Row of each run."""
        return frozen(self.start // self.shape[1])

    @cached_property
    def begin(self) -> Ints:
        """Where the runs of each row begin, [rows + 1]."""
        begin = np.zeros(self.shape[0] + 1, np.int64)
        np.cumsum(np.bincount(self.row, minlength=self.shape[0]), out=begin[1:])
        return frozen(begin)

    @cached_property
    def length(self) -> Ints:
        """Blocks in each run."""
        return frozen(self.stop - self.start)

    def beside(self, other: Runs) -> Runs | None:
        """The blocks of this matrix and of another one; None if a block is stored in both."""
        start = np.concatenate([self.start, other.start])
        order = np.argsort(start, kind="stable")
        start, stop = start[order], np.concatenate([self.stop, other.stop])[order]
        if (start[1:] < stop[:-1]).any():
            return None
        return Runs(self.shape, start, stop, np.concatenate([self.code, other.code])[order])

    def code_at(self, linear: Ints) -> NDArray[np.int32]:
        """Codes at linear positions; lookup is fastest for sorted positions."""
        if not len(self):
            return np.zeros(linear.shape, np.int32)
        index = np.searchsorted(self.start, linear, side="right") - 1
        inside = (index >= 0) & (linear < self.stop[index])
        return np.where(inside, self.code[index], np.int32(EMPTY))

    def mapped(self, new_code: NDArray[np.int32]) -> Runs:
        """The matrix with every code t replaced by ``new_code[t]``."""
        return Runs(self.shape, self.start, self.stop, new_code[self.code])

    def merged(self) -> Runs:
        """The matrix without EMPTY runs, and with adjacent runs of equal code in one row joined."""
        start, stop, code = self.start, self.stop, self.code
        if not code.all():  # EMPTY is 0
            stored = np.flatnonzero(code)
            start, stop, code = start[stored], stop[stored], code[stored]
        joined = np.flatnonzero((start[1:] == stop[:-1]) & (code[1:] == code[:-1])) + 1
        joined = joined[start[joined] % self.shape[1] != 0]
        if joined.size:
            head = np.ones(code.size, bool)
            head[joined] = False
            heads = np.flatnonzero(head)
            start, stop, code = start[heads], stop[np.append(heads[1:], code.size) - 1], code[heads]
        return Runs(self.shape, start, stop, code)

    def select_rows(self, rows: Ints) -> Runs:
        """The matrix whose row i is this one's row ``rows[i]``."""
        counts = np.diff(self.begin)[rows]
        index = positions(self.begin[rows], self.begin[rows] + counts)
        shift = np.repeat((np.arange(rows.size) - rows) * self.shape[1], counts)
        return Runs((rows.size, self.shape[1]), self.start[index] + shift, self.stop[index] + shift, self.code[index])

    def blocks(self) -> tuple[Ints, Ints, NDArray[np.int32]]:
        """Every stored block: rows, columns, codes, sorted. O(stored blocks)."""
        rows = np.repeat(self.row, self.length)
        cols = positions(self.start, self.stop) - rows * self.shape[1]
        return rows, cols, np.repeat(self.code, self.length)


def distinct(values: Ints) -> tuple[Ints, Ints]:
    """Sorted distinct values, and each value's index among them; values in a narrow range are counted, not sorted."""
    low = int(values.min(initial=0))
    spread = int(values.max(initial=0)) - low + 1
    if spread > max(4 * values.size, 1 << 16):
        found, index = np.unique(values, return_inverse=True)
        return found, index.astype(np.int64)
    present = np.zeros(spread, bool)
    present[values - low] = True
    number = np.cumsum(present) - 1
    return np.flatnonzero(present) + low, number[values - low]
