"""Own stretch, and the summary cells of all stretches."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.cells import CellPattern, joint_key
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Fixed(CellPattern):
    """See :func:`fixed`."""

    stride: int
    summary: int
    unit: int = 1
    name = "fixed"

    def cells(self, a: Ints, b: Ints) -> Bools:
        own, summary = a // self.stride == b // self.stride, b % self.stride >= self.stride - self.summary
        return np.asarray(own | summary)

    def coarser(self, tokens: int) -> Pattern:
        # Whole cells as summaries, in the same share of all cells.
        stride = -(-self.stride // max(self.summary, 1))
        return self if self.unit >= tokens else Fixed(stride, min(self.summary, 1), tokens)

    def _own(self, grid: Grid) -> tuple[Ints, Ints, Ints, Ints]:
        """Per row: columns [a, b) that its own stretches touch, and [c, d) of those that one stretch fills."""
        first, last = self.row_cells(grid, grid.all_rows())
        beyond = (grid.kv_len - 1) // self.unit + 1
        start = np.clip(first // self.stride * self.stride, -1, beyond) * self.unit
        stop = np.clip((last // self.stride + 1) * self.stride, -1, beyond) * self.unit
        a, b = np.clip(start, 0, None) // grid.bk, -(-np.clip(stop, 0, grid.kv_len) // grid.bk)
        c = -(-np.clip(start, 0, None) // grid.bk)
        d = np.where(stop >= grid.kv_len, grid.cols, stop // grid.bk)
        none = (first // self.stride != last // self.stride) | (c >= d)
        return a, b, np.where(none, b, c), np.where(none, b, d)

    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        _, _, c, d = self._own(grid)
        return grid.all_rows(), c, d

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows = grid.all_rows()
        a, b, c, d = self._own(grid)
        row, col = grid.expand(np.tile(rows, 2), np.concatenate([a, d]), np.concatenate([c, b]))
        if not self.summary:
            return row, col
        # The key blocks with summaries are the same for every row: found once, repeated for each.
        ends = np.arange(1, (grid.kv_len - 1) // (self.stride * self.unit) + 2, dtype=np.int64) * self.stride
        zero = np.zeros_like(ends)
        _, summaries = self.expand_cells(grid, zero, ends - self.summary, ends - 1)
        reserve(rows.size * summaries.size, 80)
        every_row = np.repeat(rows, summaries.size)
        return np.concatenate([row, every_row]), np.concatenate([col, np.tile(summaries, rows.size)])

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        few_cells = super().keys(grid, rows, cols)
        if few_cells is not None:
            return few_cells
        q, k = grid.q_start(rows), grid.k_start(cols)
        a, b = q // self.unit, k // self.unit
        reach = (grid.bq + grid.bk) // (self.unit * self.stride) + 3  # stretches further apart never meet in a block
        apart = np.clip(a // self.stride - b // self.stride, -reach, reach)
        return joint_key(q % self.unit, k % self.unit, a % self.stride, b % self.stride, apart)


def fixed(stride: int, summary: int, unit: int = 1) -> Pattern:
    """``a // stride == b // stride`` or ``b % stride >= stride - summary``, with a, b the cells of q, k.

    The fixed pattern of Child et al., "Sparse Transformers" (2019), section 4.2: a query sees its own stretch of
    ``stride`` cells and the last ``summary`` cells of every stretch. ``causal() & fixed(...)`` is the paper's.

    Args:
        stride: cells per stretch.
        summary: cells at its end that everyone sees, at most stride.
        unit: tokens per cell.

    Raises:
        TypeError: an argument is not an int.
        ValueError: stride or unit below 1, summary not in 0..stride.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.fixed(3, 1).compile(6, block=16).to_dense().astype(int)
        array([[1, 1, 1, 0, 0, 1],
               [1, 1, 1, 0, 0, 1],
               [1, 1, 1, 0, 0, 1],
               [0, 0, 1, 1, 1, 1],
               [0, 0, 1, 1, 1, 1],
               [0, 0, 1, 1, 1, 1]])
    """
    stride = checked_int("fixed", "stride", stride, 1)
    summary = checked_int("fixed", "summary", summary, 0)
    if summary > stride:
        raise ValueError(f"fixed: summary must be at most stride = {stride}, got summary={summary}")
    return Fixed(stride, summary, checked_int("fixed", "unit", unit, 1))
