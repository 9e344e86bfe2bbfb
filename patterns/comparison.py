"""Comparison of a compiled mask with ``allows``, which names the faulty method where they differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseflash.patterns.conversions import to_dense
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.runs import FIRST_TILE, FULL

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Bools, Pattern

SAMPLE = 4096  # pairs that compiling compares under SPARSEFLASH_DEBUG=1


def compare(pattern: Pattern, mask: MaskData) -> None:
    """Compare every pair of a compiled mask with ``allows``.

    Raises:
        ValueError: the first pair that differs.
    """
    grid = mask.grid
    q = np.arange(grid.q_len, dtype=np.int64)[:, None] + grid.q_offset
    k = np.arange(grid.kv_len, dtype=np.int64)[None, :]
    truth, dense = np.broadcast_arrays(_truth(pattern.at(grid), q, k), to_dense(mask))
    for where in np.argwhere(truth != dense)[:1].tolist():
        _refuse(pattern, grid, where[-2], where[-1], bool(truth[tuple(where)]))


def compare_sample(pattern: Pattern, mask: MaskData) -> None:
    """Compare a few thousand pairs of a compiled mask with ``allows``.

    Raises:
        ValueError: the first pair that differs.
    """
    grid = mask.grid
    draw = np.random.default_rng(0)
    i = draw.integers(0, grid.q_len, SAMPLE)
    # Half of the keys are drawn anywhere, half near the query.
    away = (draw.standard_normal(SAMPLE) * draw.choice([1, 30, 1000], SAMPLE)).round().astype(np.int64)
    near = np.clip(i + grid.q_offset + away, 0, grid.kv_len - 1)
    j = np.where(np.arange(SAMPLE) % 2, draw.integers(0, grid.kv_len, SAMPLE), near)
    truth, seen = np.broadcast_arrays(_truth(pattern.at(grid), i + grid.q_offset, j), _seen(mask, i, j))
    for where in np.argwhere(truth != seen)[:1].tolist():
        at = where[-1]
        _refuse(pattern, grid, int(i[at]), int(j[at]), bool(truth[tuple(where)]))


def _truth(pattern: Pattern, q: Ints, k: Ints) -> Bools:
    return np.asarray(pattern.allows(q, k), bool)


def _seen(mask: MaskData, i: Ints, j: Ints) -> Bools:
    """Truth of pairs [n] in the mask: [n], [heads, n] or [samples, heads or 1, n], as ``allows`` gives it."""
    (bq, bk), (rows, cols) = mask.block, mask.grid_shape
    found = []
    for p in range(mask.patterns):
        code = mask.runs.code_at((p * rows + i // bq) * cols + j // bk)
        tile = np.maximum(code - FIRST_TILE, 0)
        words = mask.tiles[tile, i % bq, j % bk // 32] if len(mask.tiles) else np.zeros(i.shape, np.uint32)
        bit = ((words >> (j % bk % 32).astype(np.uint32)) & 1).astype(bool)
        found.append((code == FULL) | ((code >= FIRST_TILE) & bit))
    every: Bools = np.stack(found)[mask.pattern_of]  # [samples, heads, n]
    samples, heads = mask.pattern_of.shape
    return every if samples > 1 else every[0] if heads > 1 else every[0, 0]


def _refuse(pattern: Pattern, grid: Grid, i: int, j: int, allowed: bool) -> None:
    row, col = i // grid.bq, j // grid.bk
    raise ValueError(
        f"{pattern} over {grid}: allows(q={i + grid.q_offset}, k={j}) is {allowed}, the compiled mask says otherwise; "
        f"{_blamed(pattern.at(grid), grid, row, col, allowed)}"
    )


def _blamed(pattern: Pattern, grid: Grid, row: int, col: int, allowed: bool) -> str:
    """The method that is probably wrong for a block."""
    block = f"block row {row}, block column {col}"
    stretches = pattern.full_runs(grid)
    if stretches is not None:
        rows, starts, stops = stretches
        if ((rows == row) & (starts <= col) & (col < stops)).any():
            return f"full_runs promises that all of {block} is allowed"
    found = pattern.candidates(grid)
    if allowed and found is not None and not ((np.asarray(found[0]) == row) & (np.asarray(found[1]) == col)).any():
        return f"candidates leaves out {block}"
    at = np.array([row], np.int64), np.array([col], np.int64)
    if pattern.tiles(grid, *at) is not None:
        return f"tiles gives other bits for {block}"
    if pattern.keys(grid, *at) is not None:
        return f"keys gives {block} the key of a block with other bits"
    return f"the pattern answers differently when asked about {block} again"
