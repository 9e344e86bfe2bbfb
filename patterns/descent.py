"""Pairs of boxes that meet, found from large groups of boxes down to single ones.

The cost is that of the answer, in whatever order the boxes lie, as long as boxes that follow each other lie together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.memory import reserve

GROUP = 4  # boxes to a group
FEW = 8  # groups whose pairs are all looked at
PAIRS_AT_ONCE = 1 << 20
FAR_MORE = 1 << 24  # pairs of which the memory for those that meet is estimated first
SAMPLE = 1024


class Boxes(NamedTuple):
    """The smallest boxes around the tokens of blocks that follow each other: first and last place along each axis."""

    first: NDArray[np.int32]  # [axes, boxes]
    last: NDArray[np.int32]

    @property
    def number(self) -> int:
        return int(self.first.shape[1])

    def grouped(self) -> Boxes:
        begins = np.arange(0, self.number, GROUP)
        return Boxes(np.minimum.reduceat(self.first, begins, axis=1), np.maximum.reduceat(self.last, begins, axis=1))


Meets = Callable[[Boxes, Ints, Boxes, Ints], NDArray[np.bool_]]


def pairs_that_meet(q: Boxes, k: Boxes, meets: Meets) -> tuple[Ints, Ints]:
    """Every pair (i, j) for which ``meets(q, [i], k, [j])``, in any order.

    Args:
        q: boxes.
        k: other boxes.
        meets: must hold for groups wherever it does for boxes inside them.
    """
    levels = [(q, k)]
    while max(levels[-1][0].number, levels[-1][1].number) > FEW:
        levels.append((levels[-1][0].grouped(), levels[-1][1].grouped()))
    top_q, top_k = levels.pop()
    i, j = (x.ravel() for x in np.indices((top_q.number, top_k.number), dtype=np.int64))
    i, j = _that_meet(top_q, i, top_k, j, meets)
    if q.number * k.number > FAR_MORE:
        reserve(_about(levels[::-1], i, j, meets), 80)
    for fine_q, fine_k in reversed(levels):
        i, j = _refined(fine_q, i, fine_k, j, meets)
    return i, j


def _about(levels: list[tuple[Boxes, Boxes]], i: Ints, j: Ints, meets: Meets) -> int:
    """How many pairs the finest level will have, from a sample of pairs at each; levels from coarse to fine."""
    number, draw = float(i.size), np.random.default_rng(0)
    for q, k in levels:
        if not i.size:
            return 0
        some = draw.integers(i.size, size=SAMPLE)
        i, j = _inside(q, i[some], k, j[some], meets)
        number *= i.size / SAMPLE
    return int(number)


def _refined(q: Boxes, i: Ints, k: Boxes, j: Ints, meets: Meets) -> tuple[Ints, Ints]:
    """The pairs of boxes inside pairs of groups, a portion at a time."""
    step = PAIRS_AT_ONCE // GROUP**2
    parts = [(i[:0], j[:0])]
    found = 0
    for begin in range(0, i.size, step):
        parts.append(_inside(q, i[begin : begin + step], k, j[begin : begin + step], meets))
        found += parts[-1][0].size
        reserve(found, 80)
    rows, cols = (np.concatenate(part) for part in zip(*parts, strict=True))
    return rows, cols


def _inside(q: Boxes, i: Ints, k: Boxes, j: Ints, meets: Meets) -> tuple[Ints, Ints]:
    """As :func:`_refined`, all at once."""
    inner_i, inner_j = (x.ravel() for x in np.indices((GROUP, GROUP), dtype=np.int64))
    i, j = (i[:, None] * GROUP + inner_i).ravel(), (j[:, None] * GROUP + inner_j).ravel()
    exist = np.flatnonzero((i < q.number) & (j < k.number))
    return _that_meet(q, i[exist], k, j[exist], meets)


def _that_meet(q: Boxes, i: Ints, k: Boxes, j: Ints, meets: Meets) -> tuple[Ints, Ints]:
    found = np.flatnonzero(meets(q, i, k, j))
    return i[found], j[found]
