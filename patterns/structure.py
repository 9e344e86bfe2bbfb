"""What a scanned mask turned out to be, and how to write it so that it compiles in the size of its answer."""

from __future__ import annotations

import numpy as np

from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.tiles import TILES_AT_ONCE, all_letters, unpack

MANY_BLOCKS = 1 << 16  # a scan of fewer takes seconds at most


class SlowScan(UserWarning):
    """A predicate was asked about every pair of a long sequence.

    Example:
        >>> import warnings
        >>> from sparseflash import patterns as P
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore", P.SlowScan)
        ...     P.where(lambda q, k: q == k).compile(4096, block=16).nnz
        256
    """


def faster_form(mask: MaskData) -> str:
    """The structure found in a mask, as advice to whoever wrote it as a predicate.

    Args:
        mask: what a scan gave; without heads.

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
    """Whether blocks, and inside them pairs, at equal distance from the diagonal are equal, and some are stored."""
    grid = mask.grid
    if grid.bq != grid.bk or not mask.nnz:
        return False
    rows, cols = grid.q_len // grid.bq, grid.kv_len // grid.bk  # whole blocks
    if min(rows, cols) < 2:
        return False
    runs = mask.runs
    for row in range(rows - 1):
        here = runs.letter_at(row * grid.cols + np.arange(cols - 1))
        after = runs.letter_at((row + 1) * grid.cols + np.arange(1, cols))
        if not np.array_equal(here, after):
            return False
    diagonals = np.arange(1 - rows, cols)  # of blocks, by column - row
    letters = runs.letter_at(np.maximum(-diagonals, 0) * grid.cols + np.maximum(diagonals, 0))
    words = all_letters(mask.tiles, grid.bq, grid.bk)
    below = above = np.empty((0, 0), bool)
    for begin in range(0, letters.size, TILES_AT_ONCE):
        bits = unpack(words[letters[begin : begin + TILES_AT_ONCE]], grid.bk)
        if (bits[:, 1:, 1:] != bits[:, :-1, :-1]).any():
            return False
        # What a block holds above its diagonal goes on below the diagonal of the next one.
        below = np.concatenate([below[-1:], bits[:, :0:-1, 0]]) if below.size else bits[:, :0:-1, 0]
        above = np.concatenate([above[-1:], bits[:, 0, 1:]]) if above.size else bits[:, 0, 1:]
        if (above[:-1] != below[1:]).any():
            return False
    return True


def _cell(mask: MaskData) -> int:
    """Largest power of two such that aligned cells of so many tokens are allowed or not as a whole."""
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
