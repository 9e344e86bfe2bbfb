"""Advice on patterns whose masks waste blocks, and on predicates that could compile faster."""

from __future__ import annotations

from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np

from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.tiles import TILES_AT_ONCE, tile_table, unpack

if TYPE_CHECKING:
    from sparseflash.patterns.pattern import Pattern

SHORTEST = 8192  # tokens; below, even dense attention is quick
DENSE_FROM = 0.25  # share of all blocks above which skipping the others gains little
EXCESS = 4  # stored pairs per allowed pair that deserve advice
EXCESS_ASKED = 2  # the same, if the user asked for the cost
MANY_BLOCKS = 1 << 16  # a scan of fewer takes seconds at most


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


class SlowScan(UserWarning):
    """A predicate was evaluated for every pair of a long sequence.

    Example:
        >>> import warnings
        >>> from sparseflash import patterns as P
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", P.SlowScan)
        ...     P.where(lambda q, k: q == k).compile(4096, block=16).nnz
        256
    """


def advice(pattern: Pattern, mask: MaskData, *, asked: bool = False) -> str | None:
    """A sentence with both densities and the pattern to use instead; None if the blocks are well used.

    Args:
        pattern: the pattern.
        mask: its compiled mask.
        asked: whether the user asked for the cost. Then smaller savings are mentioned too, with the pattern to use.

    Example:
        >>> from sparseflash import patterns as P
        >>> advice(P.strided(4, unit=128), P.strided(4, unit=128).compile(8192)) is None
        True
    """
    excess = EXCESS_ASKED if asked else EXCESS
    if min(mask.shape) < SHORTEST or mask.density < excess * mask.token_density:
        return None
    wasteful = mask.density >= max(DENSE_FROM, EXCESS * mask.token_density)
    if not (wasteful or asked):
        return None
    cost = (
        f"{shorten(str(pattern), 200)} stores {mask.density:.1%} of the blocks of {mask.block[0]} x {mask.block[1]} "
        f"tokens for {mask.token_density:.2%} of the pairs, and attention takes time for blocks"
    )
    mended = pattern.coarser(max(mask.block))
    if mended == pattern:
        if not wasteful:
            return None
        return f"{cost}. Patterns whose allowed keys lie together, in stretches of a block or more, cost less"
    density = compile_pattern(mended, mask.grid).density
    if density > mask.density / 2:
        return cost if wasteful else None
    tokens = ", of tokens put in that order (sparseflash.ordering)" if mended.orders_tokens else ""
    return f"{cost}. {shorten(str(mended), 200)} would store {density:.1%}{tokens}"


def faster_form(mask: MaskData) -> str:
    """Advice on a faster form of a mask that was given as a predicate, from its structure.

    Args:
        mask: the result of a scan, without heads.

    Example:
        >>> from sparseflash import patterns as P
        >>> faster_form(P.where(lambda q, k: abs(q - k) < 40).compile(512, block=32))
        'it depends on q - k alone: a Pattern subclass with keys k_start - q_start looks at one block a diagonal'
    """
    found = []
    if _depends_on_difference(mask):
        found.append(
            "it depends on q - k alone: a Pattern subclass with keys k_start - q_start looks at one block a diagonal"
        )
    cell = _cell(mask)
    if cell > 1:
        found.append(
            f"it is constant in cells of {cell} tokens: from_blocks(array, unit={cell}) takes one boolean a cell"
        )
    if mask.density < 1 / 8:
        found.append(
            f"it stores {mask.density:.1%} of the blocks: a Pattern subclass with candidates(grid) looks at those alone"
        )
    return "; ".join(found) or "no structure was found that would spare looking at every block"


def _depends_on_difference(mask: MaskData) -> bool:
    """Whether the mask is constant along diagonals, in blocks and in tokens, and not empty."""
    grid = mask.grid
    if grid.bq != grid.bk or not mask.nnz:
        return False
    rows, cols = grid.q_len // grid.bq, grid.kv_len // grid.bk  # whole blocks
    if min(rows, cols) < 2:
        return False
    runs = mask.runs
    for row in range(rows - 1):
        here = runs.code_at(row * grid.cols + np.arange(cols - 1))
        after = runs.code_at((row + 1) * grid.cols + np.arange(1, cols))
        if not np.array_equal(here, after):
            return False
    diagonals = np.arange(1 - rows, cols)  # of blocks, by column - row
    codes = runs.code_at(np.maximum(-diagonals, 0) * grid.cols + np.maximum(diagonals, 0))
    words = tile_table(mask.tiles, grid.bq, grid.bk)
    below = above = np.empty((0, 0), bool)
    for begin in range(0, codes.size, TILES_AT_ONCE):
        bits = unpack(words[codes[begin : begin + TILES_AT_ONCE]], grid.bk)
        if (bits[:, 1:, 1:] != bits[:, :-1, :-1]).any():
            return False
        # The part of a block above its diagonal continues below the diagonal of the next block.
        below = np.concatenate([below[-1:], bits[:, :0:-1, 0]]) if below.size else bits[:, :0:-1, 0]
        above = np.concatenate([above[-1:], bits[:, 0, 1:]]) if above.size else bits[:, 0, 1:]
        if (above[:-1] != below[1:]).any():
            return False
    return True


def _cell(mask: MaskData) -> int:
    """The largest power of two such that aligned cells of that many tokens are allowed entirely or not at all."""
    grid = mask.grid
    size = min(grid.bq, grid.bk)
    if grid.q_offset % size or grid.ragged:
        return 1
    for begin in range(0, len(mask.tiles), TILES_AT_ONCE):
        bits = unpack(mask.tiles[begin : begin + TILES_AT_ONCE], grid.bk)
        while size > 1:
            cells = bits.reshape(len(bits), grid.bq // size, size, grid.bk // size, size)
            if (cells == cells[:, :, :1, :, :1]).all():
                break
            size //= 2
    return size
