"""Operands of attention on a CPU as batches of matrices: block rows of queries, key blocks of keys, masks of tiles.

Shape legend: H key heads, G query heads that share one, R block rows, X queries a row, E entries (key blocks) a row,
L keys of them, N / M tokens, BQ x BK tokens a block, D head dim. A batch has n matrices: of a window H with G * R * X
queries each, of a band or gathering H * R with G * X; seen as five dims both are [H, G, R, X, ...].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sparseflash.kernels.cpu_plan import Ints, Masked, Piece, Plan, plan
from sparseflash.kernels.layout import Side, Tiles

# Bytes of unpacked tiles that are kept for a call.
TILES_HELD = 1 << 23
# Rows of tiles that are kept as they were last needed.
RECENT = 4
# Bytes of what a call copies of K and V or sums up of their gradients, or one head's.
KEYS_HELD = 1 << 25
# Bytes of K or V that are converted for a bundle at once; more are converted piece by piece.
WIDENED = KEYS_HELD // 4
# Numbers of a key block's gradient, for all heads, below which those of many rows are added in one call.
SMALL = 1 << 12
# Keys that a batch has at least, before its heads are taken apart to bound its scores.
LONG = 1024


class Scratch:
    """Memory by name, kept from batch to batch: the first write to fresh memory costs more than a copy."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.held: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        key, size = (name, dtype or self.dtype), math.prod(shape)
        if key not in self.held or self.held[key].numel() < size:
            self.held[key] = torch.empty(size, dtype=key[1])
        return self.held[key][:size].view(shape)


@dataclass(frozen=True)
class Lane:
    """Key heads at even distances, and the query heads of each that share a pattern, at even distances too."""

    keys: slice
    places: slice
    heads: torch.Tensor  # int64 [H, G] flat (sample, query head)
    plan: Plan

    def five(self, x: torch.Tensor, piece: Piece) -> torch.Tensor:
        """[n, queries, ...] as [H, G, R, X, ...]."""
        (heads, group), rows = self.heads.shape, len(piece.rows)
        if not piece.window:
            return x.view(heads, rows, group, -1, *x.shape[2:]).transpose(1, 2)
        return x.view(heads, group, rows, -1, *x.shape[2:])


def bundles(
    patterns: Ints,  # [Hkv, G]
    first_head: int,
    side: Side,
    tiles: Tiles,
    block: tuple[int, int],
    lengths: tuple[int, int],
    bytes_a_head: int,
    tall: bool,
    scores_at_once: int,
) -> Iterator[list[Lane]]:
    """All query heads, in bundles of lanes with the same key heads, as many as memory allows."""
    group = patterns.shape[1]
    scores = group * block[0] * min(lengths[1], LONG)
    at_once = max(1, min(scores_at_once // scores, KEYS_HELD // max(1, bytes_a_head)))
    numbers = np.arange(patterns.size).reshape(patterns.shape) + first_head
    for members in np.unique(patterns, axis=0):
        # Bands are of one key head: neighbouring rows of a head share keys, heads share nothing.
        known = [
            plan(side, tiles, pattern, block, *lengths, group, True, tall, scores_at_once)
            for pattern in np.unique(members).tolist()
        ]
        heads_at_once = 1 if all(found.banded for found in known) else at_once
        for keys in _slices((patterns == members).all(1).nonzero()[0], heads_at_once):
            bundle = []
            for pattern in np.unique(members).tolist():
                for places in _slices((members == pattern).nonzero()[0], group):
                    heads = numbers[keys, places]
                    alone = len(heads) == 1
                    plans = plan(side, tiles, pattern, block, *lengths, heads.size, alone, tall, scores_at_once)
                    bundle.append(Lane(keys, places, torch.from_numpy(heads), plans))
            yield bundle


def _slices(numbers: Ints, at_once: int) -> Iterator[slice]:
    """Ascending numbers as few slices of at most so many."""
    first = 0
    while first < len(numbers):
        step = int(numbers[first + 1] - numbers[first]) if first + 1 < len(numbers) else 1
        last = first + 1
        while last < len(numbers) and last - first < at_once and numbers[last] - numbers[last - 1] == step:
            last += 1
        yield slice(int(numbers[first]), int(numbers[last - 1]) + 1, step)
        first = last


class Queries:
    """Block rows of q, out, lse or the like, [Hkv, G, N, ...], for the heads of a lane."""

    def __init__(self, x: torch.Tensor, lane: Lane, size: int, dtype: torch.dtype) -> None:
        self.whole, self.dtype, self.lane = x.shape[2] // size, dtype, lane
        x = x[lane.keys, lane.places]
        self.blocks = x[:, :, : self.whole * size].unflatten(2, (self.whole, size))
        self.short = x[:, :, self.whole * size :].unsqueeze(2)  # the last row, if it is not whole

    def of(self, piece: Piece) -> torch.Tensor:
        """[n, queries, ...] in the dtype of the work: a view where they lie so."""
        found = (self.short if piece.short else self.blocks)[:, :, piece.at]
        if not piece.window:
            return found.transpose(1, 2).flatten(2, 3).flatten(0, 1).to(self.dtype)
        return found.flatten(1, 3).to(self.dtype)

    def put(self, piece: Piece, value: torch.Tensor) -> None:
        """Write [n, queries, ...] there."""
        blocks = self.short if piece.short else self.blocks
        blocks[:, :, piece.at] = self.lane.five(value, piece).to(blocks.dtype)

    def add(self, piece: Piece, value: torch.Tensor) -> None:
        """Add [n, queries, ...] to what is there."""
        self.put(piece, value + self.of(piece))

    def clear(self, fill: float) -> None:
        """Write `fill` to the rows that meet no key."""
        for row in self.lane.plan.empty.tolist():
            if row < self.whole:
                self.blocks[:, :, row] = fill
            else:
                self.short.fill_(fill)


class Keys:
    """Key blocks of K or V, [H, M, D], for the key heads of a bundle."""

    def __init__(self, x: torch.Tensor, bundle: list[Lane], size: int, scratch: Scratch, name: str) -> None:
        self.x, self.size, self.scratch, self.name = x, size, scratch, name
        self.whole, self.spare = x.shape[1] // size, -x.shape[1] % size
        gathers = any(piece.cols is not None for lane in bundle for piece in lane.plan.pieces)
        if x.dtype != scratch.dtype and x.numel() * scratch.dtype.itemsize <= WIDENED:
            self.x = scratch(f"all {name}", *x.shape).copy_(x)
        if gathers and self.x.stride()[1:] != (x.shape[2], 1):
            self.x = self.x.contiguous()
        self.blocks = self.x[:, : self.whole * size].unflatten(1, (self.whole, size))
        self.blocks = self.blocks.flatten(2) if gathers else self.blocks

    def count(self, piece: Piece) -> int:
        return piece.entries * self.size - (self.spare if piece.ends else 0)

    def window(self, piece: Piece) -> torch.Tensor:
        """[n, L, D] of a window or a band, where they lie."""
        assert piece.start is not None
        first = piece.start * self.size
        found = self.x[:, first : first + self.count(piece)]
        if piece.step is None:
            return found
        _, token, entry = self.x.stride()
        strides = piece.step * self.size * token, token, entry
        return found.as_strided((len(piece.rows), *found.shape[1:]), strides, found.storage_offset())

    def of(self, piece: Piece, copy: bool = False) -> torch.Tensor:
        """[n, L, D] in the dtype of the work; with `copy`, no view of K."""
        if piece.start is not None:
            found = self.window(piece)
        else:
            assert piece.cols is not None
            heads, dim = len(self.x), self.x.shape[2]
            index = piece.cols.clamp(max=max(0, self.whole - 1)).flatten() if piece.ends else piece.cols.flatten()
            found = self.scratch(self.name, heads, len(index), self.size * dim, dtype=self.x.dtype)
            if self.whole:
                torch.index_select(self.blocks, 1, index, out=found)
            found = found.view(heads * len(piece.rows), -1, dim)
            if piece.ends:
                last = found.unflatten(0, (heads, -1))[:, :, -self.size : found.shape[1] - self.spare]
                last.copy_(self.x[:, None, self.whole * self.size :])
                found = found[:, : self.count(piece)]
        if found.dtype != self.scratch.dtype or (copy and piece.start is not None):
            found = self.scratch(f"wide {self.name}", *found.shape).copy_(found)
        return found


class Sums:
    """Gradients of K or V for the key heads of a bundle, summed up and then written to `into` [H, M, D].

    They are held as [H, D, M]: the product of transposed queries and scores takes two thirds of the time of its
    transpose. The memory of `into` holds them until then, if it can.
    """

    def __init__(self, into: torch.Tensor, size: int, scratch: Scratch, name: str) -> None:
        heads, tokens, dim = into.shape
        self.into, self.size, self.scratch, self.name = into, size, scratch, name
        self.there = into.is_contiguous() and into.dtype == scratch.dtype
        self.x = into.view(heads, dim, tokens) if self.there else scratch(name, heads, dim, tokens)
        self.x.zero_()
        self.whole = tokens // size
        self.blocks = self.x[..., : self.whole * size].unflatten(2, (self.whole, size))

    def write(self) -> None:
        """Write the sums, which end with that."""
        sums = self.scratch("turned", *self.x.shape).copy_(self.x) if self.there else self.x
        self.into.copy_(sums.mT)

    def take(self, piece: Piece, part: torch.Tensor) -> None:
        """Add part [H, L, D] to the blocks of a window."""
        assert piece.start is not None
        self.x[..., piece.start * self.size : piece.start * self.size + part.shape[1]] += part.mT

    def add(self, piece: Piece, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> None:
        """Add alpha * right.mT @ left, of left [n, queries, D] and right [n, queries, L], to these blocks."""
        keys = right.shape[2]
        if piece.window:
            assert piece.start is not None
            here = self.x[..., piece.start * self.size : piece.start * self.size + keys]
            here.baddbmm_(left.mT, right, alpha=alpha)
            return
        part = self.scratch(f"part of {self.name}", len(left), left.shape[2], keys)
        torch.baddbmm(part, left.mT, right, beta=0, alpha=alpha, out=part)
        if piece.cols is None:
            assert piece.start is not None
            assert piece.step is not None
            for row, its in enumerate(part):
                first = (piece.start + row * piece.step) * self.size
                self.x[0, :, first : first + keys] += its
            return
        whole = piece.entries - piece.ends
        its = part.unflatten(0, (len(self.x), -1)).transpose(1, 2)  # [H, D, R, L]
        blocks, short = its[..., : whole * self.size].unflatten(3, (whole, self.size)), its[..., whole * self.size :]
        if len(self.x) * left.shape[2] * self.size < SMALL:
            self.blocks.index_add_(2, piece.cols[:, :whole].flatten(), blocks.flatten(2, 3))
        else:  # the copy would cost more than calls
            for row, cols in enumerate(piece.cols[:, :whole]):
                self.blocks.index_add_(2, cols, blocks[:, :, row])
        if piece.ends:
            for row in short.unbind(2):
                self.x[..., self.whole * self.size :] += row


class Masks:
    """What PARTIAL blocks hide: scores by their tile, and keys that no query of the block sees."""

    def __init__(self, tiles: Tiles, block: tuple[int, int], dtype: torch.dtype, written: bool = False) -> None:
        self.tiles, self.block, self.dtype = tiles, block, dtype
        self.written = written  # scores may not be finite
        self.eight = _hidden(torch.arange(256, dtype=torch.uint8), dtype)
        held = len(tiles.bits) * block[0] * block[1] * dtype.itemsize <= TILES_HELD
        self.held = self._unpacked(tiles.bits) if held else None
        self.recent: dict[tuple[int, ...], torch.Tensor] = {}

    def hide(self, scores: torch.Tensor, piece: Piece) -> None:
        """-inf in scores [H, G, R, X, L] where the tile of a PARTIAL entry has a 0."""
        if self.written:  # the sum of -inf and NaN or inf would be NaN
            self.fill(scores, piece, -torch.inf)
            return
        for here, tile in self._masked(scores, piece):
            here += tile

    def fill(self, scores: torch.Tensor, piece: Piece, value: float) -> None:
        """`value` in scores [H, G, R, X, L] where `hide` writes -inf."""
        for here, tile in self._masked(scores, piece):
            here.masked_fill_(tile == -torch.inf, value)

    def _masked(self, scores: torch.Tensor, piece: Piece) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The scores of PARTIAL entries, and 0 or -inf for each of them."""
        queries, keys = scores.shape[-2:]
        for some in piece.masked:
            first, last = some.first * self.block[1], min(some.last * self.block[1], keys)
            yield scores[..., first:last], self._rows(some)[:, :queries, : last - first]

    def all(self, piece: Piece, scratch: Scratch, group: int, queries: int, keys: int) -> torch.Tensor | None:
        """What `hide` adds for X queries of L keys: 0 or -inf [R or 1, G * X, L]; None if nothing.

        It lies in scratch memory, until the next call.
        """
        if not piece.masked:
            return None
        tiles, size = [self._rows(some)[:, :queries] for some in piece.masked], self.block[1]
        found = scratch("hidden", max(map(len, tiles)), group, queries, keys).zero_()
        for some, tile in zip(piece.masked, tiles, strict=True):
            here = found[..., some.first * size : some.last * size]
            here.copy_(tile[:, None, :, : here.shape[-1]])
        return found.flatten(1, 2)

    def _rows(self, some: Masked) -> torch.Tensor:
        """0 or -inf [R, BQ, n * BK], or [1, BQ, n * BK] for all rows."""
        if some.name in self.recent:
            return self.recent[some.name]
        which = some.tiles[:1] if some.name else some.tiles
        # Whole rows at a time: `index_select` copies, an index expression walks.
        if self.held is None:
            found = self._unpacked(self.tiles.bits.index_select(0, which.flatten()))
        else:
            found = self.held.index_select(0, which.flatten())
        found = found.view(*which.shape, *found.shape[1:]).transpose(1, 2).flatten(2)
        if some.name:
            if len(self.recent) >= RECENT:
                self.recent.clear()
            self.recent[some.name] = found
        return found

    def clean(self, piece: Piece, *operands: torch.Tensor) -> None:
        """Zero the keys of operands [n, L, D] that no query sees: 0 * NaN would be NaN."""
        for some in piece.masked:
            unseen = (self._unpacked(self.tiles.seen_keys[some.tiles]) != 0).flatten(1)  # [R, n * BK]
            for operand in operands:
                tail = operand.unflatten(0, (-1, len(unseen)))[:, :, some.first * self.block[1] :][
                    :, :, : unseen.shape[1]
                ]
                tail.masked_fill_(unseen[:, : tail.shape[2], None], 0)

    def _unpacked(self, words: torch.Tensor) -> torch.Tensor:
        """Words [..., W] to [..., BK]: 0 where a bit is 1, -inf where it is 0."""
        # A table look-up for every eight bits is a tenth of the time of shifting them apart.
        eights = words.view(torch.uint8)[..., : self.block[1] // 8]
        return self.eight.index_select(0, eights.flatten().int()).view(*words.shape[:-1], -1)


def _hidden(numbers: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [n] to [n, 8]: 0 where their bit is 1, -inf where it is 0; the least bit first."""
    bits = (numbers.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return torch.zeros(bits.shape, dtype=dtype).masked_fill_(bits == 0, -torch.inf)
