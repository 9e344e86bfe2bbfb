"""The cheapest of the ways to deal a sequence by weight: equal work against foreign keys."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparseflash.distributed import dealing
from sparseflash.distributed.dealing import Owners
from sparseflash.distributed.needs import key_blocks
from sparseflash.distributed.weighing import cell_weights, split_rows
from sparseflash.patterns.block_mask import BlockMask

# What receiving a key block costs, in blocks computed: an estimate, never measured. Blocks of 128 x 128 at head dim 128
# in half precision, with as many key heads as query heads: forward and backward are about 30 million operations, 75 ns
# at 400 TFLOP/s; K and V are 64 KiB, and their gradients as much, 330 ns at 400 GB/s.
RECEIVED = 4
WORTH_IT = 0.98  # what a finer cut must make of the cost, to be taken
PATIENCE = 2  # finer cuts in a row that are tried although they gain nothing


def cheapest(masks: Sequence[BlockMask], ranks: int, cell: int, square: bool) -> Owners:
    """Owner of each cell, such that the rank which computes and receives most does so least."""
    weight = np.sum([cell_weights(mask, ranks, cell, square) for mask in masks], axis=0)
    best, least, idle = None, 0.0, 0
    for owner in dealing.by_weight(weight, ranks):
        cost = float(
            np.max(np.bincount(owner, weight, ranks) + RECEIVED * _received(masks, owner, ranks, cell, square))
        )
        if best is None or cost < WORTH_IT * least:
            best, least, idle = owner, cost, 0
        elif (idle := idle + 1) == PATIENCE:
            break
    assert best is not None
    return best


def _received(masks: Sequence[BlockMask], owner: Owners, ranks: int, cell: int, square: bool) -> NDArray[np.float64]:
    """Key blocks that each rank receives, summed over the masks and their heads, [R]."""
    total = np.zeros(ranks)
    for mask in masks:
        (nq, nk), (bq, bk) = mask.grid_shape, mask.block
        rows = np.repeat(owner, cell // bq)[:nq]
        cols = np.repeat(owner, cell // bk)[:nk] if square else dealing.contiguous(nk, ranks)
        needed = key_blocks(mask, rows, cols, split_rows(mask, ranks), ranks)
        total += (needed & (cols != np.arange(ranks)[:, None])).sum(axis=1) * mask.pattern_of.size
    return total
