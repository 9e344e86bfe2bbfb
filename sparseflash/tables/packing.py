"""A table in one buffer: one copy to a device, and one argument of a compiled graph.

A graph that took every tensor of a table would be specialised on which of them are empty or equally long. Of the buffer
it sees one length; offsets are numbers that it passes on unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.tiles import Words

ALIGNED = 32  # ints: every tensor begins at a multiple of 128 bytes, so that kernels find rows aligned


class Contents(NamedTuple):
    """The tensors of a table."""

    rows: BlockLists
    columns: BlockLists
    tiles: Tiles
    pattern_of: torch.Tensor

    @property
    def flat(self) -> list[torch.Tensor]:
        return [*self.rows, *self.columns, *self.tiles, self.pattern_of]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Contents:
        fields = len(BlockLists._fields)
        rows, columns, tiles = flat[:fields], flat[fields : 2 * fields], flat[2 * fields : -1]
        return cls(BlockLists(*rows), BlockLists(*columns), Tiles(*tiles), flat[-1])


class Header(NamedTuple):
    """The numbers that belong to a table."""

    q_len: int
    kv_len: int
    bq: int
    bk: int
    q_offset: int


def pack(header: Header, arrays: Sequence[NDArray[Any]], device: torch.device) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The buffer, int32 on the device, and the layout that :func:`unpack` reads it by."""
    shapes = [array.shape for array in arrays]
    places = _places(shapes)
    buffer = np.zeros(places[-1][1], np.int32)
    for array, (begin, end) in zip(arrays, places, strict=True):
        buffer[begin:end].reshape(array.shape)[...] = array
    numbers = *header, *(size for shape in shapes for size in (len(shape), *shape))
    return torch.from_numpy(buffer).to(device), tuple(map(_shown, numbers))


def tile_arrays(words: Words) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Bits and seen keys of :class:`Tiles`, from tiles uint32 [T, BQ, W]."""
    # A kernel may read the words of a tile before it knows whether the tile exists.
    bits = words if len(words) else np.zeros((1, *words.shape[1:]), np.uint32)
    return bits.view(np.int32), np.bitwise_or.reduce(bits, axis=1).view(np.int32)


# The unpacked tensors of each buffer: backends may cache plans by the identity of these tensors.
_unpacked = WeakTensorKeyDictionary()


def unpack(buffer: torch.Tensor, layout: Sequence[int]) -> tuple[Header, Contents]:
    """The contents of a buffer of :func:`pack`, as views: the same tensors at each call while the buffer lives."""
    key = tuple(layout)
    known = _unpacked.get(buffer)
    if known is None or known[0] != key:
        # Views of a detached alias, so that they do not keep the buffer alive.
        known = _unpacked[buffer] = key, *_unpack(buffer.detach(), key)
    return known[1], known[2]


def _unpack(buffer: torch.Tensor, layout: Sequence[int]) -> tuple[Header, Contents]:
    numbers = [_meant(int(n)) for n in layout]
    fields = len(Header._fields)
    rest = iter(numbers[fields:])
    shapes = [tuple(next(rest) for _ in range(dims)) for dims in rest]
    views = [buffer[begin:end].view(shape) for shape, (begin, end) in zip(shapes, _places(shapes), strict=True)]
    return Header(*numbers[:fields]), Contents.of(views)


def _places(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, int]]:
    """Where each tensor begins and ends in the buffer."""
    places, end = [], 0
    for shape in shapes:
        begin = -(-end // ALIGNED) * ALIGNED
        end = begin + prod(shape)
        places.append((begin, end))
    return places


def _shown(number: int) -> int:
    """Encode an int as at least 2: torch.compile specialises graphs on 0, 1 and the sign."""
    return 2 * number + 2 if number >= 0 else -2 * number + 1


def _meant(shown: int) -> int:
    return shown // 2 - 1 if shown % 2 == 0 else -(shown // 2)
