"""Patterns that compare a value per query with a value per key, from which recognised ``mask_mod`` are built.

Queries are counted from 0. These patterns are internal: they hold arrays for fixed lengths, and compare by identity.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import sparse

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.runs import distinct
from sparseflash.patterns.tiles import Words, distinct_rows, pack

# Blocks in one chunk of bound comparisons.
BLOCKS_AT_ONCE = 1 << 22
# Stretches of keys with equal values in a block, on average; with more of them it is faster to compare every pair.
MOST_STRETCHES = 16


@dataclass(frozen=True, eq=False, repr=False)
class Stretches(Pattern):
    """Allowed where ``low[q] <= k < stop[q]``: each query sees one stretch of keys; stretches need not be sorted."""

    low: Ints  # int64 [q_len]
    stop: Ints

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.logical_and(self.low[q] <= k, k < self.stop[q])

    def cut(self, kv_len: int) -> tuple[Ints, Ints]:
        """The bounds, clipped to the existing keys; ``kv_len`` and 0 for an empty stretch."""
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
        # Neighbouring queries mostly touch the same blocks.
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
        below = _below(grid.bk)
        first = grid.k_start(cols)[:, None]
        words: Words = below.take(np.clip(stop - first, 0, grid.bk), axis=0)
        words &= (~below).take(np.clip(low - first, 0, grid.bk), axis=0)
        return words


@dataclass(frozen=True, eq=False, repr=False)
class Compared(Pattern):
    """Allowed where ``of_key[k] <= of_query[q]``, or where both are equal; values need not be sorted.

    Blocks are classified by the smallest and largest values of their queries and keys, O(blocks). For equality, if it
    is cheaper, the blocks in which each value occurs are listed instead, so that documents in several parts take time
    proportional to the blocks in which their parts meet. Tokens are compared only in blocks that this leaves undecided.
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

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        """Tiles are equal if all values have equal offsets from those of the block's first query and key."""
        row, first_query = _shapes(self.of_query, grid.bq)
        col, first_key = _shapes(self.of_key, grid.bk)
        kind = row[rows] * (int(col.max()) + 1) + col[cols]
        away = distinct(first_query[rows] - first_key[cols])[1]
        return kind * (int(away.max(initial=0)) + 1) + away

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words | None:
        """The bits of neighbouring keys with equal values are equal, and are written together."""
        k = cols[:, None] * grid.bk + np.arange(grid.bk)
        numbers = self.of_key[np.minimum(k, grid.kv_len - 1)]
        begins = np.append(np.ones((cols.size, 1), bool), numbers[:, 1:] != numbers[:, :-1], axis=1)
        block, start = np.nonzero(begins)
        if block.size > MOST_STRETCHES * cols.size:
            return None
        stop = np.append(start[1:], grid.bk)
        stop[np.append(block[1:] != block[:-1], True)] = grid.bk
        stop = np.minimum(stop, grid.kv_len - cols[block] * grid.bk)
        below = _below(grid.bk)
        bits = below[np.maximum(stop, start)] & ~below[start]  # [stretches, W]
        q = rows[:, None] * grid.bq + np.arange(grid.bq)
        of_query = self.of_query[np.minimum(q, grid.q_len - 1)]
        words = np.zeros((rows.size, grid.bq, bits.shape[1]), np.uint32)
        place = np.arange(block.size) - np.searchsorted(block, np.arange(rows.size))[block]
        for turn in range(int(place.max(initial=-1)) + 1):
            here = np.flatnonzero(place == turn)
            number, asked = numbers[block[here], start[here]][:, None], of_query[block[here]]
            seen = asked == number if self.equal else number <= asked
            words[block[here]] |= np.where(seen[..., None], bits[here, None], np.uint32(0))
        words[q >= grid.q_len] = 0
        return words


def _below(bk: int) -> Words:
    """Masks whose row n has the first n bits set: keys [low, stop) of a block are the difference of two rows."""
    return pack(np.tri(bk + 1, bk, -1, dtype=bool))


def _shapes(numbers: Ints, side: int) -> tuple[Ints, Ints]:
    """For each block: a class of blocks with equal offsets from their first value, and that first value."""
    blocks = np.append(numbers, np.repeat(numbers[-1:], -numbers.size % side)).reshape(-1, side)
    first = blocks[:, 0]
    return distinct_rows((blocks - first[:, None]).view(np.uint64))[1], first


@lru_cache(maxsize=1)  # full_runs and candidates both call it, in succession
def _decided(pattern: Compared, grid: Grid) -> tuple[tuple[Ints, Ints, Ints], tuple[Ints, Ints]]:
    """Rows with column intervals of full blocks, and the blocks that are left undecided."""
    rows, cols = grid.all_rows(), np.arange(grid.cols)
    q_low, q_high = (f.reduceat(pattern.of_query, rows * grid.bq)[:, None] for f in (np.minimum, np.maximum))
    k_low, k_high = (f.reduceat(pattern.of_key, cols * grid.bk) for f in (np.minimum, np.maximum))
    if pattern.equal and (found := _meeting(pattern, grid)) is not None:
        row, col = found
        every = (q_low[row, 0] == q_high[row, 0]) & (k_low[col] == k_high[col])
        return (row[every], col[every], col[every] + 1), (row[~every], col[~every])
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


def _meeting(pattern: Compared, grid: Grid) -> tuple[Ints, Ints] | None:
    """Sorted blocks in which a query and a key have equal values; None if listing them costs more than all blocks.

    Computed as a product of two sparse matrices, [rows, values] @ [values, columns].
    """
    numbers, of_both = distinct(np.concatenate([pattern.of_query, pattern.of_key]))
    of_query, of_key = np.split(of_both, [grid.q_len])
    rows = _occurrences(of_query, grid.bq, (grid.rows, numbers.size))
    cols = _occurrences(of_key, grid.bk, (grid.cols, numbers.size))
    products = rows.sum(0, dtype=np.int64) @ cols.sum(0, dtype=np.int64).T
    if products.item() > grid.rows * grid.cols:
        return None
    met = (rows @ cols.T).tocsr()
    met.sort_indices()
    row = np.repeat(np.arange(grid.rows), np.diff(met.indptr))
    return row, met.indices.astype(np.int64)


def _occurrences(numbers: Ints, side: int, shape: tuple[int, int]) -> Any:
    """A sparse matrix [blocks, values], true where a value occurs in a block."""
    changed = np.append(True, numbers[1:] != numbers[:-1])
    changed[::side] = True
    at = np.flatnonzero(changed)
    found = sparse.csr_array((np.ones(at.size, bool), (at // side, numbers[at])), shape)
    found.sum_duplicates()
    return found
