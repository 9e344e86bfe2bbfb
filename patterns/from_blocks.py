"""A mask that is data: one boolean a cell."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse

from sparseflash.patterns.cells import CellPattern
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int

LARGEST_SIDE = 1 << 31


class Cells:
    """An immutable boolean matrix that compares by content: sorted linear indices of the cells that are set."""

    def __init__(self, shape: tuple[int, int], linear: Ints) -> None:
        self.shape = shape
        self.linear = linear
        self.linear.flags.writeable = False
        self.digest = blake2b(repr(shape).encode() + linear.tobytes(), digest_size=16).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cells) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"<{self.shape[0]} x {self.shape[1]} cells, {self.linear.size} set>"


@dataclass(frozen=True, repr=False)
class FromBlocks(CellPattern):
    """See :func:`from_blocks`."""

    matrix: Cells
    unit: int = 128
    name = "from_blocks"

    def coarser(self, tokens: int) -> Pattern:
        return self  # data, not an idea

    def cells(self, a: Ints, b: Ints) -> Bools:
        cols = self.matrix.shape[1]
        self._fit(int(np.max(a, initial=-1)), int(np.max(b, initial=-1)))
        linear = a * cols + b
        index = np.searchsorted(self.matrix.linear, linear)
        stored = np.append(self.matrix.linear, -1)[index] == linear
        inside: Bools = stored & (a >= 0) & (b >= 0)
        return inside

    def _fit(self, a: int, b: int) -> None:
        rows, cols = self.matrix.shape
        if a >= rows or b >= cols:
            raise ValueError(
                f"{self}: {rows} x {cols} cells of {self.unit} tokens cover positions up to "
                f"{rows * self.unit - 1:,} and {cols * self.unit - 1:,}; asked about cell ({a}, {b})"
            )

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit((grid.q_offset + grid.q_len - 1) // self.unit, (grid.kv_len - 1) // self.unit)
        a, b = np.divmod(self.matrix.linear, self.matrix.shape[1])
        # A cell may lie in several block rows: one column interval for each of them.
        first = np.maximum(a * self.unit - grid.q_offset, 0) // grid.bq
        last = np.minimum((a + 1) * self.unit - 1 - grid.q_offset, grid.q_len - 1) // grid.bq
        count = np.maximum(last - first + 1, 0)
        begin = np.cumsum(count) - count
        reserve(int(count.sum()), 80)
        rows = np.arange(int(count.sum()), dtype=np.int64) - np.repeat(begin - first, count)
        b = np.repeat(b, count)
        return self.expand_cells(grid, rows, b, b)


def from_blocks(array: NDArray[Any] | csr_array, unit: int = 128) -> Pattern:
    """``array[q // unit, k // unit]``: a mask drawn, learned or loaded as data.

    Args:
        array: 2-D numpy array or scipy.sparse matrix, non-zero where allowed. The pattern keeps a copy.
        unit: tokens per cell.

    Raises:
        TypeError: array is not a 2-D array of booleans or numbers, or unit is not an int.
        ValueError: unit is below 1; when compiling, the array covers fewer tokens than the lengths.

    Example:
        >>> import numpy as np
        >>> from sparseflash import patterns as P
        >>> P.from_blocks(np.eye(4), unit=128).compile(512).nnz
        4
    """
    unit = checked_int("from_blocks", "unit", unit, 1)
    if not issparse(array):
        array = np.asarray(array)
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise TypeError(f"from_blocks: array must be 2-D booleans or numbers, got {array.dtype} {array.shape}")
    if max(array.shape) > LARGEST_SIDE:
        raise ValueError(f"from_blocks: array must have at most 2**31 cells a side, got {array.shape}")
    matrix: Any = array
    if issparse(matrix):
        matrix = matrix.tocsr(copy=True)
        matrix.sum_duplicates()
    if matrix.dtype.kind == "f" and np.isnan(matrix.data if issparse(matrix) else matrix).any():
        raise ValueError("from_blocks: array holds NaN; a cell is allowed (not 0) or it is not (0)")
    rows, cols = (np.asarray(x, np.int64) for x in matrix.nonzero())
    return FromBlocks(Cells((array.shape[0], array.shape[1]), np.unique(rows * array.shape[1] + cols)), unit)
