"""Every stride-th cell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.cells import CellPattern, joint_key
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Strided(CellPattern):
    """See :func:`strided`."""

    stride: int
    unit: int = 1
    name = "strided"

    def cells(self, a: Ints, b: Ints) -> Bools:
        hit: Bools = (a - b) % self.stride == 0
        return hit

    def candidates(self, grid: Grid) -> tuple[Ints, Ints] | None:
        rows = grid.all_rows()
        first, last = self.row_cells(grid, rows)
        if self.stride * self.unit <= grid.bk or int((last - first).max()) + 1 >= self.stride:
            return None  # every block holds an allowed pair
        cells = (grid.kv_len - 1) // self.unit + 1
        repeats = np.arange(-1, cells // self.stride + 1, dtype=np.int64) * self.stride
        nearest = first % self.stride
        start = (nearest[:, None] + repeats).ravel()
        width = np.repeat(last - first, repeats.size)
        return self.expand_cells(grid, np.repeat(rows, repeats.size), start, start + width)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        q, k = grid.q_start(rows), grid.k_start(cols)
        apart = (q // self.unit - k // self.unit) % self.stride
        return joint_key(self.edges(q, grid.bq), self.edges(k, grid.bk), apart)


def strided(stride: int, unit: int = 1) -> Pattern:
    """``(q // unit - k // unit) % stride == 0``: the strided part of Child et al., "Sparse Transformers" (2019).

    With unit 1 and a stride below the block size every block holds an allowed pair. Choose a unit of at least the
    block size for a mask with empty blocks.

    Args:
        stride: distance between visible cells, in cells.
        unit: tokens per cell.

    Raises:
        TypeError: stride or unit is not an int.
        ValueError: stride or unit is below 1.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.strided(4, unit=128).compile(65536).density
        0.25
    """
    return Strided(checked_int("strided", "stride", stride, 1), checked_int("strided", "unit", unit, 1))
