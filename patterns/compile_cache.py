"""A cache of compiled masks, for patterns and their parts."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import MASKS
from sparseflash.patterns.grid import Grid

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern


@MASKS.bounds
@lru_cache(maxsize=128)
def compile_pattern(pattern: Pattern, grid: Grid) -> BlockMask:
    """The mask of a pattern, without its text and without advice. Operators compile their operands with it."""
    mask = pattern.compile_on(grid)
    MASKS.spend(mask.nbytes)
    return mask
