"""Tokens that see all and are seen by all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.cells import joint_key
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class GlobalTokens(Pattern):
    """See :func:`global_tokens`."""

    tokens: int | tuple[int, ...]
    name = "global_tokens"

    def _is_global(self, position: Ints) -> Bools:
        if isinstance(self.tokens, int):
            return (position >= 0) & (position < self.tokens)
        return np.isin(position, np.array(self.tokens, np.int64))

    def allows(self, q: Ints, k: Ints) -> Bools:
        return self._is_global(q) | self._is_global(k)

    def _lines(self, grid: Grid) -> tuple[Ints, Ints]:
        """Block rows and block columns that hold a global token."""
        if isinstance(self.tokens, int):
            count = min(self.tokens, max(grid.kv_len, grid.q_offset + grid.q_len))
            reserve(count, 32)
            positions = np.arange(count, dtype=np.int64)
        else:
            positions = np.array(self.tokens, np.int64)
        index = positions - grid.q_offset
        rows = np.unique(index[(index >= 0) & (index < grid.q_len)] // grid.bq)
        return rows, np.unique(positions[positions < grid.kv_len] // grid.bk)

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows, cols = self._lines(grid)
        reserve(grid.rows * cols.size, 80)
        every_row = np.repeat(grid.all_rows(), cols.size)
        zero = np.zeros_like(rows)
        starts = np.concatenate([zero, np.tile(cols, grid.rows)])
        stops = np.concatenate([zero + grid.cols, np.tile(cols + 1, grid.rows)])
        return grid.expand(np.concatenate([rows, every_row]), starts, stops)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        """A tile is known from which of its queries and which of its keys are global."""
        row_lines, col_lines = self._lines(grid)
        row_kind = np.zeros(grid.rows, np.int64)
        col_kind = np.zeros(grid.cols, np.int64)
        row_kind[row_lines] = self._kinds(grid.q_start(row_lines), grid.bq)
        col_kind[col_lines] = self._kinds(grid.k_start(col_lines), grid.bk)
        return joint_key(row_kind[rows], col_kind[cols])

    def _kinds(self, start: Ints, size: int) -> Ints:
        members = np.packbits(self._is_global(start[:, None] + np.arange(size)), axis=1)
        _, kind = np.unique(members, axis=0, return_inverse=True)
        kinds: Ints = kind.reshape(-1).astype(np.int64) + 1
        return kinds


def global_tokens(tokens: int | Iterable[int]) -> Pattern:
    """The first ``tokens`` positions, or the given ones, see every key and are seen by every query.

    Global attention of Beltagy et al., "Longformer" (2020), section 3.1, and Zaheer et al., "Big Bird" (2020).

    Args:
        tokens: number of leading tokens, or positions in any order.

    Raises:
        TypeError: neither an int nor ints.
        ValueError: a negative count or position, or no position.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.global_tokens((0, 2)).compile(4, block=16).to_dense().astype(int)
        array([[1, 1, 1, 1],
               [1, 0, 1, 0],
               [1, 1, 1, 1],
               [1, 0, 1, 0]])
    """
    if isinstance(tokens, Iterable) and not isinstance(tokens, str | bytes):
        positions = tuple(sorted({checked_int("global_tokens", "position", t, 0) for t in tokens}))
        if not positions:
            raise ValueError("global_tokens: give at least one position, got none")
        return GlobalTokens(positions)
    return GlobalTokens(checked_int("global_tokens", "tokens", tokens, 0))
