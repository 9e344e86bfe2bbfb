"""Unions of column intervals in the rows of a matrix, on one linear axis (``row * cols + col``)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ints: TypeAlias = NDArray[np.int64]


def union(shape: tuple[int, int], rows: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Linear bounds of what column intervals ``[starts, stops)`` cover together: sorted, disjoint, each in one row."""
    starts, stops = np.clip(starts, 0, shape[1]), np.clip(stops, 0, shape[1])
    keep = (starts < stops) & (rows >= 0) & (rows < shape[0])
    begin, end = (rows * shape[1] + starts)[keep], (rows * shape[1] + stops)[keep]
    if not begin.size:
        return begin, end
    if (begin[1:] < begin[:-1]).any():
        by_begin = np.argsort(begin, kind="stable")
        begin, end = begin[by_begin], end[by_begin]
    reach = np.maximum.accumulate(end)
    fresh = np.ones(begin.size, bool)
    fresh[1:] = (begin[1:] > reach[:-1]) | ((begin[1:] == reach[:-1]) & (begin[1:] % shape[1] == 0))
    heads = np.flatnonzero(fresh)
    return begin[heads], reach[np.append(heads[1:], begin.size) - 1]


def split(linear: Ints, width: int) -> tuple[Ints, Ints]:
    """Rows and columns of linear positions; numpy divides by one number far faster than its divmod."""
    rows: Ints = linear // width
    return rows, linear - rows * width


def positions(start: Ints, stop: Ints) -> Ints:
    """Every integer of the half-open intervals ``[start, stop)``, one interval after another."""
    length = stop - start
    first = np.cumsum(length) - length
    every: Ints = np.arange(int(length.sum()), dtype=np.int64) + np.repeat(start - first, length)
    return every
