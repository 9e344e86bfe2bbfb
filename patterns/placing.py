"""Placing the mask of a pattern in a longer row."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np

from sparseflash.patterns.grid import Grid
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.overlay import overlay
from sparseflash.patterns.runs import FIRST_TILE, Runs
from sparseflash.patterns.tiles import TILES_AT_ONCE, pack, tile_table, unpack


class Stretch(NamedTuple):
    """The part of a grid within a range of positions."""

    grid: Grid  # queries and keys in the range, with positions counted from its start
    query: int  # index of the first of these queries in the whole grid
    key: int  # index of the first key

    @classmethod
    def of(cls, grid: Grid, start: int, stop: int) -> Stretch | None:
        """Positions [start, stop) of a grid; None without a query or without a key there."""
        first, last = max(grid.q_offset, start), min(grid.q_offset + grid.q_len, stop)
        keys = min(grid.kv_len, stop) - start
        if first >= last or keys < 1:
            return None
        return cls(Grid(last - first, keys, grid.bq, grid.bk, first - start), first - grid.q_offset, start)


def placed(mask: MaskData, grid: Grid, query: int, key: int) -> MaskData:
    """The mask on a larger grid with its first query and key at these indices, and nothing around it.

    If the offset is not a multiple of the block, a block of the result overlaps up to four blocks of the mask. Four
    copies of the matrix of codes, moved by whole blocks and overlaid, give every combination that occurs. Each makes
    one tile. The cost is linear in the runs and the distinct combinations.
    """
    (bq, bk), table = mask.block, tile_table(mask.tiles, *mask.block)
    corners = list(product(_parts(query, bq), _parts(key, bk)))
    reserve(len(mask.runs) * len(corners), 120)
    (down, _, _), (right, _, _) = corners[0]
    joint = _moved(mask, grid, down, right)
    if len(corners) == 1:
        return MaskData.canonical(grid, joint, mask.tiles, mask.pattern_of)
    codes = np.arange(len(table))[:, None]  # [n, corners]: the combination of each code of `joint`
    for (down, _, _), (right, _, _) in corners[1:]:
        runs, number, code = overlay(joint, _moved(mask, grid, down, right))
        codes = np.pad(np.column_stack([codes[number], code]), ((1, 0), (0, 0)))
        joint = Runs(runs.shape, runs.start, runs.stop, runs.code + 1)
    codes = codes[1:]
    reserve(len(codes), bq * table.shape[2] * 4)
    words = np.empty((len(codes), *table.shape[1:]), np.uint32)
    for begin in range(0, len(codes), TILES_AT_ONCE):
        some = codes[begin : begin + TILES_AT_ONCE]
        bits = np.empty((len(some), bq, bk), bool)
        for corner, ((_, q_to, q_from), (_, k_to, k_from)) in enumerate(corners):
            bits[:, q_to, k_to] = unpack(table[some[:, corner]], bk)[:, q_from, k_from]
        words[begin : begin + TILES_AT_ONCE] = pack(bits)
    joint = Runs(joint.shape, joint.start, joint.stop, joint.code + np.int32(FIRST_TILE - 1))
    return MaskData.canonical(grid, joint, words, mask.pattern_of)


def _parts(index: int, size: int) -> list[tuple[int, slice, slice]]:
    """The blocks that a moved block overlaps: distance in blocks, place in the block, and the overlapping part."""
    blocks, tokens = divmod(index, size)
    whole = (blocks, slice(tokens, size), slice(0, size - tokens))
    return [whole, (blocks + 1, slice(0, tokens), slice(size - tokens, size))] if tokens else [whole]


def _moved(mask: MaskData, grid: Grid, down: int, right: int) -> Runs:
    """The codes of each pattern, moved by whole blocks. Blocks that leave the grid hold no token of the mask."""
    rows, cols = grid.shape
    row, runs = mask.runs.row, mask.runs
    pattern, inside = np.divmod(row, mask.grid_shape[0])
    line = row * mask.grid_shape[1]
    start, stop = runs.start - line + right, np.minimum(runs.stop - line + right, cols)
    keep = np.flatnonzero((inside + down < rows) & (start < stop))
    moved = (pattern * rows + inside + down)[keep] * cols
    return Runs((mask.patterns * rows, cols), moved + start[keep], moved + stop[keep], runs.code[keep])
