"""How the lines of a table are dealt to programs: heavy ones first, and those far above the mean in pieces.

A program that walks a row of 500 blocks while the mean row has 10 is what everyone else waits for: with a few global
tokens it would set the time of the whole kernel.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

HEAVY = 2  # times the mean, past which a line is cut
SHORTEST_PIECE = 16  # blocks; cutting costs a write and a read of a block of partial results


def weights(spans: Ints) -> Ints:
    """Blocks of each line: [..., 4] spans (starts and stops of FULL and PARTIAL entries) to [...]."""
    counts: Ints = spans[..., 1] - spans[..., 0] + spans[..., 3] - spans[..., 2]
    return counts


def deal(spans: Ints) -> tuple[Ints, Ints]:
    """Work items for programs, and which of them belong together.

    Args:
        spans: int64 [P, n, 4]; where the entries of each line start and stop in the FULL and in the PARTIAL list.

    Returns:
        ``work`` [P, W, 6], heaviest first: line, the four spans of the piece, and its slot for partial results, or -1
        when the piece is the whole line; surplus items have line -1. ``merges`` [P, L, 3]: a line that was cut, its
        first slot and the one past its last; surplus ones have line -1.

    Example:
        >>> import numpy as np
        >>> spans = np.zeros((1, 40, 4), np.int64)
        >>> spans[0, :, 1] = 1
        >>> spans[0, 7] = 0, 30, 0, 2
        >>> work, merges = deal(spans)
        >>> work[0, :3].tolist()
        [[7, 0, 16, 0, 0, 0], [7, 16, 30, 0, 2, 1], [0, 0, 1, 0, 0, -1]]
        >>> merges.tolist()
        [[[7, 0, 2]]]
    """
    parts = [_deal_one(each) for each in spans]
    return _stacked([work for work, _ in parts]), _stacked([merges for _, merges in parts])


def _deal_one(spans: Ints) -> tuple[Ints, Ints]:
    weight = weights(spans)
    limit = max(SHORTEST_PIECE, int(np.ceil(HEAVY * weight.mean())))
    pieces = np.maximum(-(-weight // limit), 1)
    line = np.repeat(np.arange(len(spans)), pieces)
    first = np.cumsum(pieces) - pieces
    number = np.arange(line.size) - first[line]
    low, high = weight[line] * number // pieces[line], weight[line] * (number + 1) // pieces[line]
    full_start, full_stop, partial_start, _ = spans[line].T
    full = full_stop - full_start
    cut = pieces[line] > 1
    slot = np.where(cut, np.cumsum(cut) - 1, -1)
    work = np.stack(
        [
            *(line, full_start + np.minimum(low, full), full_start + np.minimum(high, full)),
            *(partial_start + np.maximum(low - full, 0), partial_start + np.maximum(high - full, 0), slot),
        ],
        axis=1,
    )
    cut_lines = np.flatnonzero(pieces > 1)
    begin = slot[first[cut_lines]]
    merges = np.stack([cut_lines, begin, begin + pieces[cut_lines]], axis=1)
    return work[np.argsort(low - high, kind="stable")], merges


def _stacked(parts: list[Ints]) -> Ints:
    """[n, c] arrays of several lengths as one, filled up with -1."""
    longest = max(len(part) for part in parts)
    filled = [np.pad(part, ((0, longest - len(part)), (0, 0)), constant_values=-1) for part in parts]
    return np.stack(filled)


def makespan(pieces: Iterable[int], workers: int) -> int:
    """Blocks that the busiest of the workers walks when each takes the next piece as soon as it is free.

    Example:
        >>> makespan([8, 1, 1, 1, 1], workers=2)
        8
        >>> makespan([4, 4, 1, 1, 1, 1], workers=2)
        6
    """
    busy = [0] * workers
    for blocks in pieces:
        heapq.heapreplace(busy, busy[0] + blocks)
    return max(busy)
