"""The steps of :meth:`Pattern.compile` on a grid: limit the memory, cache, check, advise."""

from __future__ import annotations

import os
import warnings
from dataclasses import is_dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from sparseflash.patterns.advice import WastefulPattern, advice
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import MASKS
from sparseflash.patterns.comparison import compare_sample
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.memory import MAX_BYTES, at_most
from sparseflash.patterns.placed_image import in_order

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern


def compiled(pattern: Pattern, grid: Grid, max_bytes: int = MAX_BYTES) -> BlockMask:
    """Like :meth:`Pattern.compile`, for a given grid."""
    if not is_dataclass(pattern) or type(pattern).__hash__ is None:
        raise TypeError(f"{type(pattern).__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    return compile_with_advice(pattern, grid, max_bytes)


@MASKS.bounds
@lru_cache(maxsize=128)
def compile_with_advice(pattern: Pattern, grid: Grid, max_bytes: int = MAX_BYTES) -> BlockMask:
    """The mask of a pattern with its text. Warns the first time if blocks are nearly empty.

    Raises:
        ValueError: compiling would take more than ``max_bytes``, or a pattern that cannot have these lengths.
    """
    with at_most(max_bytes):
        mask = replace(
            compile_pattern(pattern, grid), expression=str(pattern), images=in_order(pattern.placed_images())
        )
    if os.environ.get("SPARSEFLASH_DEBUG") == "1":
        compare_sample(pattern, mask)
    words = advice(pattern, mask)
    if words is not None:
        warnings.warn(words, WastefulPattern, stacklevel=4)
    return mask
