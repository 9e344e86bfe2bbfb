"""A table in one buffer: copied to a device at once, and one argument of a compiled graph.

A graph that took every tensor of a table would be specialised on which of them are empty, or as long as another. Of the
buffer it sees one length; what lies where is told by numbers that it passes on unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels.layout import Side, Tiles
from sparseflash.patterns.tiles import Words

ALIGNED = 32  # ints: every tensor begins at a multiple of 128 bytes, so that kernels find rows aligned


class Contents(NamedTuple):
    """What a table is made of."""

    rows: Side
    columns: Side
    tiles: Tiles
    pattern_of: torch.Tensor

    @property
    def flat(self) -> list[torch.Tensor]:
        return [*self.rows, *self.columns, *self.tiles, self.pattern_of]

    @classmethod
    def of(cls, flat: Sequence[Any]) -> Contents:
        fields = len(Side._fields)
        rows, columns, tiles = flat[:fields], flat[fields : 2 * fields], flat[2 * fields : -1]
        return cls(Side(*rows), Side(*columns), Tiles(*tiles), flat[-1])


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
    # A kernel may read the words of a tile ahead of knowing that there is none.
    bits = words if len(words) else np.zeros((1, *words.shape[1:]), np.uint32)
    return bits.view(np.int32), np.bitwise_or.reduce(bits, axis=1).view(np.int32)


# What was found in a buffer, by which layout: backends may keep what they plan beside the tensors of a table.
_unpacked = WeakTensorKeyDictionary()


def unpack(buffer: torch.Tensor, layout: Sequence[int]) -> tuple[Header, Contents]:
    """What :func:`pack` put in, as views of the buffer: the same tensors at each call, as long as the buffer lives."""
    key = tuple(layout)
    known = _unpacked.get(buffer)
    if known is None or known[0] != key:
        # Detached, the buffer is not what the views refer to: they must not keep it alive.
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
    """A number as graphs may see it: from 2 on, for they are specialised on 0 and 1, and on signs."""
    return 2 * number + 2 if number >= 0 else -2 * number + 1


def _meant(shown: int) -> int:
    return shown // 2 - 1 if shown % 2 == 0 else -(shown // 2)
