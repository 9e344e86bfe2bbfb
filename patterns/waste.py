"""Advice for patterns that touch far more blocks than their tokens need."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.mask_data import MaskData

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern

SHORTEST = 8192  # tokens; below, even dense attention is quick
DENSE_FROM = 0.25  # share of all blocks from which skipping the others gains little
EXCESS = 4  # stored tokens for each allowed pair that are worth a word


class WastefulPattern(UserWarning):
    """A mask stores many blocks that are nearly empty.

    Example:
        >>> import warnings
        >>> from sparseflash import patterns as P
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", P.WastefulPattern)  # known, and wanted
        ...     P.strided(7).compile(8192).density
        1.0
    """


def advice(pattern: Pattern, mask: MaskData) -> str | None:
    """A sentence that names both densities and what would mend them, or None where the blocks are well used.

    Args:
        pattern: what was compiled.
        mask: what came of it.

    Example:
        >>> from sparseflash import patterns as P
        >>> advice(P.strided(4, unit=128), P.strided(4, unit=128).compile(8192)) is None
        True
    """
    if min(mask.shape) < SHORTEST or mask.density < DENSE_FROM or mask.density < EXCESS * mask.token_density:
        return None
    cost = (
        f"{shorten(str(pattern), 200)} stores {mask.density:.1%} of the blocks of {mask.block[0]} x {mask.block[1]} "
        f"tokens for {mask.token_density:.2%} of the pairs, and attention takes time for blocks"
    )
    mended = pattern.coarser(max(mask.block))
    if mended == pattern:
        return f"{cost}. Patterns whose allowed keys lie together, in stretches of a block or more, cost less"
    density = compile_pattern(mended, mask.grid).density
    if density > mask.density / 2:
        return cost
    tokens = ", of tokens put in that order (sparseflash.ordering)" if mended.orders_tokens else ""
    return f"{cost}. {shorten(str(mended), 200)} would store {density:.1%}{tokens}"
