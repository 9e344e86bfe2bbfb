"""Lookup tables with a tile for every block, made on the device: exact token masks that depend on data.

Shape legend: T blocks of t tokens on either side, E pairs of blocks that see each other, W words of 32 keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.tables.device import READ_AHEAD
from sparseflash.tables.table import LookupTable

WORD = 32


def table_of_pairs(row: Tensor, column: Tensor, words: Tensor, blocks: int) -> LookupTable:
    """A table of one pattern with these pairs of blocks, each with its own tile.

    Args:
        row: int64 [E], ascending: the block of queries of each pair.
        column: int64 [E], ascending within a row: its block of keys.
        words: int32 [E, t, W]: which of its queries sees which of its keys, as `packed` writes it.
        blocks: T.
    """
    if not len(words):  # a kernel may read the words of a tile before it knows whether the tile exists
        words = words.new_zeros(1, *words.shape[1:])
    by_column = column.argsort(stable=True)
    number = torch.arange(len(row), device=row.device)
    return LookupTable(
        shape=(blocks * words.shape[1],) * 2,
        block=(words.shape[1],) * 2,
        q_offset=0,
        rows=_side(row, column, number, blocks),
        columns=_side(column[by_column], row[by_column], by_column, blocks),
        tiles=Tiles(words, _any(words)),
        pattern_of=torch.zeros(1, 1, dtype=torch.int32, device=row.device),
    )


def packed(bits: Tensor) -> Tensor:
    """Bool [..., t] to int32 words [..., W]; bit j of word w is key 32 w + j."""
    bits = F.pad(bits, (0, -bits.shape[-1] % WORD)).contiguous()
    # Eight booleans are eight bytes 0 or 1; the product moves byte j to bit 56 + j, without carries.
    # Assumes little-endian, like every processor and GPU that torch supports.
    eight = bits.view(torch.int64)
    return ((eight * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)


def _any(words: Tensor) -> Tensor:
    """[E, t, W] to [E, W]: the OR over all queries, t a power of two."""
    while words.shape[1] > 1:
        words = words[:, ::2] | words[:, 1::2]
    return words[:, 0]


def _side(line: Tensor, other: Tensor, tile: Tensor, lines: int) -> BlockLists:
    """One side with PARTIAL entries only, listed line by line."""
    count = torch.bincount(line, minlength=lines)
    stop = count.cumsum(0)
    start = stop - count
    none = line.new_empty((1, 0, 6), dtype=torch.int32)
    partial, tile = (F.pad(x.int(), (0, READ_AHEAD)) for x in (other, tile))
    ranges = torch.stack([start * 0, start * 0, start, stop], -1)
    order = count.argsort(descending=True, stable=True)
    full = partial.new_zeros(READ_AHEAD)
    return BlockLists(ranges[None].int(), full, partial, tile, order[None].int(), none, none[..., :3])
