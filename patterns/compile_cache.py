"""Masks of patterns and of their parts, kept for when they are needed again."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.keeping import MASKS

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern


@MASKS.bounds
@lru_cache(maxsize=128)
def compile_pattern(pattern: Pattern, grid: Grid) -> BlockMask:
    """The mask of a pattern, without its text and without advice; operators find their operands here."""
    mask = pattern.compile_on(grid)
    MASKS.spend(mask.nbytes)
    return mask
