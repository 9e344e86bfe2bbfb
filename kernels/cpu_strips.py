"""How block rows are cut for a dense attention kernel: strips of adjacent rows that meet the same key blocks.

A dense kernel is fastest with many queries against keys that lie side by side. So the blocks of a row are dealt to
several parts, whose results are merged by lse afterwards:

- key blocks that are FULL in all of eight adjacent rows, then in both of two: one tall strip without a mask;
- the rest, with everything PARTIAL: strips of one row, many rows at a time.

Rows of blocks other than 128 count by their tokens. All is numpy on the host: the work of a table, not of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparseflash.kernels.layout import FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP

Ints = npt.NDArray[np.int64]
# From these many queries on, torch's kernel takes larger steps (768 and 192 in its source); rounded to whole rows.
TALL = 1024, 256
# A tall strip costs a merge of its rows: it has at least this many keys.
WIDE = 384
# Keys a strip at most. Of one row, so that keys and values stay in cache while its queries pass; of several, to bound
# memory.
LONGEST = 1024
LONGEST_TALL = 8192
NOTHING, FULL, FIRST_TILE = 0, 1, 2


@dataclass(frozen=True)
class Strips:
    """R strips, each of `tall` adjacent block rows against the same E key blocks, in ascending order."""

    rows: Ints  # [R] the first row of each
    tall: int
    cols: Ints  # [R, E]
    tiles: Ints | None  # [R, E]: tile of a PARTIAL block, -1 for a FULL one; None when all are FULL


@dataclass(frozen=True)
class Rows:
    """The row side of one pattern on the host."""

    spans: Ints  # [nQ, 4]
    full: Ints
    partial: Ints
    tile: Ints

    def letters(self, first: int, last: int, width: int) -> Ints:
        """[last - first, width]: NOTHING, FULL, or FIRST_TILE and up."""
        table = np.zeros((last - first, width), np.int64)
        spans = self.spans[first:last]
        row, entry = _ranges(spans[:, FULL_START], spans[:, FULL_STOP])
        table[row, self.full[entry]] = FULL
        row, entry = _ranges(spans[:, PARTIAL_START], spans[:, PARTIAL_STOP])
        table[row, self.partial[entry]] = self.tile[entry] + FIRST_TILE
        return table


def cut(letters: Ints, block: tuple[int, int]) -> Iterator[Strips]:
    """Strips that hold each block of `letters` [rows, nK] once; rows are counted from its first. Consumes `letters`."""
    for tokens in TALL:
        if (tall := tokens // block[0]) > 1:
            yield from _tall(letters, tall, block)
    # Many FULL blocks are taken apart from the PARTIAL ones, to spare them the mask.
    apart = (letters == FULL) & ((letters == FULL).sum(1, keepdims=True) * block[1] >= WIDE)
    yield from _single(np.where(apart, FULL, NOTHING), block[1])
    yield from _single(np.where(apart, NOTHING, letters), block[1])


def _single(letters: Ints, size: int) -> Iterator[Strips]:
    """Strips of one row, those with equally many blocks together."""
    counts = (letters != NOTHING).sum(1)
    for entries in np.unique(counts[counts > 0]):
        rows = (counts == entries).nonzero()[0]
        cols = letters[rows].nonzero()[1].reshape(len(rows), entries)
        tiles = letters[rows[:, None], cols] - FIRST_TILE
        pieces = -(-int(entries) // max(1, LONGEST // size))
        for some, their in zip(np.array_split(cols, pieces, 1), np.array_split(tiles, pieces, 1), strict=True):
            plain = (their < 0).all(1)
            for masked in (False, True):
                if (chosen := plain != masked).any():
                    yield Strips(rows[chosen], 1, some[chosen], their[chosen] if masked else None)


def _tall(letters: Ints, tall: int, block: tuple[int, int]) -> Iterator[Strips]:
    """Strips of `tall` rows, the last group of rows being shorter, of runs of FULL blocks; clears what it takes."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for first in range(0, len(letters), tall):
        group = letters[first : first + tall]
        if len(group) == 1:
            break
        common = np.zeros(group.shape[1] + 2, np.int8)
        common[1:-1] = (group == FULL).all(0)
        edges = np.diff(common)
        for start, stop in zip((edges == 1).nonzero()[0], (edges == -1).nonzero()[0], strict=True):
            if (stop - start) * block[1] < WIDE:
                continue
            group[:, start:stop] = NOTHING
            for piece in np.array_split(np.arange(start, stop), -(-((stop - start) * block[1]) // LONGEST_TALL)):
                found.setdefault((len(group), len(piece)), []).append((first, int(piece[0])))
    for (rows, entries), corners in found.items():
        at = np.array(corners)
        yield Strips(at[:, 0], rows, at[:, 1:] + np.arange(entries), None)


def evenly(values: Ints) -> Iterator[tuple[int, int]]:
    """Bounds of runs of `values` [n] or [n, m] that have a constant difference each."""
    first, total = 0, len(values)
    steps = np.diff(values.reshape(total, values.size // max(1, total)), axis=0)
    changes = (steps[1:] != steps[:-1]).any(1).nonzero()[0] + 2
    while first < total:
        at = changes[np.searchsorted(changes, first + 2) :]
        last = int(at[0]) if len(at) else total
        yield first, last
        first = last


def _ranges(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """For each i the integers of start[i] up to stop[i]: (i of each, the integers), in one row."""
    length = stop - start
    row = np.repeat(np.arange(len(start)), length)
    return row, np.arange(len(row)) + np.repeat(start - (length.cumsum() - length), length)
