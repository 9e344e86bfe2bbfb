"""Partitions of a sequence among ranks: the workload of each part, the keys it requires, and the cheapest partition.

The smallest unit is a *cell*: tokens that stay together, a whole number of blocks. Two aims compete. Small pieces
balance the work. Large pieces keep neighbours on one rank, and a window within one rank needs no communication.
:func:`cheapest_partition` therefore tries finer and finer partitions and returns the one with the lowest cost: one
piece per rank for a window of constant width, a zigzag for a causal mask.

Everything here is numpy on the host and depends on its arguments alone, so every rank computes the same partition.

A row with global tokens sees keys of all ranks. If one rank computed it, that rank would have to receive every key, and
the others would wait for it. Such a row is *split*: its queries go to all ranks, each rank attends with the keys it
holds, and the rank that holds the queries merges the partial results by lse.

Legend: R ranks, nQ / nK block rows / columns of the whole mask.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.intervals import Ints

Owners = NDArray[np.int32]
Bools = NDArray[np.bool_]

# A row is split if it has much more work than the mean row, if that is a noticeable part of one rank's work, and if
# its key blocks outnumber the blocks that its queries and partial results cost on their way to every rank and back.
SPLIT_ABOVE_MEAN = 2
SPLIT_ABOVE_SHARE = 1 / 50
SPLIT_ABOVE_BLOCKS_PER_RANK = 4

# Cost of receiving a key block, in blocks computed: an estimate, never measured. Blocks of 128 x 128 at head dim 128
# in half precision, with as many key heads as query heads: forward and backward are about 30 million operations, 75 ns
# at 400 TFLOP/s; K and V are 64 KiB, and their gradients as much, 330 ns at 400 GB/s.
RECEIVE_COST = 4
WORTH_REFINING = 0.98  # a finer partition is taken if it costs less than this share of the best one so far
PATIENCE = 2  # finer partitions in a row that are tried without such a gain


def contiguous(cells: int, ranks: int) -> Owners:
    """Owner of each cell: one piece per rank, in order.

    Example:
        >>> contiguous(7, 3).tolist()
        [0, 0, 1, 1, 2, 2, 2]
    """
    return np.repeat(np.arange(ranks, dtype=np.int32), np.diff(_boundaries(cells, ranks)))


def zigzag(cells: int, ranks: int) -> Owners:
    """Owner of each cell: two pieces per rank, the i-th from the front and the i-th from the back.

    Example:
        >>> zigzag(8, 2).tolist()
        [0, 0, 1, 1, 1, 1, 0, 0]
    """
    order, sizes = np.arange(ranks, dtype=np.int32), np.diff(_boundaries(cells, ranks))
    front, back = (sizes + 1) // 2, sizes // 2
    return np.concatenate([np.repeat(order, front), np.repeat(order, back)[::-1]])


def balanced_partitions(workload: Ints, ranks: int) -> Iterator[Owners]:
    """Owner of each cell, in finer and finer partitions: 1, 2, 4, ... pieces per rank, as long as there are cells.

    Every rank gets the same number of pieces. The heaviest piece is assigned first, each to the rank with least work.

    Args:
        workload: int64 [cells].
        ranks: R.

    Example:
        >>> owners = balanced_partitions(np.arange(8), 2)  # a causal mask
        >>> next(owners).tolist()
        [0, 0, 0, 0, 1, 1, 1, 1]
        >>> next(owners).tolist()  # the zigzag
        [0, 0, 1, 1, 1, 1, 0, 0]
    """
    pieces = 1
    while pieces * ranks <= workload.size:
        edges = _boundaries(workload.size, pieces * ranks)
        owner = _assign(np.add.reduceat(workload, edges[:-1]), ranks, pieces)
        yield np.repeat(owner, np.diff(edges))
        pieces *= 2


def cheapest_partition(masks: Sequence[BlockMask], ranks: int, cell: int, square: bool) -> Owners:
    """Owner of each cell, int32 [cells], with the lowest cost of the rank that computes and receives most.

    Args:
        masks: of one length; their costs are added up.
        ranks: R.
        cell: tokens per cell.
        square: queries and keys are the same tokens. If not, the keys are held in one contiguous piece per rank.
    """
    workload = np.sum([cell_workloads(mask, ranks, cell, square) for mask in masks], axis=0)
    best, lowest, without_gain = None, 0.0, 0
    for owner in balanced_partitions(workload, ranks):
        received = _received_blocks(masks, owner, ranks, cell, square)
        cost = float(np.max(np.bincount(owner, workload, ranks) + RECEIVE_COST * received))
        if best is None or cost < WORTH_REFINING * lowest:
            best, lowest, without_gain = owner, cost, 0
        elif (without_gain := without_gain + 1) == PATIENCE:
            break
    assert best is not None
    return best


def split_rows(mask: BlockMask, ranks: int) -> Bools:
    """Which block rows are split among all ranks, bool [nQ].

    Example:
        >>> from sparseflash import patterns as P
        >>> split_rows((P.local(100) | P.global_tokens(1)).compile(8192), ranks=4).nonzero()[0].tolist()
        [0]
        >>> split_rows(P.causal().compile(8192), ranks=4).any()
        np.False_
    """
    workload = row_workloads(mask)
    threshold = max(
        SPLIT_ABOVE_MEAN * workload.mean(),
        SPLIT_ABOVE_SHARE * workload.sum() / ranks,
        SPLIT_ABOVE_BLOCKS_PER_RANK * ranks,
    )
    split: Bools = workload > threshold
    return split & (ranks > 1)


def row_workloads(mask: BlockMask) -> NDArray[np.float64]:
    """Stored blocks of each block row, the mean over heads and samples, [nQ]."""
    workload: NDArray[np.float64] = _pattern_shares(mask) @ mask.row_counts
    return workload


def column_workloads(mask: BlockMask, rows: Bools) -> NDArray[np.float64]:
    """Stored blocks of each block column within the selected block rows, the mean over heads and samples, [nK]."""
    (nq, nk), runs = mask.grid_shape, mask.runs
    selected = np.flatnonzero(rows[runs.row % nq])
    begin = runs.start[selected] - runs.row[selected] * nk
    share = _pattern_shares(mask)[runs.row[selected] // nq]
    end = begin + runs.length[selected]
    steps = np.bincount(begin, share, nk + 1) - np.bincount(end, share, nk + 1)
    workload: NDArray[np.float64] = np.cumsum(steps)[:nk]
    return workload


def cell_workloads(mask: BlockMask, ranks: int, cell: int, square: bool) -> Ints:
    """Blocks to compute for each cell of queries, summed over heads and samples, int64 [cells].

    A split row is computed where its keys are: in self-attention its blocks count for the cells of their columns.
    """
    split = split_rows(mask, ranks)
    workload = _group_sums(np.where(split, 0, row_workloads(mask)), cell // mask.block[0])
    if square and split.any():
        workload += _group_sums(column_workloads(mask, split), cell // mask.block[1])
    return np.rint(workload * mask.pattern_of.size).astype(np.int64)


def required_key_blocks(mask: BlockMask, row_owner: Owners, col_owner: Owners, split: Bools, ranks: int) -> Bools:
    """Which key blocks each rank computes with, bool [R, nK]: those that its rows see, and its own that split rows see.

    Args:
        mask: nQ x nK blocks.
        row_owner: the rank that holds each block row, [nQ].
        col_owner: the rank that holds each key block, [nK].
        split: block rows that every rank computes over the keys it holds, [nQ].
        ranks: R.
    """
    (nq, nk), runs = mask.grid_shape, mask.runs
    row, begin = runs.row % nq, runs.start - runs.row * nk
    unsplit = np.flatnonzero(~split[row])
    at = row_owner[row[unsplit]].astype(np.int64) * (nk + 1) + begin[unsplit]
    # A rank requires a column if more of its rows' runs began at or before it than ended there.
    steps = np.bincount(at, minlength=ranks * (nk + 1)) - np.bincount(
        at + runs.length[unsplit], minlength=ranks * (nk + 1)
    )
    required: Bools = np.cumsum(steps.reshape(ranks, nk + 1), axis=1)[:, :nk] > 0
    required[col_owner[seen := np.flatnonzero(column_workloads(mask, split) > 0)], seen] = True
    # Attention needs at least one key. A rank that requires none computes with one of its own, which no row sees.
    _, first = np.unique(col_owner, return_index=True)
    idle = np.flatnonzero(~required.any(axis=1))
    required[idle, first[idle]] = True
    return required


def _received_blocks(
    masks: Sequence[BlockMask], owner: Owners, ranks: int, cell: int, square: bool
) -> NDArray[np.float64]:
    """Key blocks that each rank receives, summed over the masks and their heads, [R]."""
    total = np.zeros(ranks)
    for mask in masks:
        (nq, nk), (bq, bk) = mask.grid_shape, mask.block
        rows = np.repeat(owner, cell // bq)[:nq]
        cols = np.repeat(owner, cell // bk)[:nk] if square else contiguous(nk, ranks)
        required = required_key_blocks(mask, rows, cols, split_rows(mask, ranks), ranks)
        total += (required & (cols != np.arange(ranks)[:, None])).sum(axis=1) * mask.pattern_of.size
    return total


def _assign(workload: Ints, ranks: int, per_rank: int) -> Owners:
    """Owner of each piece, `per_rank` pieces each, heaviest first. Ranks are numbered by their first piece."""
    owner = np.empty(workload.size, np.int32)
    free = [(0, rank) for rank in range(ranks)]
    room = [per_rank] * ranks
    for piece in np.argsort(-workload, kind="stable").tolist():
        work, rank = heapq.heappop(free)
        owner[piece] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(free, (work + int(workload[piece]), rank))
    _, first = np.unique(owner, return_index=True)
    number = np.empty(ranks, np.int32)
    number[np.argsort(first, kind="stable")] = np.arange(ranks)
    return number[owner]


def _boundaries(cells: int, pieces: int) -> Ints:
    """Where pieces of sizes as equal as possible begin, and where the last one ends, [pieces + 1]."""
    return np.arange(pieces + 1, dtype=np.int64) * cells // pieces


def _pattern_shares(mask: BlockMask) -> NDArray[np.float64]:
    """Share of the heads and samples that have each pattern, [P]."""
    shares: NDArray[np.float64] = np.bincount(mask.pattern_of.ravel(), minlength=mask.patterns) / mask.pattern_of.size
    return shares


def _group_sums(values: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """Sums over groups of `size` neighbours; the last group may be smaller."""
    sums: NDArray[np.float64] = np.add.reduceat(values, np.arange(0, values.size, size))
    return sums
