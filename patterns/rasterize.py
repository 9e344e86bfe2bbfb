"""A leaf compiled onto a grid, from its full runs and its candidates.

Of candidates with equal keys, one is evaluated token by token. All candidates are in memory at once, which is linear in
the result. A pattern without candidates is scanned a few block rows at a time, so that memory is independent of the
number of evaluated blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.memory import MemoryBoundError, reserve
from sparseflash.patterns.progress import track
from sparseflash.patterns.runs import EMPTY, FULL, Runs, distinct
from sparseflash.patterns.set_operations import full_mask, intersection, union
from sparseflash.patterns.tiles import TileSet, Words, no_tiles, pack

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern

# Token pairs evaluated at once: bounds memory (a predicate may hold several int64 arrays of this size).
PAIRS_AT_ONCE = 1 << 21
# Blocks of a scan whose keys are compared at once.
BLOCKS_AT_ONCE = 1 << 17


def compile_leaf(pattern: Pattern, grid: Grid) -> MaskData:
    """The mask of a leaf, a pattern that is not an operator.

    Raises:
        MemoryBoundError: compiling would exceed the limit on its memory.
    """
    try:
        reserve(grid.rows, 160)
        runs, tiles = rasterize(pattern, grid)
        stretches = pattern.full_runs(grid)
    except MemoryBoundError as error:
        raise MemoryBoundError(f"{shorten(str(pattern), 200)} over {grid}: {error}") from None
    if stretches is None:
        return MaskData.canonical(grid, runs, tiles)
    filled = Runs.from_intervals(grid.shape, *stretches, FULL)
    if not grid.ragged:
        both = runs.beside(filled)
        if both is not None:
            return MaskData.canonical(grid, both, tiles)
    # In full runs, ragged last blocks are PARTIAL; the intersection with the full mask inserts their tiles.
    filled_mask = intersection(MaskData.canonical(grid, filled, no_tiles(grid.bq, grid.bk)), full_mask(grid))
    return union(MaskData.canonical(grid, runs, tiles), filled_mask)


def rasterize(pattern: Pattern, grid: Grid) -> tuple[Runs, Words]:
    """Runs of block codes, and the tiles of codes from 2 on."""
    tile_set = TileSet(grid.bq, grid.bk)
    found = pattern.candidates(grid)
    if found is not None:
        rows, cols = _existing(pattern, grid, *found)
        codes = _codes(pattern, grid, rows, cols, tile_set, progress=True)
        return Runs.from_blocks(grid.shape, rows, cols, codes), tile_set.tiles()
    parts = []
    for rows, cols in _scan(pattern, grid):
        codes = _codes(pattern, grid, rows, cols, tile_set, progress=False)
        parts.append(Runs.from_blocks(grid.shape, rows, cols, codes))
    start, stop, code = (np.concatenate([getattr(p, name) for p in parts]) for name in ("start", "stop", "code"))
    return Runs(grid.shape, start, stop, code), tile_set.tiles()


def _existing(pattern: Pattern, grid: Grid, rows: Ints, cols: Ints) -> tuple[Ints, Ints]:
    """Sorted distinct candidates inside the grid; a superset may leave it."""
    rows, cols = _ints(pattern, "candidates", rows), _ints(pattern, "candidates", cols)
    if rows.ndim != 1 or rows.shape != cols.shape:
        raise ValueError(
            f"{pattern}: candidates must be rows and columns of equal length, got {rows.shape}, {cols.shape}"
        )
    inside = (rows >= 0) & (rows < grid.rows) & (cols >= 0) & (cols < grid.cols)
    if not inside.all():
        rows, cols = rows[inside], cols[inside]
    return grid.unique(rows, cols)


def _ints(pattern: Pattern, method: str, values: Any) -> Ints:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{pattern}: {method} must give ints, got {array.dtype}")
    return array.astype(np.int64, copy=False)


def _scan(pattern: Pattern, grid: Grid) -> Iterator[tuple[Ints, Ints]]:
    """Every block, a few rows at a time."""
    zero = np.zeros(1, np.int64)
    keyed = pattern.keys(grid, zero, zero) is not None
    at_once = BLOCKS_AT_ONCE if keyed else _evaluated_at_once(grid)
    step = max(1, at_once // grid.cols)
    every_col = np.arange(grid.cols, dtype=np.int64)
    blocks = grid.rows * grid.cols
    for start in track(range(0, grid.rows, step), f"looking at {blocks:,} blocks for {pattern}"):
        rows = np.arange(start, min(start + step, grid.rows), dtype=np.int64)
        yield np.repeat(rows, grid.cols), np.tile(every_col, rows.size)


def _evaluated_at_once(grid: Grid) -> int:
    return max(1, PAIRS_AT_ONCE // (grid.bq * grid.bk))


def _codes(
    pattern: Pattern, grid: Grid, rows: Ints, cols: Ints, tile_set: TileSet, *, progress: bool
) -> NDArray[np.int32]:
    """Codes of blocks; of blocks with equal keys, only the first is evaluated."""
    kind = _kinds(pattern, grid, rows, cols)
    if kind is None:
        first = np.arange(rows.size)
    else:
        kinds, kind = distinct(kind)
        first = np.empty(kinds.size, np.int64)
        first[kind[::-1]] = np.arange(rows.size)[::-1]
    codes = np.full(first.size, EMPTY, np.int32)
    step = _evaluated_at_once(grid)
    steps = range(0, first.size, step)
    for start in track(steps, f"looking at {first.size:,} blocks for {pattern}") if progress else steps:
        chosen = first[start : start + step]
        codes[start : start + step] = evaluated(pattern, grid, rows[chosen], cols[chosen], tile_set)
    return codes if kind is None else codes[kind]


def _kinds(pattern: Pattern, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
    found = pattern.keys(grid, rows, cols)
    if found is None:
        return None
    keys = _ints(pattern, "keys", found)
    if keys.shape != rows.shape:
        raise ValueError(f"{pattern}: keys must be one int per block, shape {rows.shape}, got {keys.shape}")
    if not grid.ragged:
        return keys
    ragged = 2 * ((rows + 1) * grid.bq > grid.q_len) + ((cols + 1) * grid.bk > grid.kv_len)
    _, compact = distinct(keys)
    kinds: Ints = compact * 4 + ragged
    return kinds


def evaluated(pattern: Pattern, grid: Grid, rows: Ints, cols: Ints, tile_set: TileSet) -> NDArray[np.int32]:
    """Codes of blocks, evaluated token by token; ``allows`` never gets positions past the lengths."""
    words = pattern.tiles(grid, rows, cols)
    if words is not None:
        return tile_set.codes(words)
    i = rows[:, None] * grid.bq + np.arange(grid.bq)
    j = cols[:, None] * grid.bk + np.arange(grid.bk)
    q = np.minimum(i, grid.q_len - 1) + grid.q_offset
    k = np.minimum(j, grid.kv_len - 1)
    bits = _truth(pattern, q[:, :, None], k[:, None, :], (rows.size, grid.bq, grid.bk))
    q_in, k_in = i < grid.q_len, j < grid.kv_len
    if not (q_in.all() and k_in.all()):
        bits = bits & q_in[:, :, None] & k_in[:, None, :]
    return tile_set.codes(pack(bits))


def _truth(pattern: Pattern, q: Ints, k: Ints, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    bits = pattern.allows(q, k)
    if not isinstance(bits, np.ndarray | np.bool_) or bits.dtype != np.bool_:
        kind = getattr(bits, "dtype", type(bits).__name__)
        raise TypeError(f"{pattern} must give booleans for arrays of positions, got {kind}; compare, or cast to bool")
    try:
        if bits.ndim in (0, len(shape)):
            return np.broadcast_to(bits, shape)
    except ValueError:
        pass
    raise ValueError(f"{pattern} must give the broadcast shape of its positions, {shape}, got {bits.shape}")
