"""How cells of a sequence are dealt to ranks: in one piece each, as a zig-zag, or by weight.

A cell is the least that is dealt: some tokens that stay together, a whole number of blocks. Dealing by weight has two
aims that pull apart. Small pieces make the ranks' work equal; large ones keep neighbours on one rank, and a window that
stays on one rank moves no bytes. So the sequence is cut finer and finer, and who deals takes the cut that costs least:
a window of constant width stays in one piece a rank, a causal mask becomes the zig-zag.

All here is numpy on the host, and a function of its arguments alone: every rank computes it for itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints

Owners = NDArray[np.int32]


def contiguous(cells: int, ranks: int) -> Owners:
    """Owner of each cell: one piece a rank, in order.

    Example:
        >>> contiguous(7, 3).tolist()
        [0, 0, 1, 1, 2, 2, 2]
    """
    return np.repeat(np.arange(ranks, dtype=np.int32), np.diff(_edges(cells, ranks)))


def zigzag(cells: int, ranks: int) -> Owners:
    """Owner of each cell: two pieces a rank, the i-th from the front and the i-th from the back.

    Example:
        >>> zigzag(8, 2).tolist()
        [0, 0, 1, 1, 1, 1, 0, 0]
    """
    order, each = np.arange(ranks, dtype=np.int32), np.diff(_edges(cells, ranks))
    front, back = (each + 1) // 2, each // 2
    return np.concatenate([np.repeat(order, front), np.repeat(order, back)[::-1]])


def by_weight(weight: Ints, ranks: int) -> Iterator[Owners]:
    """Owner of each cell, in ever finer cuts: 1, 2, 4, ... pieces a rank, as long as there are cells.

    Every rank gets equally many pieces. The heaviest is dealt first, each to the rank with least work so far.

    Args:
        weight: int64 [cells].
        ranks: how many.

    Example:
        >>> [owner.tolist() for owner in by_weight(np.arange(8), 2)][:2]  # a causal mask: the second is the zig-zag
        [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
    """
    pieces = 1
    while pieces * ranks <= weight.size:
        edges = _edges(weight.size, pieces * ranks)
        yield np.repeat(_deal(np.add.reduceat(weight, edges[:-1]), ranks, pieces), np.diff(edges))
        pieces *= 2


def _deal(weight: Ints, ranks: int, each: int) -> Owners:
    """Owner of each piece; every rank gets `each` of them. Ranks are named by their first piece, for neatness."""
    owner = np.empty(weight.size, np.int32)
    free = [(0, rank) for rank in range(ranks)]
    room = [each] * ranks
    for piece in np.argsort(-weight, kind="stable").tolist():
        work, rank = heapq.heappop(free)
        owner[piece] = rank
        room[rank] -= 1
        if room[rank]:
            heapq.heappush(free, (work + int(weight[piece]), rank))
    _, first = np.unique(owner, return_index=True)
    name = np.empty(ranks, np.int32)
    name[np.argsort(first, kind="stable")] = np.arange(ranks)
    return name[owner]


def _edges(cells: int, pieces: int) -> Ints:
    """Where pieces of as equal sizes as possible begin, and the end."""
    return np.arange(pieces + 1, dtype=np.int64) * cells // pieces
