"""Tables of padded batches: one mask, of which every sample keeps the part before its own end.

A batch has new lengths at every step, so nothing here depends on their values but the numbers in the table: it is made
on the device, from the table of the whole mask, without waiting for the device and without a cache that grows.

The blocks of a line are listed in ascending order, so a shorter sample reads the beginning of the same list. Only the
block column in which a sample ends is new: its blocks are cut at the end, each by a tile of its own.

Shape legend: B samples, K patterns of each, P patterns of the mask, n lines of a side, R runs, nQ x nK blocks of
BQ x BK tokens, W words per tile row, T tiles of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import TABLES
from sparseflash.patterns.overlay import transposed
from sparseflash.patterns.runs import EMPTY, FULL, Runs
from sparseflash.tables.device import READ_AHEAD, check_not_capturing, per_device, unless_fake
from sparseflash.tables.lookup import lookup
from sparseflash.tables.table import LookupTable

LARGEST_INDEX = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Lines:
    """One side of the whole table, and its runs, in which a binary search counts the blocks before any position.

    The runs begin with an empty one before all blocks, so that every position has a run at or before it.
    """

    side: BlockLists
    shape: tuple[int, int]  # n lines, and blocks on the other side
    start: Tensor  # int64 [R + 1]: positions line * others + other, patterns one below the other
    length: Tensor  # int64 [R + 1]
    code: Tensor  # int64 [R + 1]
    full_before: Tensor  # int64 [R + 1]: FULL blocks in earlier runs
    partial_before: Tensor  # int64 [R + 1]

    @classmethod
    def of(cls, side: BlockLists, runs: Runs, patterns: int, device: torch.device) -> Lines:
        def on_device(first: int, array: NDArray[np.integer]) -> Tensor:
            return torch.from_numpy(np.concatenate([[first], array]).astype(np.int64)).to(device)

        filled = runs.length * (runs.code == FULL)
        before = (np.cumsum(counted) - counted for counted in (filled, runs.length - filled))
        return cls(
            side,
            (runs.shape[0] // patterns, runs.shape[1]),
            on_device(-1, runs.start),
            on_device(0, runs.length),
            on_device(EMPTY, runs.code),
            *(on_device(0, count) for count in before),
        )

    def first_places(self, which: Tensor) -> Tensor:
        """Where the lines of patterns [..., K] begin, [..., K, n]."""
        n, others = self.shape
        return (which[..., None] * n + torch.arange(n, device=which.device)) * others

    def counts_before(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers of FULL and of PARTIAL blocks before each position."""
        run = torch.searchsorted(self.start, place, right=True) - 1
        inside = torch.minimum(place - self.start[run], self.length[run])
        is_full = self.code[run] == FULL
        return self.full_before[run] + inside * is_full, self.partial_before[run] + inside * ~is_full

    def counts(self, which: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """FULL and PARTIAL blocks of each line before the block `stop` [B] of the other side, [B, K, n] each."""
        first = self.first_places(which)
        begin, end = self.counts_before(first), self.counts_before(first + stop[:, None, None])
        return end[0] - begin[0], end[1] - begin[1]

    def codes(self, which: Tensor, other: Tensor) -> Tensor:
        """The code of each line at the block `other` [B], [B, K, n]."""
        place = self.first_places(which) + other[:, None, None]
        run = torch.searchsorted(self.start, place, right=True) - 1
        return self.code[run] * (place < self.start[run] + self.length[run])


@dataclass(frozen=True)
class Rooms:
    """The positions of the PARTIAL entries of each row in the list of a sample, with space for one more per row."""

    source: Tensor  # int64 [P, S]: position of the entry in the list of the whole table
    row: Tensor  # int64 [P, S]: row of the entry
    place: Tensor  # int64 [P, S]: position in the space of its row
    start: Tensor  # int64 [P, nQ]: where the space of each row starts

    @classmethod
    def of(cls, ranges: NDArray[np.int64], device: torch.device) -> Rooms:
        """From the ranges [P, nQ, 4] of the rows."""
        start, size = ranges[..., 2], ranges[..., 3] - ranges[..., 2] + 1
        room = np.cumsum(size, axis=1) - size
        patterns, rows = room.shape
        source, row, place = (np.zeros((patterns, int(size.sum(1).max())), np.int64) for _ in range(3))
        for p in range(patterns):
            filled = slice(0, int(size[p].sum()))
            row[p, filled] = np.repeat(np.arange(rows), size[p])
            place[p, filled] = np.arange(filled.stop) - room[p][row[p, filled]]
            source[p, filled] = start[p][row[p, filled]] + place[p, filled]
            place[p, filled.stop :] = -1
        return cls(*(torch.from_numpy(x).to(device) for x in (source, row, place, room.astype(np.int64))))


@dataclass(frozen=True)
class Whole:
    """The parts of a mask that do not depend on lengths: its table, and an index into it."""

    table: LookupTable
    rows: Lines
    columns: Lines
    rooms: Rooms
    which: Tensor  # int64 [samples or 1, K]: the patterns of each sample
    pattern_of: Tensor  # int64 [samples or 1, heads or 1]: which of these K a head has
    tiles: Tensor  # int32 [T + 2, BQ, W]: bits by code
    low_bits: Tensor  # int32 [33]: word i has its i lowest bits set


def whole(mask: BlockMask, device: torch.device) -> Whole:
    """The starting point of :func:`shortened`, cached by mask and device."""
    return unless_fake(_whole)(mask, device)


@TABLES.bounds
@per_device(maxsize=64)
def _whole(mask: BlockMask, device: torch.device) -> Whole:
    check_not_capturing(device)
    table, runs, patterns = lookup(mask, device), mask.runs, mask.patterns
    samples, heads = mask.pattern_of.shape
    # If samples differ, each has one pattern per head; otherwise each has all patterns of the mask.
    which = mask.pattern_of if samples > 1 else np.arange(patterns)[None]
    pattern_of = np.arange(heads)[None] if samples > 1 else mask.pattern_of
    bits = table.tiles.bits[: len(mask.tiles)]
    low_bits = np.array([(1 << count) - 1 for count in range(33)], np.uint32).view(np.int32)
    found = Whole(
        table,
        Lines.of(table.rows, runs, patterns, device),
        Lines.of(table.columns, transposed(runs, patterns), patterns, device),
        Rooms.of(table.rows.ranges.cpu().numpy().astype(np.int64), device),
        torch.from_numpy(which.astype(np.int64)).to(device),
        torch.from_numpy(pattern_of.astype(np.int64)).to(device),
        torch.cat([bits.new_zeros(1, *bits.shape[1:]), bits.new_full((1, *bits.shape[1:]), -1), bits]),
        torch.from_numpy(low_bits).to(device),
    )
    sides, rooms = (found.rows, found.columns), (found.rooms.source, found.rooms.row, found.rooms.place)
    TABLES.spend(found.tiles.nbytes + sum(5 * s.start.nbytes for s in sides) + sum(r.nbytes for r in rooms))
    return found


def shortened(mask: BlockMask, lengths: Tensor) -> LookupTable:
    """The table of a batch whose sample b is the first ``lengths[b]`` tokens of the mask, then padding.

    A query of the padding sees nothing if its whole block is padding, otherwise the keys of the sample that the mask
    allows. Heavy lines are not split, because the host does not know their length.

    Args:
        mask: for N queries and N keys.
        lengths: int64 [B] on the device of the table, within 0 to N.

    Raises:
        ValueError: a mask per sample for another number of samples, or more entries than an int32 can index.
    """
    base = whole(mask, lengths.device)
    (bq, bk), nq, samples = mask.block, mask.grid_shape[0], lengths.shape[0]
    if base.which.shape[0] not in (1, samples):
        raise ValueError(f"the mask is for {base.which.shape[0]} samples, lengths are those of {samples}")
    K = base.which.shape[1]
    which = base.which.expand(samples, K)
    most = samples * K * max(base.rooms.source.shape[1], nq) + base.table.columns.partial_indices.shape[0]
    if most > LARGEST_INDEX - READ_AHEAD:
        raise ValueError(f"a table of {most:,} entries is past what int32 can index; take fewer samples")
    last_column, keys_left = lengths // bk, lengths % bk  # the block column in which a sample ends, and its keys there
    rows = -(-lengths // bq)  # block rows of a sample

    there = torch.arange(nq, device=lengths.device) < rows[:, None, None]  # [B, 1, nQ]
    ending = there & (keys_left > 0)[:, None, None]
    code = base.rows.codes(which, last_column) * ending  # [B, K, nQ]
    words = torch.arange(base.tiles.shape[2], device=lengths.device) * 32
    seen_there = base.low_bits[(keys_left[:, None] - words).clamp(0, 32)]  # [B, W]
    cut = base.tiles[code] & seen_there[:, None, None, None]  # [B, K, nQ, BQ, W]
    cut_seen = _any(cut)
    is_cut = (cut_seen != 0).any(-1)
    tile = len(base.table.tiles.bits) + torch.arange(code.numel(), device=lengths.device).view_as(code)

    return LookupTable(
        shape=mask.shape,
        block=mask.block,
        q_offset=mask.q_offset,
        rows=_rows(base, which, there, last_column, is_cut, tile),
        columns=_columns(base, which, rows, last_column, is_cut, tile),
        tiles=Tiles(
            torch.cat([base.table.tiles.bits, cut.flatten(0, 2)]),
            torch.cat([base.table.tiles.seen_keys, cut_seen.flatten(0, 2)]),
        ),
        pattern_of=(torch.arange(samples, device=lengths.device)[:, None] * K + base.pattern_of).int(),
    )


def _rows(base: Whole, which: Tensor, there: Tensor, last_column: Tensor, is_cut: Tensor, tile: Tensor) -> BlockLists:
    """Rows: FULL entries unchanged, PARTIAL entries copied, followed by the block that was cut."""
    whole_side, rooms = base.rows.side, base.rooms
    full, partial = (count * there for count in base.rows.counts(which, last_column))
    source, row, place = (x[which] for x in (rooms.source, rooms.row, rooms.place))  # [B, K, S]
    is_new = place == partial.gather(2, row)
    new = last_column.clamp(max=base.rows.shape[1] - 1)[:, None, None]  # not read if nothing was cut
    others = torch.where(is_new, new, whole_side.partial_indices[source])
    tiles = torch.where(is_new, tile.gather(2, row), whole_side.partial_tiles[source])
    lists = torch.arange(which.numel(), device=which.device).view_as(which)[..., None] * source.shape[2]
    full_start = whole_side.ranges[which][..., 0]
    start = lists + rooms.start[which]
    ranges = torch.stack([full_start, full_start + full, start, start + partial + is_cut], -1)
    return _side(ranges, whole_side.full_indices, others.flatten(), tiles.flatten())


def _columns(base: Whole, which: Tensor, rows: Tensor, last_column: Tensor, is_cut: Tensor, tile: Tensor) -> BlockLists:
    """Columns: unchanged before a sample's last one, up to its last row; the last one from the blocks that were cut."""
    whole_side = base.columns.side
    column = torch.arange(base.columns.shape[0], device=which.device)
    before, last = column < last_column[:, None, None], column == last_column[:, None, None]  # [B, 1, nK]
    full, partial = (count * before for count in base.columns.counts(which, rows))
    cut_rows = (~is_cut).int().argsort(dim=-1, stable=True)  # [B, K, nQ]: in ascending order, and then the other rows
    lists = torch.arange(which.numel(), device=which.device).view_as(which)[..., None] * cut_rows.shape[2]
    old = whole_side.ranges[which]
    start = torch.where(last, len(whole_side.partial_indices) + lists, old[..., 2])
    stop = start + torch.where(last, is_cut.sum(-1, keepdim=True), partial)
    ranges = torch.stack([old[..., 0], old[..., 0] + full, start, stop], -1)
    partials = torch.cat([whole_side.partial_indices, cut_rows.flatten()])
    partial_tiles = torch.cat([whole_side.partial_tiles, tile.gather(2, cut_rows).flatten()])
    return _side(ranges, whole_side.full_indices, partials, partial_tiles)


def _side(ranges: Tensor, full: Tensor, partial: Tensor, tile: Tensor) -> BlockLists:
    """A side from its ranges [B, K, n, 4] and its lists."""
    ranges = ranges.flatten(0, 1)
    weight = ranges[..., 1] - ranges[..., 0] + ranges[..., 3] - ranges[..., 2]
    order = weight.argsort(dim=1, descending=True, stable=True)
    partial, tile = (F.pad(x, (0, READ_AHEAD)).int() for x in (partial, tile))
    work, reductions = (ranges.new_empty((len(ranges), 0, fields), dtype=torch.int32) for fields in (6, 3))
    return BlockLists(ranges.int(), full, partial, tile, order.int(), work, reductions)


def _any(words: Tensor) -> Tensor:
    """[..., BQ, W] to [..., W]: the OR over all queries; BQ is a power of two."""
    while words.shape[-2] > 1:
        half = words.shape[-2] // 2
        words = words[..., :half, :] | words[..., half:, :]
    return words[..., 0, :]
