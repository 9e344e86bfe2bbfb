"""Patterns in which every query sees one interval of keys, which moves forward with the query."""

from __future__ import annotations

from abc import abstractmethod
from functools import lru_cache

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.runs import frozen
from sparseflash.patterns.tiles import Words, pack


class Interval(Pattern):
    """Base of patterns that allow ``low(q) <= k < stop(q)`` with bounds that never decrease in q."""

    @abstractmethod
    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        """First allowed key and the one past the last, in q's shape; may lie outside the existing keys."""

    def allows(self, q: Ints, k: Ints) -> Bools:
        low, stop = self.bounds(q)
        return np.logical_and(k >= low, k < stop)

    def existing(self, q: Ints, grid: Grid) -> tuple[Ints, Ints]:
        """The bounds, cut to the existing keys."""
        low, stop = self.bounds(q)
        return np.clip(low, 0, grid.kv_len), np.clip(stop, 0, grid.kv_len)

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        _, _, c, d = allowed_columns(self, grid)
        return grid.all_rows(), c, d

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        a, b, c, d = allowed_columns(self, grid)
        rows = np.repeat(grid.all_rows(), 2)
        return grid.expand(rows, np.stack([a, d], axis=1).ravel(), np.stack([c, b], axis=1).ravel())

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words | None:
        q = grid.q_start(rows)[:, None] + np.arange(grid.bq)
        low, stop = self.existing(np.minimum(q, grid.q_offset + grid.q_len - 1), grid)
        stop[q >= grid.q_offset + grid.q_len] = 0
        # Row n of this table has its first n bits set: keys [low, stop) of a block are a difference of two rows.
        below = pack(np.tri(grid.bk + 1, grid.bk, -1, dtype=bool))
        first = grid.k_start(cols)[:, None]
        low, stop = np.clip(low - first, 0, grid.bk), np.clip(stop - first, 0, grid.bk)
        words: Words = below.take(stop, axis=0)
        words &= (~below).take(low, axis=0)
        return words


@lru_cache(maxsize=1)  # `candidates` and `full_runs` need it, one after the other
def allowed_columns(pattern: Interval, grid: Grid) -> tuple[Ints, Ints, Ints, Ints]:
    """Per row: columns touched [a, b) and columns filled [c, d) inside them."""
    rows = grid.all_rows()
    first_low, first_stop = pattern.existing(grid.q_start(rows), grid)
    last_low, last_stop = pattern.existing(grid.q_last(rows), grid)
    a, b = first_low // grid.bk, -(-last_stop // grid.bk)
    c = -(-last_low // grid.bk)
    d = np.where(first_stop == grid.kv_len, grid.cols, first_stop // grid.bk)
    empty = c >= d
    c, d = np.where(empty, b, c), np.where(empty, b, d)
    return frozen(a), frozen(b), frozen(c), frozen(d)


class Band(Interval):
    """Allowed where ``low <= k - q <= high``; None is unbounded. The base of full, causal and local."""

    @property
    def low(self) -> int | None:
        """Smallest allowed k - q."""
        return None

    @property
    def high(self) -> int | None:
        """Largest allowed k - q."""
        return None

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        far = np.iinfo(np.int64).max
        q = np.asarray(q, np.int64)
        low = np.full_like(q, -far) if self.low is None else q + self.low
        return low, np.full_like(q, far) if self.high is None else q + self.high + 1

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return grid.k_start(cols) - grid.q_start(rows)
