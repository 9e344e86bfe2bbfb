"""Patterns defined cell by cell. A cell is ``unit`` neighbouring tokens."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.runs import distinct
from sparseflash.patterns.tiles import Words, pack

LARGEST_KEY = 1 << 62


class CellPattern(Pattern):
    """Base of patterns that depend only on the cells ``a = q // unit`` and ``b = k // unit``.

    The unit is part of the pattern, so that its meaning does not change with the block size it is compiled at.
    """

    unit: int

    @abstractmethod
    def cells(self, a: Ints, b: Ints) -> Bools:
        """Truth between cells, of the broadcast shape."""

    def allows(self, q: Ints, k: Ints) -> Bools:
        return self.cells(q // self.unit, k // self.unit)

    def coarser(self, tokens: int) -> Pattern:
        return self if self.unit >= tokens else dataclasses.replace(self, unit=tokens)  # type: ignore[type-var]

    def row_cells(self, grid: Grid, rows: Ints) -> tuple[Ints, Ints]:
        """First and last cell that the queries of each block row lie in."""
        return grid.q_start(rows) // self.unit, grid.q_last(rows) // self.unit

    def expand_cells(self, grid: Grid, rows: Ints, first: Ints, last: Ints) -> tuple[Ints, Ints]:
        """Blocks that hold a key of the closed cell intervals ``[first, last]`` of each row."""
        beyond = (grid.kv_len - 1) // self.unit + 1  # cells before and after all keys: products stay small
        first, last = np.clip(first, -1, beyond), np.clip(last, -1, beyond)
        return grid.expand_positions(rows, first * self.unit, last * self.unit + self.unit - 1)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
        """A tile is determined by the starts of cells in the block and by the pairs of cells that are allowed."""
        unit = self.unit
        q, k = grid.q_start(rows), grid.k_start(cols)
        across_q, across_k = (grid.bq + unit - 2) // unit + 1, (grid.bk + unit - 2) // unit + 1
        if across_q * across_k > 62:
            return None
        # Cells that begin past the block do not show in its tile; evaluating the block's last cell instead
        # gives equal tiles equal keys, and evaluates no cell past the end.
        a = np.minimum(q[:, None] // unit + np.arange(across_q), grid.q_last(rows)[:, None] // unit)
        k_last = np.minimum(k + grid.bk, grid.kv_len) - 1
        b = np.minimum(k[:, None] // unit + np.arange(across_k), k_last[:, None] // unit)
        truth = self.cells(a[:, :, None], b[:, None, :]).reshape(rows.size, across_q * across_k)
        code = truth @ (np.int64(1) << np.arange(truth.shape[1], dtype=np.int64))
        return joint_key(self.edges(q, grid.bq), self.edges(k, grid.bk), code)

    def edges(self, starts: Ints, size: int) -> Ints:
        """Offset in the block of the first cell that begins after the block does; the block size if there is none."""
        inside: Ints = -starts % self.unit
        if self.unit < size:
            return inside
        return np.where((inside == 0) | (inside > size), size, inside)

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words | None:
        if self.unit == 1:
            return None
        a, at_q, q_in = self._cells_of(grid.q_start(rows), grid.bq, grid.q_offset + grid.q_len)
        b, at_k, k_in = self._cells_of(grid.k_start(cols), grid.bk, grid.kv_len)
        # The keys that each cell of queries sees, and then a row for each of its queries.
        truth = np.broadcast_to(self.cells(a[:, :, None], b[:, None, :]), (*a.shape, b.shape[1]))
        seen = np.take_along_axis(truth, np.broadcast_to(at_k[:, None, :], (*a.shape, grid.bk)), axis=2)
        words = pack(seen & k_in[:, None, :])
        tiles: Words = np.take_along_axis(words, at_q[:, :, None], axis=1)
        return np.where(q_in[:, :, None], tiles, np.uint32(0))

    def _cells_of(self, starts: Ints, size: int, stop: int) -> tuple[Ints, Ints, Bools]:
        """The cells of blocks, the cell of each token, and whether the token exists."""
        position = starts[:, None] + np.arange(size)
        first, last = starts // self.unit, np.minimum(starts + size, stop) - 1
        cells = np.minimum(
            first[:, None] + np.arange((size + self.unit - 2) // self.unit + 1), last[:, None] // self.unit
        )
        return cells, position // self.unit - first[:, None], position < stop


def joint_key(*parts: Ints) -> Ints:
    """One key that is equal exactly if all parts are equal.

    Values may have any size: parts that would overflow int64 together are numbered first.
    """
    key = np.zeros_like(parts[0])
    spread = 1
    for part in parts:
        low = int(part.min(initial=0))
        width = int(part.max(initial=0)) - low + 1
        if spread * width > LARGEST_KEY:
            found, key = distinct(key)
            kinds, part = distinct(part)
            spread, low, width = found.size, 0, kinds.size
        key = key * width + (part - low)
        spread *= width
    return key
