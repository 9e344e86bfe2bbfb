"""Masks of numbers that queries and keys have, as patterns for one length: what recognised ``mask_mod`` are made of.

Queries count from 0. They are internal: they hold an array for given lengths, and compare by identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.tiles import Words, pack

# Blocks whose bounds are compared at once.
BLOCKS_AT_ONCE = 1 << 22


@dataclass(frozen=True, eq=False, repr=False)
class Stretches(Pattern):
    """Allowed where ``low[q] <= k < stop[q]``: each query sees one stretch of keys, in any order of the queries."""

    low: Ints  # int64 [q_len]
    stop: Ints

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_and(self.low[q] <= k, k < self.stop[q])

    def cut(self, kv_len: int) -> tuple[Ints, Ints]:
        """The bounds, cut to the keys that exist; of an empty stretch ``kv_len`` and 0."""
        low, stop = np.maximum(self.low, 0), np.minimum(self.stop, kv_len)
        empty = low >= stop
        return np.where(empty, kv_len, low), np.where(empty, 0, stop)

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        low, stop = self.cut(grid.kv_len)
        first = grid.all_rows() * grid.bq
        start = -(-np.maximum.reduceat(low, first) // grid.bk)
        least = np.minimum.reduceat(stop, first)
        end = np.where(least == grid.kv_len, grid.cols, least // grid.bk)
        return grid.all_rows(), start, np.maximum(start, end)

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        low, stop = self.cut(grid.kv_len)
        row, start, end = np.arange(grid.q_len) // grid.bq, low // grid.bk, -(-stop // grid.bk)
        # Neighbours mostly touch the same blocks.
        changed = np.flatnonzero(np.append(True, np.diff(row) | np.diff(start) | np.diff(end)))
        row, start, end = row[changed], start[changed], end[changed]
        _, full_start, full_end = (bound[row] for bound in self.full_runs(grid))
        none = full_start == full_end
        full_start[none], full_end[none] = grid.cols, grid.cols
        starts = np.stack([start, np.maximum(start, full_end)], axis=1)
        ends = np.stack([np.minimum(end, full_start), end], axis=1)
        return grid.expand(np.repeat(row, 2), starts.ravel(), ends.ravel())

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words:
        low, stop = self.cut(grid.kv_len)
        q = rows[:, None] * grid.bq + np.arange(grid.bq)
        inside = np.minimum(q, grid.q_len - 1)
        low, stop = low[inside], np.where(q < grid.q_len, stop[inside], 0)
        # Row n of this table has its first n bits set: keys [low, stop) of a block are a difference of two rows.
        below = pack(np.tri(grid.bk + 1, grid.bk, -1, dtype=bool))
        first = grid.k_start(cols)[:, None]
        words: Words = below.take(np.clip(stop - first, 0, grid.bk), axis=0)
        words &= (~below).take(np.clip(low - first, 0, grid.bk), axis=0)
        return words


@dataclass(frozen=True, eq=False, repr=False)
class Compared(Pattern):
    """Allowed where ``of_key[k] <= of_query[q]``, or where both are equal: for numbers in any order.

    Blocks are told apart by the smallest and the largest numbers of their queries and keys: O(blocks), and pairs are
    asked about only where these do not decide.
    """

    of_query: Ints  # int64 [q_len]
    of_key: Ints  # int64 [kv_len]
    equal: bool

    def allows(self, q: Ints, k: Ints) -> Bools:
        one, other = self.of_key[k], self.of_query[q]
        return np.equal(one, other) if self.equal else np.less_equal(one, other)

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        return _decided(self, grid)[0]

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        return _decided(self, grid)[1]


@lru_cache(maxsize=1)  # both methods ask for it, one after the other
def _decided(pattern: Compared, grid: Grid) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints]]:
    """Rows with column intervals of full blocks, and the blocks that their bounds do not decide."""
    rows, cols = grid.all_rows(), np.arange(grid.cols)
    q_low, q_high = (f.reduceat(pattern.of_query, rows * grid.bq)[:, None] for f in (np.minimum, np.maximum))
    k_low, k_high = (f.reduceat(pattern.of_key, cols * grid.bk) for f in (np.minimum, np.maximum))
    full: list[tuple[Ints, Ints, Ints]] = []
    undecided: list[tuple[Ints, Ints]] = []
    step = max(1, BLOCKS_AT_ONCE // grid.cols)
    for begin in range(0, grid.rows, step):
        low, high = q_low[begin : begin + step], q_high[begin : begin + step]
        if pattern.equal:
            some = (k_low <= high) & (low <= k_high)
            every = some & (low == high) & (k_low == k_high)
        else:
            some, every = k_low <= high, k_high <= low
        edges = np.diff(every.astype(np.int8), axis=1, prepend=0, append=0)
        (row, start), (_, end) = np.nonzero(edges == 1), np.nonzero(edges == -1)
        full.append((row + begin, start, end))
        row, col = np.nonzero(some & ~every)
        undecided.append((row + begin, col))
    return (
        tuple(np.concatenate(parts) for parts in zip(*full, strict=True)),  # type: ignore[return-value]
        tuple(np.concatenate(parts) for parts in zip(*undecided, strict=True)),
    )
