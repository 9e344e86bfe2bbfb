"""Lookup tables whose every block has bits of its own, made on the device: exact token masks that data decide.

Shape legend: T blocks of t tokens on either side, K entries a row, E = T * K, W words of 32 keys.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.kernels.layout import PARTIAL_STOP, Side, Tiles
from sparseflash.tables import LookupTable

WORD = 32


def with_tiles(table: LookupTable, bits: Tensor) -> LookupTable:
    """A table of whole blocks, each cut down to its own bits.

    Args:
        table: of one pattern with equal and whole blocks, from `LookupTable.from_indices` with K entries a row.
        bits: bool [E, t, t]: may this query see that key, for each entry of the rows in the table's order.
    """
    blocks = table.rows.order.shape[1]
    rows, columns = table.rows, table.columns
    number = torch.arange(len(bits), device=bits.device)
    at = torch.zeros(blocks, blocks, dtype=torch.int64, device=bits.device)
    stored = _stored(rows)
    per_row = len(bits) // blocks
    live = (torch.arange(per_row, device=bits.device) < stored[:, None]).flatten()
    row = number[live] // per_row
    at[row, rows.full[: len(bits)][live].long()] = number[live]
    column = torch.arange(blocks, device=bits.device).repeat_interleave(_stored(columns))
    by_column = at[columns.full[: len(column)].long(), column]
    return replace(
        table,
        rows=_partial(rows, number),
        columns=_partial(columns, by_column),
        tiles=Tiles(packed(bits), packed(bits.any(1, keepdim=True))[:, 0]),
    )


def packed(bits: Tensor) -> Tensor:
    """Bool [..., t] to int32 words [..., W]; bit j of word w is key 32 w + j."""
    bits = F.pad(bits, (0, -bits.shape[-1] % WORD))
    powers = 1 << torch.arange(WORD, device=bits.device)
    words = (bits.unflatten(-1, (-1, WORD)) * powers).sum(-1)
    return torch.where(words >= 1 << (WORD - 1), words - (1 << WORD), words).int()


def _stored(side: Side) -> Tensor:
    return (side.spans[0, :, PARTIAL_STOP] - side.spans[0, :, 0]).long()


def _partial(side: Side, tile: Tensor) -> Side:
    """All entries as PARTIAL ones, with these tiles."""
    start, stop = side.spans[..., 0], side.spans[..., PARTIAL_STOP]
    spans = torch.stack([start, start, start, stop], -1)
    return side._replace(spans=spans, tile=F.pad(tile.int(), (0, len(side.partial) - len(tile))))
