"""Random cells, determined by a seed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.cells import CellPattern
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class RandomBlocks(CellPattern):
    """See :func:`random_blocks`."""

    per_row: int
    unit: int = 128
    seed: int = 0
    count: int | None = None
    name = "random_blocks"

    def at(self, grid: Grid) -> Pattern:
        if self.count is not None:
            return self
        return dataclasses.replace(self, count=-(-grid.kv_len // self.unit))

    def picks(self, a: Ints) -> Ints:
        """The cells of each row a, int64 [..., min(per_row, cells)]."""
        if self.count is None:
            raise ValueError(f"{self}: which cells are drawn depends on how many there are; give count, or compile it")
        number = min(self.per_row, self.count)
        chosen = np.empty((*np.shape(a), number), np.int64)
        for i in range(number):
            # Floyd's sampling without replacement: draw from 0..last; what was drawn before becomes `last`.
            last = self.count - number + i
            drawn = _hash(self.seed, self.count, i, a) % np.uint64(last + 1)
            drawn = drawn.astype(np.int64)
            again = (chosen[..., :i] == drawn[..., None]).any(-1)
            chosen[..., i] = np.where(again, last, drawn)
        return chosen

    def cells(self, a: Ints, b: Ints) -> Bools:
        rows, index = np.unique(a, return_inverse=True)
        picks, index = self.picks(rows), index.reshape(np.shape(a))
        hit = np.zeros(np.broadcast_shapes(np.shape(a), np.shape(b)), bool)
        for i in range(picks.shape[-1]):
            hit |= picks[index, i] == b  # one draw at a time, so that memory is independent of per_row
        return hit

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows = grid.all_rows()
        first, last = self.row_cells(grid, rows)
        counts = last - first + 1
        begin = np.cumsum(counts) - counts
        assert isinstance(self.count, int)  # set by at()
        reserve(int(counts.sum()) * min(self.per_row, self.count), 160)
        cells = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(begin - first, counts)
        picks = self.picks(cells)
        owner = np.repeat(np.repeat(rows, counts), picks.shape[-1])
        return self.expand_cells(grid, owner, picks.ravel(), picks.ravel())


def _hash(seed: int, count: int, step: int, row: Ints) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood, 2014) of the four numbers: random access, equal on every machine."""
    state = np.zeros((), np.uint64)
    for value in (seed, count, step, row):
        with np.errstate(over="ignore"):
            state = state ^ np.asarray(value).astype(np.int64).astype(np.uint64)
            state = state + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def random_blocks(per_row: int, unit: int = 128, seed: int = 0, count: int | None = None) -> Pattern:
    """``per_row`` distinct cells for each query cell, drawn from all key cells.

    The random part of Zaheer et al., "Big Bird" (2020), section 2. The draw is fixed by (seed, number of cells).

    Args:
        per_row: cells drawn for each query cell; all cells if there are fewer.
        unit: tokens per cell.
        seed: seed of the draw.
        count: number of key cells to draw from; None: the number in the length that the pattern is compiled for.

    Raises:
        TypeError: an argument is not an int.
        ValueError: per_row or seed negative, unit or count below 1; calling ``allows`` before count is known.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.random_blocks(3, unit=64).compile(64 * 64, block=64).nnz
        192
    """
    per_row = checked_int("random_blocks", "per_row", per_row, 0)
    if count is not None:
        count = checked_int("random_blocks", "count", count, 1)
    seed = checked_int("random_blocks", "seed", seed, 0)
    return RandomBlocks(per_row, checked_int("random_blocks", "unit", unit, 1), seed, count)
