"""Tiles: the token bits inside PARTIAL blocks, packed 32 keys a word.

A tile array is uint32 [T, BQ, ceil(BK / 32)]; bit j of word w in row i is key ``32 w + j``. Bits past BK are 0.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL

Words = NDArray[np.uint32]


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


def all_letters(tiles: Words, bq: int, bk: int) -> Words:
    """One tile a letter, EMPTY and FULL included: ``all_letters(tiles)[letter]`` are the letter's bits."""
    constant = pack(np.stack([np.zeros((bq, bk), bool), np.ones((bq, bk), bool)]))
    return np.concatenate([constant, tiles])


class Alphabet:
    """Collects tiles, each distinct one once, and hands out letters."""

    def __init__(self, bq: int, bk: int) -> None:
        self._shape = (bq, words_per_row(bk))
        empty, full = all_letters(no_tiles(bq, bk), bq, bk)
        self._letter = {_digest(empty): EMPTY, _digest(full): FULL}
        self._tiles: list[Words] = []

    def letters(self, words: Words) -> NDArray[np.int32]:
        """Letters of tiles [n, BQ, W], which are added to the alphabet when new."""
        first, index = distinct_rows(words.reshape(len(words), words.shape[1] * words.shape[2]))
        letters = np.empty(first.size, np.int32)
        for i, tile in enumerate(words[first]):
            digest = _digest(tile)
            letter = self._letter.get(digest)
            if letter is None:
                letter = self._letter[digest] = FIRST_TILE + len(self._tiles)
                self._tiles.append(tile.copy())
            letters[i] = letter
        return letters[index]

    def tiles(self) -> Words:
        """uint32 [T, BQ, W] in order of their letters."""
        return np.stack(self._tiles) if self._tiles else np.empty((0, *self._shape), np.uint32)


def distinct_rows(rows: NDArray[np.unsignedinteger[Any]]) -> tuple[Ints, Ints]:
    """Which of the rows [n, m] to keep so that each distinct one is kept, and each row's index among those kept.

    Rows are compared by a weighted sum, and by content wherever the sums agree; in the unheard-of case of differing
    rows with one sum all rows are kept.
    """
    weights = np.random.default_rng(0).integers(1 << 64, size=rows.shape[1], dtype=np.uint64)
    _, first, index = np.unique(rows.astype(np.uint64) @ weights, return_index=True, return_inverse=True)
    if (rows == rows[first[index]]).all():
        return first, index
    return np.arange(len(rows)), np.arange(len(rows))


def _digest(tile: Words) -> bytes:
    # 128 bits: among a million tiles two differing ones agree with a chance of 1e-27.
    return blake2b(tile.tobytes(), digest_size=16).digest()
