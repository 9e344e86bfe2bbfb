"""Two matrices of block codes laid over each other: stretches in which neither code changes.

Each matrix is written as its jumps: by how much the code changes at each column. scipy adds two such matrices in one
pass, and a running sum over the result gives both codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sparseflash.patterns.intervals import Ints, positions
from sparseflash.patterns.runs import Runs, distinct

JUMPS_AT_ONCE = 1 << 17

Index = NDArray[Any]  # int32 if that suffices, else int64


class Segments(NamedTuple):
    """Stretches of some rows in which neither matrix changes, without those that are EMPTY in both."""

    first: int  # row of these
    rows: int  # number of rows
    row: Index
    start: Index  # columns [start, stop)
    stop: Index
    a: NDArray[np.int32]
    b: NDArray[np.int32]


class Jumps(NamedTuple):
    """By how much the code changes at each column of each row; the column past the last one ends a row."""

    cols: int
    highest: int  # code
    begin: Index  # [rows + 1] where the changes of each row begin
    col: Index
    change: NDArray[np.int32]

    @classmethod
    def of(cls, runs: Runs) -> Jumps:
        rows, cols = runs.shape
        index = np.int32 if max(2 * len(runs), rows, cols + 1) < 1 << 31 else np.int64
        row = runs.row * cols
        begin = runs.begin.astype(index)
        shape = rows, cols + 1
        up = _csr(runs.code, (runs.start - row).astype(index), begin, shape)
        down = _csr(runs.code, (runs.stop - row).astype(index), begin, shape)
        jumps = up - down
        return cls(cols, int(runs.code.max(initial=0)), jumps.indptr, jumps.indices, jumps.data)

    def begins(self, rows: Ints) -> Index:
        """Where the changes of some rows begin, [rows + 1]; of one named twice running, the first is left empty."""
        return np.append(self.begin[rows.ravel()], self.begin[-1])

    def rows(self, begin: Index, dtype: type[np.signedinteger[Any]], shift: int) -> csr_array:
        """The rows whose changes begin at ``begin`` [n + 1], as a matrix of values ``change << shift``."""
        some = slice(int(begin[0]), int(begin[-1]))
        shape = begin.size - 1, self.cols + 1
        return _csr(self.change[some].astype(dtype) << shift, self.col[some], begin - begin[0], shape)


def _csr(data: NDArray[Any], indices: Index, indptr: Index, shape: tuple[int, int]) -> csr_array:
    matrix = csr_array((data, indices, indptr), shape=shape)
    matrix.has_canonical_format = True  # columns ascend without duplicates: scipy need not check
    return matrix


def segments(a: Jumps, begin_a: Index, b: Jumps, begin_b: Index) -> Iterator[Segments]:
    """The stretches, a few rows at a time, so that intermediate arrays stay small and their memory is reused.

    ``begin_a`` and ``begin_b`` [rows + 1] say where the jumps of each row begin, so that rows can be skipped or added.
    """
    rows = begin_a.size - 1
    portions = min(rows, -(-(a.col.size + b.col.size) // JUMPS_AT_ONCE)) or 1
    # One sum carries both codes, a in the lower half and b in the upper one.
    narrow = max(a.highest, b.highest) < 1 << 15
    dtype, half = (np.int32, 16) if narrow else (np.int64, 32)
    lower = (1 << half) - 1
    edges = [p * rows // portions for p in range(portions + 1)]
    for first, last in pairwise(edges):
        both = a.rows(begin_a[first : last + 1], dtype, 0) + b.rows(begin_b[first : last + 1], dtype, half)
        codes: NDArray[Any] = np.cumsum(both.data, dtype=dtype)
        here = np.flatnonzero(codes)  # both are 0 after the end of a row and in gaps
        row = np.repeat(np.arange(first, last, dtype=both.indices.dtype), np.diff(both.indptr))
        codes = codes[here]
        yield Segments(
            first,
            last - first,
            row[here],
            both.indices[here],
            both.indices[here + 1],
            (codes & lower).astype(np.int32),
            (codes >> half).astype(np.int32),
        )


def overlay(a: Runs, b: Runs) -> tuple[Runs, Ints, Ints]:
    """Lay two matrices over each other: runs whose code numbers a pair, and the pairs' two codes.

    Pair p stands for ``(codes_a[p], codes_b[p])``; each distinct pair appears once, (EMPTY, EMPTY) never.
    """
    one, other = Jumps.of(a), Jumps.of(b)
    found = segments(one, one.begin, other, other.begin)
    row, start, stop, code_a, code_b = (np.concatenate(part) for part in list(zip(*found, strict=True))[2:])
    width = int(b.code.max(initial=1)) + 1
    pairs, index = distinct(code_a.astype(np.int64) * width + code_b)
    line = row.astype(np.int64) * a.shape[1]
    runs = Runs(a.shape, line + start, line + stop, index.astype(np.int32))
    return runs, pairs // width, pairs % width


def transposed(runs: Runs, stacked: int = 1) -> Runs:
    """Each of ``stacked`` matrices, written one below the other, transposed; codes are kept.

    A vertical run begins where a block differs from the one above it, so consecutive rows are laid over each other and
    only the places where they differ are expanded: the cost is linear in the result.
    """
    n, m = runs.shape[0] // stacked, runs.shape[1]
    jumps = Jumps.of(runs)
    # One empty row below each matrix ends its vertical runs.
    row = np.arange(stacked)[:, None] * n + np.arange(n + 1)
    above = np.maximum(row - 1, row[:, :1])
    index = np.int32 if max(row.size, stacked * m) < 1 << 31 else np.int64
    counts, cols, codes = [], [], []
    for some in segments(jumps, jumps.begins(row), jumps, jumps.begins(above)):
        differs = np.flatnonzero(some.a != some.b)
        line, length = some.row[differs] - some.first, (some.stop - some.start)[differs]
        col = positions(some.start[differs], some.stop[differs])
        if stacked > 1:
            col = col + np.repeat((line.astype(index) + some.first) // (n + 1) * m, length)
        counts.append(np.bincount(line, weights=length, minlength=some.rows))
        cols.append(col.astype(index, copy=False))
        codes.append(np.repeat(some.a[differs], length))
    begin = np.zeros(row.size + 1, index)
    np.cumsum(np.concatenate(counts), out=begin[1:], dtype=index)
    # Turning rows into columns is one counting sort, scipy's `tocsc`.
    changes = csr_array((np.concatenate(codes), np.concatenate(cols), begin), shape=(row.size, stacked * m)).tocsc()
    del cols, codes
    begins = np.flatnonzero(changes.data)
    line = np.repeat(np.arange(stacked * m, dtype=index), np.diff(changes.indptr))[begins]
    start = line.astype(np.int64) * n
    stop = start.copy()
    place = changes.indices % index(n + 1) if stacked > 1 else changes.indices
    start += place[begins]
    stop += place[begins + 1]
    return Runs((stacked * m, n), start, stop, changes.data[begins])
