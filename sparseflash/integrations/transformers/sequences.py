"""A pattern for the sequences in one row of a batch, which may be padded at both ends, packed, or both.

Each sequence gets the result that it would get alone. So a pattern counts positions from the first token of the query's
sequence, and no query sees padding. Padding queries see the sequence before them as if they continued it; padding in
front of all sequences sees the first one. This is what dense attention computes, which hides only padded keys; some
models read such rows, for a pooled last token or a class token in front.

Shape legend: a row of tokens 0, 1, 2, ...; a piece (start, stop, origin) means that tokens start to stop - 1 belong to
the sequence whose position 0 is, or would be, at token origin.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import TypeAlias

import numpy as np

from sparseflash.patterns.beside import Beside
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.composed import Composed
from sparseflash.patterns.dilated import Offsets
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.interval import Band, Interval
from sparseflash.patterns.pattern import Binary, Bools, Not, Pattern, parts_of
from sparseflash.patterns.runs import distinct
from sparseflash.patterns.stacked import Stacked

Piece: TypeAlias = tuple[int, int, int]


def within(pattern: Pattern, pieces: tuple[Piece, ...], tokens: int) -> Pattern:
    """The pattern inside each sequence of a row, and nothing across sequences.

    Args:
        pattern: of one sequence; may be per head.
        pieces: sorted and disjoint. Gaps between pieces of one origin are holes in that sequence.
        tokens: number of tokens of the row.

    Raises:
        ValueError: a pattern that counts from the end of a sequence, unless the row is a single sequence.

    Example:
        >>> from sparseflash import patterns as P
        >>> packed = within(P.streaming(sinks=1, window=1), ((0, 3, 0), (3, 5, 3)), tokens=6)
        >>> packed.compile(6, block=16).to_dense().astype(int)
        array([[1, 0, 0, 0, 0, 0],
               [1, 1, 0, 0, 0, 0],
               [1, 0, 1, 0, 0, 0],
               [0, 0, 0, 1, 0, 0],
               [0, 0, 0, 1, 1, 0],
               [0, 0, 0, 1, 0, 0]])
    """
    sequences, holes = _sequences(pieces)
    if [(start, stop) for start, stop, _ in sequences] != [(0, tokens)] and _counts_from_the_end(pattern):
        raise ValueError(
            f"{pattern} counts tokens from the end, which differs between the sequences of a padded or packed batch: "
            "give beside(pattern, before=n), or sequences of one length"
        )
    if any(origin for _, _, origin in sequences):
        pattern = restarted(pattern, sequences)
    if [(start, stop) for start, stop, _ in sequences] != [(0, tokens)]:
        pattern = pattern & SameSequence(tuple((start, stop) for start, stop, _ in sequences))
    return pattern & ~Holes(holes) if holes else pattern


def _sequences(pieces: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], tuple[tuple[int, int], ...]]:
    """(first token, one past the last, origin) of each sequence, and the holes in them."""
    sequences, holes = [], []
    for origin, group in groupby(pieces, key=lambda piece: piece[2]):
        parts = list(group)
        sequences.append((parts[0][0], parts[-1][1], origin))
        holes += [(before[1], after[0]) for before, after in pairwise(parts)]
    return tuple(sequences), tuple(holes)


def _counts_from_the_end(pattern: Pattern) -> bool:
    """Whether some part of the pattern depends on the end of the sequence."""
    here = isinstance(pattern, Beside) and pattern.after > 0 and pattern.known_size is None
    return here or any(map(_counts_from_the_end, parts_of(pattern)))


@dataclass(frozen=True, repr=False)
class SameSequence(Interval):
    """Keys of the stretch that contains a query, else of the one before it, else of the first one."""

    stretches: tuple[tuple[int, int], ...]
    name = "same_sequence"

    @cached_property
    def _edges(self) -> tuple[Ints, Ints]:
        edges = np.array(self.stretches or ((0, 0),), np.int64)
        return edges[:, 0], edges[:, 1]

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        start, stop = self._edges
        index = np.maximum(np.searchsorted(start, q, side="right") - 1, 0)
        return start[index], stop[index]


@dataclass(frozen=True, repr=False)
class Holes(Pattern):
    """The key is one of the tokens [start, stop) that belong to no sequence."""

    holes: tuple[tuple[int, int], ...]
    name = "holes"

    def _inside(self, position: Ints) -> Bools:
        start, stop = np.array(self.holes, np.int64).T
        index = np.searchsorted(start, position, side="right") - 1
        return np.asarray((index >= 0) & (position < stop[index]))

    def allows(self, q: Ints, k: Ints) -> Bools:
        return np.broadcast_to(self._inside(k), np.broadcast_shapes(np.shape(q), np.shape(k)))

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        block = np.arange(grid.cols)
        touched = self._inside(block[:, None] * grid.bk + np.arange(grid.bk)).any(axis=1)
        return np.asarray(np.where(touched, block + 1, 0)[cols])


def shift_invariant(leaf: Pattern) -> bool:
    """Whether a leaf depends on k - q alone, so that the origin of positions does not matter."""
    return isinstance(leaf, Band | Offsets)


def restarted(pattern: Pattern, sequences: tuple[Piece, ...]) -> Pattern:
    """The pattern with positions counted from each sequence's origin; undefined for pairs across sequences."""
    match pattern:
        case Binary(left, right):
            return type(pattern)(restarted(left, sequences), restarted(right, sequences))
        case Not(inner):
            return Not(restarted(inner, sequences))
        case Stacked(parts):
            return type(pattern)(tuple(restarted(part, sequences) for part in parts))
        case Composed():
            return restarted(pattern.expression(), sequences)
        case _:
            return pattern if shift_invariant(pattern) else Restarted(pattern, sequences)


@dataclass(frozen=True, repr=False)
class Restarted(Pattern):
    """A leaf whose positions are counted from each sequence's origin. Queries before an origin see nothing.

    If the shift is not a multiple of the block size, a block overlaps up to four blocks of the leaf. Blocks within one
    sequence with equal shifts and equal four blocks have equal tiles, so one of each kind is evaluated.
    """

    leaf: Pattern
    sequences: tuple[Piece, ...]  # (first token, one past the last, origin), sorted
    name = "restarted"

    def at(self, grid: Grid) -> Pattern:
        return Restarted(self.leaf.at(grid), self.sequences)

    def allows(self, q: Ints, k: Ints) -> Bools:
        origin = self._origin[self._index(q)]
        return np.logical_and(self.leaf.allows(np.maximum(q - origin, 0), k - origin), q >= origin)

    @cached_property
    def _first(self) -> Ints:
        return np.array([start for start, _, _ in self.sequences], np.int64)

    @cached_property
    def _origin(self) -> Ints:
        return np.array([origin for _, _, origin in self.sequences], np.int64)

    def _index(self, position: Ints) -> Ints:
        """The sequence of each token; padding belongs to the one before it."""
        return np.maximum(np.searchsorted(self._first, position, side="right") - 1, 0)

    def _ends(self, grid: Grid) -> Ints:
        """One past the last query of each sequence, including the padding after it."""
        return np.append(self._first[1:], max(grid.q_offset + grid.q_len, self.sequences[-1][1]))

    def _inner(self, grid: Grid) -> BlockMask:
        """The leaf compiled for at least the longest sequence, rounded up so that batches share few lengths."""
        longest = int((self._ends(grid) - self._origin).max())
        length = max(longest, min(1 << (longest - 1).bit_length(), grid.kv_len))
        return compile_pattern(self.leaf, Grid(length, length, grid.bq, grid.bk, 0))

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        inner = self._inner(grid)
        rows, starts, stops = [], [], []
        for (first, last, origin), end in zip(self.sequences, self._ends(grid).tolist(), strict=True):
            runs = inner.runs
            row = runs.row
            # The queries and keys of each run of blocks, as tokens of the row.
            q = row * grid.bq + origin
            low = (runs.start - row * runs.shape[1]) * grid.bk + origin
            high = low + runs.length * grid.bk
            here = (q + grid.bq > first) & (q < end) & (low < last) & (high > first)
            q, low, high = q[here], np.maximum(low[here], first), np.minimum(high[here], last)
            for top in (q, q + grid.bq - 1):
                rows.append((top - grid.q_offset) // grid.bq)
                starts.append(low // grid.bk)
                stops.append(-(-high // grid.bk))
        row, start, stop = (np.concatenate(part) for part in (rows, starts, stops))
        exists = (row >= 0) & (row < grid.rows)
        return grid.expand(row[exists], start[exists], stop[exists])

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        inner = self._inner(grid)
        q, k = grid.q_start(rows), grid.k_start(cols)
        sequence = self._index(q)
        origin, last = self._origin[sequence], np.array([stop for _, stop, _ in self.sequences])[sequence]
        inside = np.minimum(q, k) >= np.maximum(self._first[sequence], origin)
        inside &= (q + grid.bq <= self._ends(grid)[sequence]) & (k + grid.bk <= last)
        (i, past_q), (j, past_k) = np.divmod(q - origin, grid.bq), np.divmod(k - origin, grid.bk)
        kind = past_q * grid.bk + past_k
        height, width = inner.grid_shape
        for row, col in ((i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)):
            exists = (row >= 0) & (row < height) & (col >= 0) & (col < width)
            code = np.where(exists, inner.runs.code_at(np.where(exists, row * width + col, 0)), 0)
            kind = distinct(kind * (len(inner.tiles) + 2) + code)[1]
        return np.where(inside, kind, kind.max(initial=0) + 1 + np.arange(kind.size))
