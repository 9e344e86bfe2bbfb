"""Single columns and diagonals of a mask."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.dilated import Offsets
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Columns(Pattern):
    """See :func:`columns`."""

    positions: tuple[int, ...]
    name = "columns"

    def allows(self, q: Ints, k: Ints) -> Bools:
        seen = np.isin(k, np.array(self.positions, np.int64))
        return np.broadcast_to(seen, np.broadcast_shapes(np.shape(q), seen.shape))

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        positions = np.array(self.positions, np.int64)
        cols = np.unique(positions[positions < grid.kv_len] // grid.bk)
        reserve(grid.rows * cols.size, 80)
        return np.repeat(grid.all_rows(), cols.size), np.tile(cols, grid.rows)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return cols


@dataclass(frozen=True, repr=False)
class Diagonals(Offsets):
    """See :func:`diagonals`."""

    distances: tuple[int, ...]
    name = "diagonals"

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.isin(q - k, np.array(self.distances, np.int64))

    def offsets(self, limit: int) -> Ints:
        offsets = -np.array(self.distances, np.int64)
        return offsets[np.abs(offsets) <= limit]


def columns(positions: Iterable[int]) -> Pattern:
    """All queries see the keys at the given positions.

    The vertical lines of MInference, Jiang et al., https://arxiv.org/abs/2407.02490, section 3; its vertical-slash
    heads are ``causal() & (columns(...) | diagonals(...))``.

    Args:
        positions: positions of the keys, in any order.

    Raises:
        TypeError: not ints.
        ValueError: a negative position, or no position.

    Example:
        >>> from sparseflash import patterns as P
        >>> (P.causal() & (P.columns([0, 2]) | P.diagonals([0]))).compile(4, block=16).to_dense().astype(int)
        array([[1, 0, 0, 0],
               [1, 1, 0, 0],
               [1, 0, 1, 0],
               [1, 0, 1, 1]])
    """
    return Columns(_lines("columns", "positions", positions, 0))


def diagonals(distances: Iterable[int]) -> Pattern:
    """Each query sees the keys at the given distances before it: ``q - k`` is one of them.

    The slash lines of MInference, Jiang et al., https://arxiv.org/abs/2407.02490, section 3.

    Args:
        distances: from the key to the query, in any order; negative ones lead to later keys.

    Raises:
        TypeError: not ints.
        ValueError: no distance, or one beyond 2**40.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.diagonals([0, 2]).compile(4, block=16).to_dense().astype(int)
        array([[1, 0, 0, 0],
               [0, 1, 0, 0],
               [1, 0, 1, 0],
               [0, 1, 0, 1]])
    """
    return Diagonals(_lines("diagonals", "distances", distances, -(1 << 40)))


def _lines(owner: str, name: str, values: Iterable[int], minimum: int) -> tuple[int, ...]:
    if not isinstance(values, Iterable) or isinstance(values, str | bytes):
        raise TypeError(f"{owner}: {name} must be ints such as (0, 64), got {values!r}")
    found = tuple(sorted({checked_int(owner, f"each of the {name}", value, minimum) for value in values}))
    if not found:
        raise ValueError(f"{owner}: give at least one of the {name}, got none")
    return found
