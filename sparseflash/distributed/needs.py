"""Which key blocks each rank needs: read from a mask and from who holds what."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sparseflash.distributed.dealing import Owners
from sparseflash.distributed.weighing import column_counts
from sparseflash.patterns.block_mask import BlockMask

Bools = NDArray[np.bool_]


def key_blocks(mask: BlockMask, row_owner: Owners, col_owner: Owners, split: Bools, ranks: int) -> Bools:
    """Which key blocks each rank computes with, bool [R, nK]: those its rows see, and its own that split rows see.

    Args:
        mask: of nQ x nK blocks.
        row_owner: which rank holds each block row, [nQ].
        col_owner: which rank holds each key block, [nK].
        split: block rows that every rank works on with the keys it holds, [nQ].
        ranks: R.
    """
    (nq, nk), runs = mask.grid_shape, mask.runs
    row, begin = runs.row % nq, runs.start - runs.row * nk
    whole = np.flatnonzero(~split[row])
    line = row_owner[row[whole]].astype(np.int64) * (nk + 1) + begin[whole]
    # A rank needs a column when more of its rows' runs began at or before it than ended there.
    steps = np.bincount(line, minlength=ranks * (nk + 1)) - np.bincount(
        line + runs.length[whole], minlength=ranks * (nk + 1)
    )
    needed: Bools = np.cumsum(steps.reshape(ranks, nk + 1), axis=1)[:, :nk] > 0
    needed[col_owner[seen := np.flatnonzero(column_counts(mask, split) > 0)], seen] = True
    # Attention without any key is no attention: a rank that needs none works with one of its own, which no row sees.
    _, first = np.unique(col_owner, return_index=True)
    idle = np.flatnonzero(~needed.any(axis=1))
    needed[idle, first[idle]] = True
    return needed
