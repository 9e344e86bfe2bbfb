"""Set operations on masks: the full mask, unions and differences, and stacks of one mask per head or sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from sparseflash.patterns.cache_budget import MASKS
from sparseflash.patterns.canonical import gather
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.overlay import overlay
from sparseflash.patterns.overlay import transposed as transposed_runs
from sparseflash.patterns.runs import FIRST_TILE, FULL, Runs
from sparseflash.patterns.tiles import pack, tile_table, unpack


@MASKS.bounds
@lru_cache(maxsize=64)
def full_mask(grid: Grid) -> MaskData:
    """The mask that allows everything. Ragged last blocks are PARTIAL: bits past the lengths are 0."""
    (nq, nk), bq, bk = grid.shape, grid.bq, grid.bk
    q_left, k_left = grid.q_len - (nq - 1) * bq, grid.kv_len - (nk - 1) * bk  # tokens in the last block row / column

    bits = np.zeros((3, bq, bk), bool)
    bits[0, :, :k_left] = bits[1, :q_left, :] = bits[2, :q_left, :k_left] = True
    right, bottom, corner = FIRST_TILE, FIRST_TILE + 1, FIRST_TILE + 2
    start = np.arange(nq, dtype=np.int64) * nk
    starts = np.stack([start, start + nk - 1], axis=1).ravel()
    stops = np.stack([start + nk - 1, start + nk], axis=1).ravel()
    codes = np.tile(np.array([FULL, right], np.int32), nq)
    codes[-2:] = bottom, corner
    some = starts < stops
    runs = Runs((nq, nk), starts[some], stops[some], codes[some])
    mask = MaskData.canonical(grid, runs, pack(bits))
    MASKS.spend(mask.nbytes)
    return mask


def stacked(masks: Sequence[MaskData], axis: int) -> MaskData:
    """One mask for each sample (axis 0) or each head (axis 1).

    Raises:
        ValueError: operands for different numbers of heads.
    """
    base = masks[0]
    rows = patterns = tiles = 0
    pattern_of, starts, stops, codes = [], [], [], []
    for mask in masks:
        pattern_of.append(mask.pattern_of + patterns)
        starts.append(mask.runs.start + rows * base.runs.shape[1])
        stops.append(mask.runs.stop + rows * base.runs.shape[1])
        codes.append(np.where(mask.runs.code >= FIRST_TILE, mask.runs.code + tiles, mask.runs.code))
        rows, patterns, tiles = rows + mask.runs.shape[0], patterns + mask.patterns, tiles + len(mask.tiles)
    other = 1 - axis
    size = max(p.shape[other] for p in pattern_of)
    if any(p.shape[other] not in (1, size) for p in pattern_of):
        raise ValueError(f"samples must agree in their heads, got {[p.shape[other] for p in pattern_of]}")
    runs = Runs(
        (rows, base.runs.shape[1]),
        np.concatenate(starts),
        np.concatenate(stops),
        np.concatenate(codes).astype(np.int32),
    )
    spread = [np.repeat(p, size, axis=other) if p.shape[other] != size else p for p in pattern_of]
    return MaskData.canonical(
        base.grid,
        runs,
        np.concatenate([mask.tiles for mask in masks]),
        np.concatenate(spread, axis=axis).astype(np.int32),
    )


def union(a: MaskData, b: MaskData) -> MaskData:
    """Pairs allowed by either mask; raises like :func:`combine`."""
    return combine(a, b, np.bitwise_or)


def intersection(a: MaskData, b: MaskData) -> MaskData:
    """Pairs allowed by both masks; raises like :func:`combine`."""
    return combine(a, b, np.bitwise_and)


def difference(a: MaskData, b: MaskData) -> MaskData:
    """Pairs allowed by the first mask only; raises like :func:`combine`."""
    return combine(a, b, lambda of_a, of_b: of_a & ~of_b)


def transposed(mask: MaskData) -> MaskData:
    """The mask with queries and keys exchanged."""
    tiles = np.ascontiguousarray(unpack(mask.tiles, mask.block[1]).swapaxes(1, 2))
    g = mask.grid
    grid = Grid(g.kv_len, g.q_len, g.bk, g.bq, -g.q_offset)
    return MaskData.canonical(grid, transposed_runs(mask.runs, mask.patterns), pack(tiles), mask.pattern_of)


def combine(a: MaskData, b: MaskData, operation: Callable[[Any, Any], Any]) -> MaskData:
    """The mask whose tiles are ``operation(words of a, words of b)``, block by block.

    Raises:
        ValueError: masks for other lengths, blocks, offsets, samples or heads.
    """
    if a.grid != b.grid:
        raise ValueError(f"masks combine when lengths, blocks and offsets are equal; got {a.grid} and {b.grid}")
    try:
        leading = np.broadcast_shapes(a.pattern_of.shape, b.pattern_of.shape)
    except ValueError:
        raise ValueError(
            f"masks for [samples, heads] {a.pattern_of.shape} and {b.pattern_of.shape} do not combine"
        ) from None
    pair = np.broadcast_to(a.pattern_of, leading).astype(np.int64) * b.patterns + np.broadcast_to(b.pattern_of, leading)
    pairs, pattern_of = np.unique(pair, return_inverse=True)
    runs, codes_a, codes_b = overlay(
        gather(a.runs, pairs // b.patterns, a.grid_shape[0]), gather(b.runs, pairs % b.patterns, b.grid_shape[0])
    )
    words = operation(tile_table(a.tiles, *a.block)[codes_a], tile_table(b.tiles, *b.block)[codes_b])
    # Pair p becomes code p + 2 here; the canonical form turns empty and full tiles into codes 0 and 1.
    runs = Runs(runs.shape, runs.start, runs.stop, runs.code + np.int32(FIRST_TILE))
    return MaskData.canonical(a.grid, runs, words, pattern_of.reshape(leading).astype(np.int32))
