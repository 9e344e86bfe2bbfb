"""Compile a pattern onto a grid of blocks.

Operators become operations on block masks. A leaf is compiled from its full runs and its candidates; of the
candidates, one block of each kind (equal keys) is evaluated token by token.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.block_mask import BlockMask, full_mask, stacked
from sparseflash.patterns.composed import Composed
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import And, Minus, Not, Or, Pattern, PerHead, PerSample
from sparseflash.patterns.progress import track
from sparseflash.patterns.runs import EMPTY, FULL, Runs
from sparseflash.patterns.tiles import Alphabet, Words, no_tiles, pack

# Token pairs evaluated at once: bounds memory (a predicate may hold several int64 arrays of this size).
PAIRS_AT_ONCE = 1 << 21


@lru_cache(maxsize=128)
def compile_with_advice(pattern: Pattern, grid: Grid) -> BlockMask:
    """The mask of a pattern, which remembers its text; a warning the first time where its blocks are poorly used."""
    from sparseflash.patterns.waste import WastefulPattern, advice

    mask = replace(compile_pattern(pattern, grid), expression=str(pattern))
    words = advice(pattern, mask)
    if words is not None:
        warnings.warn(words, WastefulPattern, stacklevel=3)
    return mask


@lru_cache(maxsize=128)
def compile_pattern(pattern: Pattern, grid: Grid) -> BlockMask:
    match pattern:
        case Or(left, right):
            return compile_pattern(left, grid) | compile_pattern(right, grid)
        case And(left, right):
            return compile_pattern(left, grid) & compile_pattern(right, grid)
        case Minus(left, right):
            return compile_pattern(left, grid) - compile_pattern(right, grid)
        case Not(inner):
            return ~compile_pattern(inner, grid)
        case PerHead(parts):
            return stacked([compile_pattern(part, grid) for part in parts], axis=1)
        case PerSample(parts):
            return stacked([compile_pattern(part, grid) for part in parts], axis=0)
        case Composed():
            return compile_pattern(pattern.expression(), grid)
        case _:
            return _compile_leaf(pattern.at(grid), grid)


def _compile_leaf(pattern: Pattern, grid: Grid) -> BlockMask:
    runs, tiles = _evaluate(pattern, grid)
    stretches = pattern.full_runs(grid)
    if stretches is None:
        return BlockMask.canonical(grid, runs, tiles)
    filled = Runs.from_intervals(grid.shape, *stretches, FULL)
    if not grid.ragged:
        both = runs.beside(filled)
        if both is not None:
            return BlockMask.canonical(grid, both, tiles)
    # The ragged last blocks of a full run are PARTIAL; the intersection puts their edge tiles in.
    filled_mask = BlockMask.canonical(grid, filled, no_tiles(grid.bq, grid.bk)) & full_mask(grid)
    return BlockMask.canonical(grid, runs, tiles) | filled_mask


def _evaluate(pattern: Pattern, grid: Grid) -> tuple[Runs, Words]:
    """Letters and tiles of the candidates, by looking at one block of each kind."""
    rows, cols = _candidates(pattern, grid)
    kind = _kinds(pattern, grid, rows, cols)
    if kind is None:
        first, kind = np.arange(rows.size), np.arange(rows.size)
    else:
        _, first, kind = np.unique(kind, return_index=True, return_inverse=True)
    alphabet = Alphabet(grid.bq, grid.bk)
    letters = np.full(first.size, EMPTY, np.int32)
    step = max(1, PAIRS_AT_ONCE // (grid.bq * grid.bk))
    for start in track(range(0, first.size, step), f"looking at {first.size:,} blocks for {pattern}"):
        chosen = first[start : start + step]
        letters[start : start + step] = _letters(pattern, grid, rows[chosen], cols[chosen], alphabet)
    return Runs.from_blocks(grid.shape, rows, cols, letters[kind]), alphabet.tiles()


def _candidates(pattern: Pattern, grid: Grid) -> tuple[Ints, Ints]:
    found = pattern.candidates(grid)
    if found is None:
        rows = np.repeat(grid.all_rows(), grid.cols)
        return rows, np.tile(np.arange(grid.cols, dtype=np.int64), grid.rows)
    return grid.unique(*found)


def _kinds(pattern: Pattern, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
    keys = pattern.keys(grid, rows, cols)
    if keys is None:
        return None
    if keys.shape != rows.shape:
        raise ValueError(f"{pattern}: keys must be one int a block, shape {rows.shape}, got {keys.shape}")
    ragged = 2 * ((rows + 1) * grid.bq > grid.q_len) + ((cols + 1) * grid.bk > grid.kv_len)
    _, compact = np.unique(keys, return_inverse=True)
    kinds: Ints = compact * 4 + ragged
    return kinds


def _letters(pattern: Pattern, grid: Grid, rows: Ints, cols: Ints, alphabet: Alphabet) -> NDArray[np.int32]:
    """Letters of blocks, evaluated token by token. Tokens past the lengths are never asked about."""
    words = pattern.tiles(grid, rows, cols)
    if words is not None:
        return alphabet.letters(words)
    i = rows[:, None] * grid.bq + np.arange(grid.bq)
    j = cols[:, None] * grid.bk + np.arange(grid.bk)
    q = np.minimum(i, grid.q_len - 1) + grid.q_offset
    k = np.minimum(j, grid.kv_len - 1)
    bits = pattern.allows(q[:, :, None], k[:, None, :])
    shape = (rows.size, grid.bq, grid.bk)
    if not isinstance(bits, np.ndarray | np.bool_) or bits.dtype != np.bool_:
        kind = getattr(bits, "dtype", type(bits).__name__)
        raise TypeError(f"{pattern}: allows must return a numpy array of booleans, got {kind}")
    try:
        bits = np.broadcast_to(bits, shape)
    except ValueError:
        raise ValueError(f"{pattern}: allows must return the broadcast shape {shape}, got {np.shape(bits)}") from None
    bits = bits & (i < grid.q_len)[:, :, None] & (j < grid.kv_len)[:, None, :]
    some, every = bits.any(axis=(1, 2)), bits.all(axis=(1, 2))
    letters = np.where(every, np.int32(FULL), np.int32(EMPTY))
    partial = some & ~every
    letters[partial] = alphabet.letters(pack(bits[partial]))
    return letters
