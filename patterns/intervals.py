"""Unions of column intervals in the rows of a matrix, on one linear axis (``row * cols + col``)."""

from __future__ import annotations

from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.memory import reserve

Ints: TypeAlias = NDArray[np.int64]
Index = TypeVar("Index", bound=np.signedinteger[Any])


def union(shape: tuple[int, int], rows: Ints, starts: Ints, stops: Ints) -> tuple[Ints, Ints]:
    """Linear bounds of the union of column intervals ``[starts, stops)``: sorted, disjoint, each within one row."""
    starts, stops = np.maximum(starts, 0), np.minimum(stops, shape[1])
    keep = np.flatnonzero((starts < stops) & (rows >= 0) & (rows < shape[0]))
    line = rows[keep] * shape[1]
    begin, end = line + starts[keep], line + stops[keep]
    if not begin.size:
        return begin, end
    if (begin[1:] < begin[:-1]).any():
        by_begin = np.argsort(begin, kind="stable")
        begin, end = begin[by_begin], end[by_begin]
    reach = np.maximum.accumulate(end)
    joined = np.flatnonzero(begin[1:] <= reach[:-1]) + 1
    # The end of a row and the beginning of the next one have equal positions but are not adjacent.
    joined = joined[(begin[joined] < reach[joined - 1]) | (begin[joined] % shape[1] != 0)]
    if not joined.size:
        return begin, end
    fresh = np.ones(begin.size, bool)
    fresh[joined] = False
    heads = np.flatnonzero(fresh)
    return begin[heads], reach[np.append(heads[1:], begin.size) - 1]


def split(linear: Ints, width: int) -> tuple[Ints, Ints]:
    """Rows and columns of linear positions. Division by a scalar is far faster in numpy than divmod."""
    rows: Ints = linear // width
    return rows, linear - rows * width


def positions(start: NDArray[Index], stop: NDArray[Index]) -> NDArray[Index]:
    """Every integer of the half-open intervals ``[start, stop)``, one interval after another, in their dtype."""
    length = stop - start
    total = int(length.sum())
    if total == length.size and length.all():  # one integer each
        return start.copy()
    reserve(total, 40)
    every = np.repeat(stop - np.cumsum(length), length).astype(start.dtype, copy=False)
    every += np.arange(total, dtype=start.dtype)
    return every
