"""In which pieces the block rows of a table are worked through: some rows, and key blocks that all of them meet alike.

A piece becomes one batch of matrix products, so it wants many scores, rows of equal length and keys that need not be
copied. Hence three kinds:

- a *window*: one row whose key blocks lie side by side, for all heads at once; keys and values are read where they
  lie. It is *tall* where adjacent rows begin with the same FULL blocks (dense, below a causal diagonal): what torch's
  flash operator is fastest at. The rest of such rows is in other pieces, to be merged.
- a *band*: R rows of one key head whose windows are alike and move on by the same step; keys and values are read where
  they lie, and what neighbours share is found in a cache.
- a *gathering*: R rows with equally many blocks, whose keys and values are copied to lie side by side.

All is numpy on the host, the work of a table and not of tokens, and remembered for as long as the table lives.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels.layout import FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP, Side, Tiles

Ints = npt.NDArray[np.int64]
# Scores of one batch: 4 MB in fp32, so that what follows a product finds them in a cache.
SCORES_AT_ONCE = 1 << 20
# Of one for torch's flash operator, which holds few at a time: what is gathered for it, and its masks, take some MB.
FUSED_AT_ONCE = 1 << 21
# A window has at least so many: below that, many rows in one batch are worth a copy of their keys.
WINDOW_SCORES = 1 << 19
# Queries of a tall window; from 768 on torch's flash operator takes its largest steps. And keys at least.
TALL = 1024
WIDE = 512
# Rows of a band at least, and how many bands may be interleaved.
BAND = 4
PERIODS = 1, 2, 4


@dataclass(frozen=True)
class Masked:
    """Entries `first` to `last` of each row are PARTIAL, with these tiles."""

    first: int
    last: int
    tiles: torch.Tensor  # int64 [R, last - first]
    name: tuple[int, ...]  # the tiles of a row, if all have the same

    @classmethod
    def of(cls, first: int, tiles: torch.Tensor) -> Masked:
        name = tuple(tiles[0].tolist()) if bool((tiles == tiles[:1]).all()) else ()
        return cls(first, first + tiles.shape[1], tiles, name)

    def part(self, first: int, last: int) -> Masked:
        """What of it is in the entries from first to last, counted from first."""
        start = max(self.first, first)
        return Masked.of(start - first, self.tiles[:, start - self.first : last - self.first])


@dataclass(frozen=True)
class Piece:
    """R block rows with E entries each, or for `part` some of the entries."""

    rows: Ints  # [R], ascending
    at: slice | torch.Tensor  # the same, to index with
    short: bool  # the row is the last, and has fewer queries
    entries: int
    start: int | None  # the first key block of a window, or of the first one of a band
    step: int | None  # of a band: so many blocks from a row's first key block to the next row's
    cols: torch.Tensor | None  # int64 [R, E] of a gathering
    masked: tuple[Masked, ...]
    tall: bool
    again: bool  # the rows are in a tall window too
    blind: bool  # some query sees nothing
    ends: bool  # the last entry is the last key block, and that is short

    @property
    def window(self) -> bool:
        """Whether all rows are queries of one matrix a head; else each row has one of its own."""
        return self.cols is None and self.step is None

    def blocks(self) -> torch.Tensor:
        """int64 [R or 1, E]: the key blocks."""
        if self.cols is not None:
            return self.cols
        assert self.start is not None
        rows = 1 if self.step is None else len(self.rows)
        return self.start + (self.step or 0) * torch.arange(rows)[:, None] + torch.arange(self.entries)

    def parts(self, at_once: int) -> Iterator[Piece]:
        """The piece in steps of at most so many entries."""
        if self.entries <= at_once:
            yield self
            return
        for first in range(0, self.entries, at_once):
            last = min(self.entries, first + at_once)
            yield replace(
                self,
                entries=last - first,
                start=None if self.start is None else self.start + first,
                cols=None if self.cols is None else self.cols[:, first:last],
                masked=tuple(m.part(first, last) for m in self.masked if m.first < last and m.last > first),
                ends=self.ends and last == self.entries,
            )


@dataclass(frozen=True)
class Plan:
    """All pieces of one pattern, and the rows that are in none."""

    pieces: list[Piece]
    empty: Ints

    @property
    def banded(self) -> bool:
        """Whether most blocks are in bands."""
        blocks = [len(piece.rows) * piece.entries * (1 if piece.step is None else -1) for piece in self.pieces]
        return sum(blocks) < 0


# For the spans of a side: what was asked, the other tensors it was asked of, and the answer.
_Known = dict[tuple[object, ...], tuple[tuple[torch.Tensor, ...], Plan]]
_plans = WeakTensorKeyDictionary()


def plan(
    side: Side,
    tiles: Tiles,
    pattern: int,
    block: tuple[int, int],
    q_len: int,
    kv_len: int,
    heads: int,
    alone: bool,
    tall: bool,
    at_once: int,
) -> Plan:
    """How the rows of a pattern are worked through, for so many query heads and scores at once.

    With bands where the heads share one key head, `alone`, and with tall windows where these may be.
    """
    known: _Known = _plans.setdefault(side.spans, {})
    tensors = side.full, side.partial, side.tile, tiles.bits
    key = pattern, block, q_len, kv_len, heads, alone, tall, at_once, WINDOW_SCORES, TALL, WIDE, BAND
    if key not in known or any(a is not b for a, b in zip(tensors, known[key][0], strict=True)):
        known[key] = tensors, _Planner(side, tiles, pattern, block, q_len, kv_len, heads, at_once).plan(alone, tall)
    return known[key][1]


class _Planner:
    def __init__(
        self, side: Side, tiles: Tiles, pattern: int, block: tuple[int, int], q_len: int, kv_len: int, heads: int,
        at_once: int,
    ) -> None:  # fmt: skip
        self.full, self.partial, self.tile = (x.numpy() for x in (side.full, side.partial, side.tile))
        self.spans = side.spans[pattern].numpy().astype(np.int64)  # a copy
        self.blind = (tiles.bits.numpy() == 0).all(-1)  # [T, BQ]: a query that sees nothing of a tile
        self.heads, self.height, self.area = heads, block[0], heads * block[0] * block[1]
        self.at_once = at_once
        self.short_row = q_len // block[0] if q_len % block[0] else -1
        self.queries_there = q_len % block[0]
        self.short_col = kv_len // block[1] if kv_len % block[1] else -1

    def plan(self, alone: bool, tall: bool) -> Plan:
        spans = self.spans
        pieces = list(self._tall()) if tall else []
        met = np.zeros(len(spans), bool)
        for piece in pieces:
            met[piece.rows] = True
        fulls, partials = spans[:, FULL_STOP] - spans[:, FULL_START], spans[:, PARTIAL_STOP] - spans[:, PARTIAL_START]
        entries = fulls + partials
        low, high = self._bounds(fulls > 0, partials > 0)
        adjacent = (high - low + 1 == entries) & (entries > 0)
        ends = high == self.short_col
        kinds = np.stack([fulls, partials, ends, np.arange(len(spans)) == self.short_row, met], 1)
        left = entries > 0
        if alone:
            for rows in self._bands(adjacent.nonzero()[0], kinds, low):
                left[rows] = False
                pieces += [self._window(x, low, entries, met) for x in self._batches(rows, int(entries[rows[0]]))]
        windows = left & adjacent & (entries * self.area >= WINDOW_SCORES)
        pieces += [self._window(row, low, entries, met) for row in windows.nonzero()[0][:, None]]
        others = (left & ~windows).nonzero()[0]
        for kind in np.unique(kinds[others], axis=0):
            rows = others[(kinds[others] == kind).all(1)]
            some = self._batches(rows, int(kind[0] + kind[1]))
            pieces += [self._gathering(x, int(kind[0]), int(kind[1]), bool(kind[2]), bool(kind[4])) for x in some]
        return Plan(pieces, ((entries == 0) & ~met).nonzero()[0])

    def _batches(self, rows: Ints, entries: int) -> list[Ints]:
        """Rows of so many entries, as many at once as the scores allow: an even number, for two threads and more."""
        at_once = max(1, self.at_once // (self.area * entries))
        at_once -= at_once % 2 if at_once > 1 else 0
        return np.split(rows, range(at_once, len(rows), at_once))

    def _bands(self, rows: Ints, kinds: Ints, low: Ints) -> Iterator[Ints]:
        """Rows of adjacent key blocks, PARTIAL ones at the same places, at even distances, moving on by even steps."""
        alike: dict[bytes, list[int]] = {}
        for row in rows.tolist():
            alike.setdefault(kinds[row].tobytes() + (self._partials(row) - low[row]).tobytes(), []).append(row)
        for some in map(np.array, alike.values()):
            for apart in PERIODS:  # in an image, some rows in turn may see the same rows of pixels
                moves = np.stack([x[apart:] - x[:-apart] for x in (some, low[some])], 1)
                if len(some) >= BAND * apart and (moves == moves[0]).all() and moves[0, 1] >= 0:
                    yield from (some[first::apart] for first in range(apart))
                    break

    def _partials(self, row: int) -> Ints:
        """The PARTIAL key blocks of a row."""
        return self.partial[self.spans[row, PARTIAL_START] : self.spans[row, PARTIAL_STOP]].astype(np.int64)

    def _bounds(self, any_full: npt.NDArray[np.bool_], any_partial: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """The first and last key block of each row."""
        low, high = np.full(len(self.spans), 1 << 40), np.full(len(self.spans), -1)
        for some, blocks, start, stop in (
            (any_full, self.full, FULL_START, FULL_STOP),
            (any_partial, self.partial, PARTIAL_START, PARTIAL_STOP),
        ):
            low[some] = np.minimum(low[some], blocks[self.spans[some, start]])
            high[some] = np.maximum(high[some], blocks[self.spans[some, stop] - 1])
        return low, high

    def _tall(self) -> Iterator[Piece]:
        """Tall windows, which are taken off the spans."""
        count, size = TALL // self.height, self.area // (self.heads * self.height)
        starts, lengths = self.spans[:, FULL_START], self.spans[:, FULL_STOP] - self.spans[:, FULL_START]
        for first in range(0, len(self.spans) - count + 1, count):
            some = slice(first, first + count)
            common = int(lengths[some].min())
            if common * size < WIDE or first + count - 1 == self.short_row:
                continue
            heads, tails = self.full[starts[some]], self.full[starts[some] + common - 1]
            # Blocks are listed in ascending order: these are adjacent ones.
            if (heads == heads[0]).all() and (tails - heads == common - 1).all():
                where = self._rows(np.arange(first, first + count))
                self.spans[some, FULL_START] += common
                yield Piece(
                    *where, common, int(heads[0]), None, None, (), tall=True, again=False, blind=False, ends=False
                )

    def _window(self, rows: Ints, low: Ints, entries: Ints, met: npt.NDArray[np.bool_]) -> Piece:
        """The window of one row, or the band of several."""
        row = int(rows[0])
        places = self._partials(row) - low[row]
        tiles = self.tile[self.spans[rows, PARTIAL_START, None] + np.arange(len(places))].astype(np.int64)
        cuts = (np.diff(places) != 1).nonzero()[0] + 1
        masked = tuple(
            Masked.of(int(where[0]), torch.from_numpy(their))
            for where, their in zip(np.split(places, cuts), np.split(tiles, cuts, axis=1), strict=True)
            if len(where)
        )
        return Piece(
            *self._rows(rows),
            entries=int(entries[row]),
            start=int(low[row]),
            step=int(low[rows[1]] - low[row]) if len(rows) > 1 else None,
            cols=None,
            masked=masked,
            tall=False,
            again=bool(met[row]),
            blind=self._blind(int(rows[-1]), tiles, int(entries[row]) - len(places)),
            ends=bool(low[row] + entries[row] - 1 == self.short_col),
        )

    def _gathering(self, rows: Ints, fulls: int, partials: int, ends: bool, again: bool) -> Piece:
        spans = self.spans[rows]
        where = spans[:, PARTIAL_START, None] + np.arange(partials)
        cols = np.concatenate([self.full[spans[:, FULL_START, None] + np.arange(fulls)], self.partial[where]], 1)
        tiles = self.tile[where].astype(np.int64)
        return Piece(
            *self._rows(rows),
            entries=fulls + partials,
            start=None,
            step=None,
            cols=torch.from_numpy(cols.astype(np.int64)),
            masked=(Masked.of(fulls, torch.from_numpy(tiles)),) if partials else (),
            tall=False,
            again=again,
            blind=self._blind(int(rows[-1]), tiles, fulls),
            ends=ends,
        )

    def _rows(self, rows: Ints) -> tuple[Ints, slice | torch.Tensor, bool]:
        if rows[0] == self.short_row:
            return rows, slice(0, 1), True
        step = int(rows[1] - rows[0]) if len(rows) > 1 else 1
        if (np.diff(rows) == step).all():
            return rows, slice(int(rows[0]), int(rows[-1]) + 1, step), False
        return rows, torch.from_numpy(rows), False

    def _blind(self, last: int, tiles: Ints, fulls: int) -> bool:
        if fulls:
            return False
        blind = self.blind[tiles].all(1)
        return bool(blind[:, : self.queries_there if last == self.short_row else None].any())
