"""Flat block butterfly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.cells import CellPattern, joint_key
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Butterfly(CellPattern):
    """See :func:`butterfly`."""

    unit: int = 128
    max_stride: int | None = None
    name = "butterfly"

    def cells(self, a: Ints, b: Ints) -> Bools:
        # A position before the first key is negative, and so is its XOR with any key's cell.
        x = a ^ b
        ok: Bools = (x >= 0) & (x & (x - 1) == 0)
        if self.max_stride is not None:
            ok = ok & (x <= self.max_stride)
        return ok

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows = grid.all_rows()
        first, last = self.row_cells(grid, rows)
        rows, first, last = rows[last >= 0], np.maximum(first[last >= 0], 0), last[last >= 0]
        largest = max(int(last.max(initial=0)), (grid.kv_len - 1) // self.unit)
        found = [(first, last)]
        stride = 1
        while stride <= largest and (self.max_stride is None or stride <= self.max_stride):
            found += _partners(first, last, stride)
            stride *= 2
        starts, stops = (np.concatenate(side) for side in zip(*found, strict=True))
        return self.expand_cells(grid, np.tile(rows, len(found)), starts, stops)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
        small = super().keys(grid, rows, cols)
        if small is not None:
            return small
        # Blocks that are aligned squares of cells: (a0 + i) ^ (b0 + j) is (a0 ^ b0) ^ (i ^ j).
        tokens = max(grid.bq, grid.bk)
        cells = tokens // self.unit
        if tokens % self.unit or cells & (cells - 1) or grid.q_offset % tokens:
            return None
        q, k = grid.q_start(rows), grid.k_start(cols)
        a, b = q // self.unit, k // self.unit
        return joint_key((a // cells) ^ (b // cells), a % cells, b % cells)


def _partners(first: Ints, last: Ints, stride: int) -> list[tuple[Ints, Ints]]:
    """Closed intervals that cover ``{a ^ stride : first <= a <= last}``."""
    # Inside one aligned stretch of `stride` cells the XOR is a shift, forth in even stretches and back in odd ones.
    low, high = first // stride, last // stride
    near = high - low <= 1
    end = np.minimum(last, (low + 1) * stride - 1)
    begin = np.maximum(first, high * stride)
    left = np.where(low % 2 == 0, stride, -stride)
    right = np.where(high % 2 == 0, stride, -stride)
    return [
        (np.where(near, first + left, first - stride), np.where(near, end + left, last + stride)),
        (np.where(near, begin + right, first - stride), np.where(near, last + right, last + stride)),
    ]


def butterfly(unit: int = 128, max_stride: int | None = None) -> Pattern:
    """Cell j is visible from cell i iff ``i ^ j`` is 0 or a power of two (at most ``max_stride`` cells).

    The flat block butterfly of Dao et al., "Pixelated Butterfly" (ICLR 2022), section 3.2: the sum of the factors of
    a butterfly matrix, log2(n) + 1 cells per row.

    Args:
        unit: tokens per cell.
        max_stride: largest XOR distance in cells; None for all.

    Raises:
        TypeError: unit or max_stride is not an int.
        ValueError: unit or max_stride is below 1.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.butterfly(unit=128).compile(1024).to_dense()[::128, ::128].astype(int)
        array([[1, 1, 1, 0, 1, 0, 0, 0],
               [1, 1, 0, 1, 0, 1, 0, 0],
               [1, 0, 1, 1, 0, 0, 1, 0],
               [0, 1, 1, 1, 0, 0, 0, 1],
               [1, 0, 0, 0, 1, 1, 1, 0],
               [0, 1, 0, 0, 1, 1, 0, 1],
               [0, 0, 1, 0, 1, 0, 1, 1],
               [0, 0, 0, 1, 0, 1, 1, 1]])
    """
    if max_stride is not None:
        max_stride = checked_int("butterfly", "max_stride", max_stride, 1)
    return Butterfly(checked_int("butterfly", "unit", unit, 1), max_stride)
