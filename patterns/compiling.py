"""Compile a pattern onto a grid of blocks.

Operators become operations on block masks. A leaf is compiled from its full runs and its candidates; of the
candidates, one block of each kind (equal keys) is evaluated token by token.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import is_dataclass, replace
from functools import lru_cache
from textwrap import shorten

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.composed import Composed
from sparseflash.patterns.evaluating import evaluate
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.keeping import MASKS
from sparseflash.patterns.memory import MAX_BYTES, MemoryBoundError, at_most, reserve
from sparseflash.patterns.pattern import And, Minus, Not, Or, Pattern, PerHead, PerSample
from sparseflash.patterns.runs import FULL, Runs
from sparseflash.patterns.set_operations import full_mask, stacked
from sparseflash.patterns.structure import MANY_BLOCKS, SlowScan, faster_form
from sparseflash.patterns.tiles import no_tiles
from sparseflash.patterns.waste import WastefulPattern, advice
from sparseflash.patterns.where import Where


def compiled(pattern: Pattern, grid: Grid, max_bytes: int = MAX_BYTES) -> BlockMask:
    """As :meth:`Pattern.compile`, on a grid that is there."""
    if not is_dataclass(pattern) or type(pattern).__hash__ is None:
        raise TypeError(f"{type(pattern).__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    return compile_with_advice(pattern, grid, max_bytes)


@MASKS.bounds
@lru_cache(maxsize=128)
def compile_with_advice(pattern: Pattern, grid: Grid, max_bytes: int = MAX_BYTES) -> BlockMask:
    """The mask of a pattern, which remembers its text; a warning the first time where its blocks are poorly used.

    Raises:
        ValueError: compiling would take more than ``max_bytes``, or a pattern that cannot have these lengths.
    """
    with at_most(max_bytes):
        mask = replace(compile_pattern(pattern, grid), expression=str(pattern))
    if os.environ.get("SPARSEFLASH_DEBUG") == "1":
        from sparseflash.patterns.self_check import check_sample

        check_sample(pattern, mask)
    words = advice(pattern, mask)
    if words is not None:
        warnings.warn(words, WastefulPattern, stacklevel=4)
    return mask


@MASKS.bounds
@lru_cache(maxsize=128)
def compile_pattern(pattern: Pattern, grid: Grid) -> BlockMask:
    match pattern:
        case Or(left, right):
            mask = compile_pattern(left, grid) | compile_pattern(right, grid)
        case And(left, right):
            mask = compile_pattern(left, grid) & compile_pattern(right, grid)
        case Minus(left, right):
            mask = compile_pattern(left, grid) - compile_pattern(right, grid)
        case Not(inner):
            mask = ~compile_pattern(inner, grid)
        case PerHead(parts):
            reserve(len(set(parts)) * grid.rows, 160)
            mask = stacked([compile_pattern(part, grid) for part in parts], axis=1)
        case PerSample(parts):
            reserve(len(set(parts)) * grid.rows, 160)
            mask = stacked([compile_pattern(part, grid) for part in parts], axis=0)
        case Composed():
            return compile_pattern(pattern.expression(), grid)
        case _:
            mask = _compile_leaf(pattern.at(grid), grid)
            if isinstance(pattern, Where) and grid.rows * grid.cols >= MANY_BLOCKS:
                looked = f"{pattern} was asked about all {grid.rows * grid.cols:,} blocks, O(N^2)"
                warnings.warn(f"{looked}; {faster_form(mask)}", SlowScan, stacklevel=2)
    MASKS.spend(mask.nbytes)
    return mask


def _compile_leaf(pattern: Pattern, grid: Grid) -> BlockMask:
    try:
        reserve(grid.rows, 160)
        runs, tiles = evaluate(pattern, grid)
        stretches = pattern.full_runs(grid)
    except MemoryBoundError as error:
        raise MemoryBoundError(f"{shorten(str(pattern), 200)} over {grid}: {error}") from None
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
