"""Patterns of the difference k - q: one band around the diagonal."""

from __future__ import annotations

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern


class Band(Pattern):
    """Allowed where ``low <= k - q <= high``; None is unbounded. The base of full, causal and local."""

    @property
    def low(self) -> int | None:
        """Smallest allowed k - q."""
        return None

    @property
    def high(self) -> int | None:
        """Largest allowed k - q."""
        return None

    def allows(self, q: Ints, k: Ints) -> Bools:
        ok = np.ones(np.broadcast_shapes(np.shape(q), np.shape(k)), bool)
        if self.low is not None:
            ok &= k - q >= self.low
        if self.high is not None:
            ok &= k - q <= self.high
        return ok

    def _bounds(self, q: Ints, grid: Grid) -> tuple[Ints, Ints]:
        """Half-open key interval of queries at q, cut to the keys that exist."""
        low = np.zeros_like(q) if self.low is None else q + self.low
        stop = np.full_like(q, grid.kv_len) if self.high is None else q + self.high + 1
        return np.clip(low, 0, grid.kv_len), np.clip(stop, 0, grid.kv_len)

    def _columns(self, grid: Grid) -> tuple[Ints, Ints, Ints, Ints]:
        """Per row: columns touched [a, b) and columns filled [c, d) inside them."""
        rows = grid.all_rows()
        first_low, first_stop = self._bounds(grid.q_start(rows), grid)
        last_low, last_stop = self._bounds(grid.q_last(rows), grid)
        a, b = first_low // grid.bk, -(-last_stop // grid.bk)
        c = -(-last_low // grid.bk)
        d = np.where(first_stop == grid.kv_len, grid.cols, first_stop // grid.bk)
        empty = c >= d
        return a, b, np.where(empty, b, c), np.where(empty, b, d)

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        _, _, c, d = self._columns(grid)
        return grid.all_rows(), c, d

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        a, b, c, d = self._columns(grid)
        rows = grid.all_rows()
        return grid.expand(np.tile(rows, 2), np.concatenate([a, d]), np.concatenate([c, b]))

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return grid.k_start(cols) - grid.q_start(rows)
