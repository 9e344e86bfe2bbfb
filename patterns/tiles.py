"""Tiles: the token bits inside PARTIAL blocks, packed 32 keys per word.

A tile array is uint32 [T, BQ, ceil(BK / 32)]; bit j of word w in row i is key ``32 w + j``. Bits past BK are 0.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL, frozen

Words = NDArray[np.uint32]

TILES_AT_ONCE = 1024


def words_per_row(bk: int) -> int:
    return -(-bk // 32)


def pack(bits: NDArray[np.bool_]) -> Words:
    """Booleans [..., BQ, BK] to words [..., BQ, ceil(BK / 32)]."""
    bk = bits.shape[-1]
    packed = np.packbits(bits, axis=-1, bitorder="little")
    spare = words_per_row(bk) * 4 - packed.shape[-1]
    if spare:
        packed = np.concatenate([packed, np.zeros((*packed.shape[:-1], spare), np.uint8)], axis=-1)
    return np.ascontiguousarray(packed).view("<u4").astype(np.uint32, copy=False)


def unpack(words: Words, bk: int) -> NDArray[np.bool_]:
    """Words [..., BQ, ceil(BK / 32)] to booleans [..., BQ, BK]."""
    as_bytes = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    return np.unpackbits(as_bytes, axis=-1, bitorder="little", count=bk).view(np.bool_)


def no_tiles(bq: int, bk: int) -> Words:
    return np.empty((0, bq, words_per_row(bk)), np.uint32)


def tile_table(tiles: Words, bq: int, bk: int) -> Words:
    """The bits of every block code, uint32 [2 + T, BQ, W]: EMPTY, FULL, then the tiles. Index it with codes."""
    constant = pack(np.stack([np.zeros((bq, bk), bool), np.ones((bq, bk), bool)]))
    return np.concatenate([constant, tiles])


class TileSet:
    """Distinct tiles and their block codes, numbered in the order of first use."""

    def __init__(self, bq: int, bk: int) -> None:
        empty, full = tile_table(no_tiles(bq, bk), bq, bk)
        self._code = {_digest(empty): EMPTY, _digest(full): FULL}
        self._tiles = no_tiles(bq, bk)

    def __len__(self) -> int:
        """Number of distinct tiles."""
        return len(self._code) - FIRST_TILE

    def codes(self, words: Words) -> NDArray[np.int32]:
        """Codes of tiles [n, BQ, W]; new tiles are added to the set."""
        before = len(self)
        codes, new = self.numbered(words)
        if len(self) > len(self._tiles):
            # Grown in place with spare room: tiles can be most of the memory and arrive in many small portions.
            self._tiles.resize((max(len(self), len(self._tiles) * 3 // 2), *self._tiles.shape[1:]), refcheck=False)
        self._tiles[before : len(self)] = words[new]
        return codes

    def numbered(self, words: Words) -> tuple[NDArray[np.int32], Ints]:
        """Codes of tiles [n, BQ, W], and the indices of new ones, which get a code but are not stored."""
        codes = np.empty(len(words), np.int32)
        new: list[int] = []
        for begin in range(0, len(words), TILES_AT_ONCE):
            some = words[begin : begin + TILES_AT_ONCE]
            rows = np.ascontiguousarray(some).reshape(len(some), some.shape[1] * some.shape[2])
            first, index = distinct_rows(rows.view(np.uint64))  # a tile has an even number of words, at least 16
            found = np.empty(first.size, np.int32)
            for i, at in enumerate(first.tolist()):
                digest = _digest(some[at])
                code = self._code.get(digest)
                if code is None:
                    code = self._code[digest] = FIRST_TILE + len(self)
                    new.append(begin + at)
                found[i] = code
            codes[begin : begin + TILES_AT_ONCE] = found[index]
        return codes, np.array(new, np.int64)

    def tiles(self) -> Words:
        """The stored tiles, uint32 [T, BQ, W], in order of their codes. Call it once, at the end."""
        self._tiles.resize((len(self), *self._tiles.shape[1:]), refcheck=False)
        return self._tiles


def distinct_rows(rows: NDArray[np.unsignedinteger[Any]]) -> tuple[Ints, Ints]:
    """Indices of the first of each distinct row [n, m], in order, and the place of every row among them.

    Rows are compared by a weighted sum, and by content if the sums agree. If different rows have the same sum, which is
    practically impossible, all rows are kept.
    """
    weights = _weights(rows.shape[1])
    _, first, index = np.unique(rows.astype(np.uint64) @ weights, return_index=True, return_inverse=True)
    if (rows != rows[first[index]]).any():
        return np.arange(len(rows)), np.arange(len(rows))
    in_order = np.argsort(first)
    place = np.empty_like(in_order)
    place[in_order] = np.arange(in_order.size)
    return first[in_order], place[index]


@lru_cache(maxsize=8)
def _weights(number: int) -> NDArray[np.uint64]:
    return frozen(np.random.default_rng(0).integers(1 << 64, size=number, dtype=np.uint64))


def _digest(tile: Words) -> bytes:
    # 128 bits: the probability of a collision among a million tiles is 1e-27.
    return blake2b(tile.tobytes(), digest_size=16).digest()
