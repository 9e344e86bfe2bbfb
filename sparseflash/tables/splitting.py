"""Which program takes which line of a table: heavy lines first, and those far above the mean split among several.

With a few global tokens one row has 500 blocks while the mean row has 10. Unsplit, that row alone would set the time
of the whole kernel.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

HEAVY = 2  # times the mean, past which a line is split
SHORTEST_SPLIT = 16  # blocks; splitting costs a write and a read of a block of partial results
SHARES = 2048  # no split is smaller than this share of all blocks; no GPU runs nearly as many programs at once
WORKERS = 132  # programs at once on an H100 or H200: one a multiprocessor


def weights(ranges: NDArray[Any]) -> Ints:
    """Blocks of each line: [..., 4] ranges (starts and stops of FULL and PARTIAL entries) to [...]."""
    counts: Ints = (ranges[..., 1] - ranges[..., 0] + ranges[..., 3] - ranges[..., 2]).astype(np.int64)
    return counts


def split_counts(weight: Ints) -> Ints:
    """The number of splits of each line, int64 [..., n]: 1 unless its weight [..., n] is far above the mean.

    Example:
        >>> import numpy as np
        >>> split_counts(np.array([3] * 39 + [32])).tolist()[-2:]
        [1, 2]
    """
    total, lines = weight.sum(-1, keepdims=True), weight.shape[-1]
    limit = np.maximum(-(-total * max(HEAVY * SHARES, lines) // (lines * SHARES)), SHORTEST_SPLIT)
    splits: Ints = np.maximum(-(-weight // limit), 1)
    return splits


def assign(ranges: NDArray[Any]) -> tuple[Ints, Ints]:
    """Work items for programs, and the work items of each split line.

    Args:
        ranges: ints [P, n, 4]: start and stop of each line in the FULL and in the PARTIAL list.

    Returns:
        ``work_items`` [P, W, 6], heaviest first: a line, where the item starts and stops in its FULL and in its
        PARTIAL list, and its slot for partial results, or -1 if it is the whole line; unused items have line -1.
        ``reductions`` [P, L, 3]: a split line, its first slot and the one past its last; unused ones have line -1.

    Example:
        >>> import numpy as np
        >>> ranges = np.zeros((1, 40, 4), np.int64)
        >>> ranges[0, :, 1] = 1
        >>> ranges[0, 7] = 0, 30, 0, 2
        >>> work, reductions = assign(ranges)
        >>> work[0, :3].tolist()
        [[7, 0, 16, 0, 0, 0], [7, 16, 30, 0, 2, 1], [0, 0, 1, 0, 0, -1]]
        >>> reductions.tolist()
        [[[7, 0, 2]]]
    """
    parts = [_assign_one(each) for each in ranges]
    return _stacked([work for work, _ in parts]), _stacked([reductions for _, reductions in parts])


def _assign_one(ranges: NDArray[Any]) -> tuple[Ints, Ints]:
    splits = split_counts(weights(ranges))
    line, low, high = _shares(weights(ranges), splits)
    full_start, full_stop, partial_start, _ = ranges[line].T
    full = full_stop - full_start
    is_split = splits[line] > 1
    slot = np.where(is_split, np.cumsum(is_split) - 1, -1)
    work = np.stack(
        [
            *(line, full_start + np.minimum(low, full), full_start + np.minimum(high, full)),
            *(partial_start + np.maximum(low - full, 0), partial_start + np.maximum(high - full, 0), slot),
        ],
        axis=1,
    )
    split_lines = np.flatnonzero(splits > 1)
    end = np.cumsum(splits[split_lines])
    reductions = np.stack([split_lines, end - splits[split_lines], end], axis=1)
    return work[np.argsort(low - high, kind="stable")], reductions


def _shares(weight: Ints, splits: Ints) -> tuple[Ints, Ints, Ints]:
    """The line of each split, and where it starts and stops among the entries of the line."""
    line = np.repeat(np.arange(weight.size), splits)
    number = np.arange(line.size) - (np.cumsum(splits) - splits)[line]
    return line, weight[line] * number // splits[line], weight[line] * (number + 1) // splits[line]


def split_sizes(weight: Ints) -> Ints:
    """Blocks that each program walks, heaviest first; weight int64 [n]: blocks of each line.

    Example:
        >>> import numpy as np
        >>> split_sizes(np.array([1, 32, *[1] * 38]))[:4].tolist()
        [16, 16, 1, 1]
    """
    _, low, high = _shares(weight, split_counts(weight))
    return np.sort(high - low)[::-1]


def _stacked(parts: list[Ints]) -> Ints:
    """[n, c] arrays of several lengths as one, padded with -1."""
    longest = max(len(part) for part in parts)
    filled = [np.pad(part, ((0, longest - len(part)), (0, 0)), constant_values=-1) for part in parts]
    return np.stack(filled)


class Balance(NamedTuple):
    """The effect of splitting heavy lines on the longest work of a program."""

    workers: int  # programs that run at once
    longest: int  # blocks of the heaviest line
    pieces: int  # splits of that line
    longest_piece: int  # blocks of the heaviest split of any line
    busiest_before: int  # blocks of the busiest worker if lines are whole
    busiest: int  # the same if they are split


def balance(weight: Ints, workers: int = WORKERS) -> Balance | None:
    """The effect of splitting lines of these weights [n] in one head; None if no line is split.

    Example:
        >>> import numpy as np
        >>> print(balance(np.array([512, *[12] * 511]), workers=132))  # doctest: +NORMALIZE_WHITESPACE
        Balance(workers=132, longest=512, pieces=20, longest_piece=26, busiest_before=512, busiest=60)
    """
    splits = split_counts(weight)
    if (splits == 1).all():
        return None
    whole, sizes = np.sort(weight)[::-1].tolist(), split_sizes(weight).tolist()
    heaviest = int(weight.argmax())
    return Balance(
        *(workers, whole[0], int(splits[heaviest]), sizes[0], makespan(whole, workers), makespan(sizes, workers))
    )


def makespan(splits: Iterable[int], workers: int) -> int:
    """Blocks of the busiest worker if each takes the next split as soon as it is free.

    Example:
        >>> makespan([8, 1, 1, 1, 1], workers=2)
        8
        >>> makespan([4, 4, 1, 1, 1, 1], workers=2)
        6
    """
    busy = [0] * workers
    for blocks in splits:
        heapq.heapreplace(busy, busy[0] + blocks)
    return max(busy)
