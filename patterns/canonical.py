"""The canonical form, in which equal masks have equal bytes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.grid import Grid
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL, Runs
from sparseflash.patterns.tiles import TileSet, Words


def canonical(
    grid: Grid, runs: Runs, tiles: Words, pattern_of: NDArray[np.int32] | None
) -> tuple[Runs, Words, NDArray[np.int32]]:
    """Joined runs, distinct tiles in order of first use, and distinct patterns in order of first use."""
    numbered, distinct = TileSet(grid.bq, grid.bk).numbered(tiles)
    codes = np.concatenate([np.array([EMPTY, FULL], np.int32), numbered])
    runs = runs.mapped(codes).merged()
    if pattern_of is None:
        pattern_of = np.zeros((1, 1), np.int32)
    runs, pattern_of = _distinct_patterns(runs, pattern_of, grid.rows)
    # Number tiles by first use, row by row.
    met = np.full(int(codes.max()) + 1, len(runs), np.int64)
    met[runs.code[::-1]] = np.arange(len(runs))[::-1]
    met[:FIRST_TILE] = [-2, -1]
    by_first = np.argsort(met, kind="stable")
    used = by_first[met[by_first] < len(runs)]
    number = np.zeros(met.size, np.int32)
    number[used] = np.arange(used.size)
    chosen = distinct[used[FIRST_TILE:] - FIRST_TILE]
    kept = tiles if np.array_equal(chosen, np.arange(len(tiles))) else tiles[chosen]
    return runs.mapped(number), kept, pattern_of.copy()


def _distinct_patterns(runs: Runs, pattern_of: NDArray[np.int32], rows: int) -> tuple[Runs, NDArray[np.int32]]:
    """Merge equal patterns, drop unused ones and number them in the order of ``pattern_of``."""
    count = runs.shape[0] // rows
    if count == 1:
        return runs, np.zeros_like(pattern_of, np.int32)
    bounds = np.searchsorted(runs.row, np.arange(count + 1) * rows)
    seen: dict[bytes, int] = {}
    number: dict[int, int] = {}
    kept: list[int] = []
    for p in pattern_of.ravel().tolist():
        if p in number:
            continue
        part = slice(bounds[p], bounds[p + 1])
        base = p * rows * runs.shape[1]
        content = b"".join(x.tobytes() for x in (runs.start[part] - base, runs.stop[part] - base, runs.code[part]))
        if content not in seen:
            seen[content] = len(kept)
            kept.append(p)
        number[p] = seen[content]
    new = np.array([number[p] for p in pattern_of.ravel().tolist()], np.int32).reshape(pattern_of.shape)
    return gather(runs, np.array(kept, np.int64), rows), new


def gather(runs: Runs, patterns: NDArray[np.int64], rows: int) -> Runs:
    """The matrices of these patterns, stacked; each has ``rows`` rows."""
    if patterns.size * rows == runs.shape[0] and np.array_equal(patterns, np.arange(patterns.size)):
        return runs
    return runs.select_rows((patterns[:, None] * rows + np.arange(rows)).ravel())
