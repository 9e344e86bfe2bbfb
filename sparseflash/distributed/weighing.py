"""What the rows of a mask weigh, and which of them are worked on by every rank.

A row with global tokens sees keys of all ranks. On one rank it would be what all others wait for, and this rank would
have to receive every key. Such a row is *split*: its queries travel instead, every rank works on them with the keys it
holds, and the partial results are merged by lse where the queries are at home.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.intervals import Ints

# A row is split when it is far above the mean row and a noticeable part of a rank's work, and when the key blocks it
# sees are more than what its queries and partial results cost on their way to every rank and back.
FAR_ABOVE = 2
NOTICEABLE = 1 / 50
BLOCKS_A_RANK = 4


def split_rows(mask: BlockMask, ranks: int) -> NDArray[np.bool_]:
    """Which block rows every rank works on, bool [nQ].

    Example:
        >>> from sparseflash import patterns as P
        >>> split_rows((P.local(100) | P.global_tokens(1)).compile(8192), ranks=4).nonzero()[0].tolist()
        [0]
        >>> split_rows(P.causal().compile(8192), ranks=4).any()
        np.False_
    """
    weight = row_weights(mask)
    least = max(FAR_ABOVE * weight.mean(), NOTICEABLE * weight.sum() / ranks, BLOCKS_A_RANK * ranks)
    split: NDArray[np.bool_] = weight > least
    return split & (ranks > 1)


def row_weights(mask: BlockMask) -> NDArray[np.float64]:
    """Stored blocks of each block row, the mean over heads and samples, [nQ]."""
    shares = np.bincount(mask.pattern_of.ravel(), minlength=mask.patterns) / mask.pattern_of.size
    weight: NDArray[np.float64] = shares @ mask.row_counts
    return weight


def cell_weights(mask: BlockMask, ranks: int, cell: int, square: bool) -> Ints:
    """Work that comes with each cell of queries, int64 [cells].

    A split row is worked on where its keys are: in self-attention its blocks count for the cells of their columns.
    """
    split = split_rows(mask, ranks)
    weight = _summed(np.where(split, 0, row_weights(mask)), cell // mask.block[0])
    if square and split.any():
        weight += _summed(column_counts(mask, split), cell // mask.block[1])
    return np.rint(weight * mask.pattern_of.size).astype(np.int64)


def column_counts(mask: BlockMask, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Blocks of some block rows in each block column, the mean over heads and samples, [nK]."""
    (nq, nk), runs = mask.grid_shape, mask.runs
    uses = np.bincount(mask.pattern_of.ravel(), minlength=mask.patterns) / mask.pattern_of.size
    some = np.flatnonzero(rows[runs.row % nq])
    begin = runs.start[some] - runs.row[some] * nk
    often = uses[runs.row[some] // nq]
    end = begin + runs.length[some]
    steps = np.bincount(begin, often, nk + 1) - np.bincount(end, often, nk + 1)
    counts: NDArray[np.float64] = np.cumsum(steps)[:nk]
    return counts


def _summed(values: NDArray[np.float64], each: int) -> NDArray[np.float64]:
    """Sums of so many neighbours each; the last may have fewer."""
    sums: NDArray[np.float64] = np.add.reduceat(values, np.arange(0, values.size, each))
    return sums
