"""Tile bits in the order in which threads hold scores, and how kernels read them.

In the results of NVIDIA's matrix units (PTX ISA, fragments of m16n8 and wider) a thread holds, of each of its rows,
columns 8 j + 2 t and 8 j + 2 t + 1 for one t and every j. Word t of 128 columns therefore has column 8 j + 2 t + i as
its bit 2 j + i: a thread needs one word a row, and which bit masks which of its scores is known when the kernel is
compiled. Of the natural order, which tables have, it would need every word, and shifts that depend on the thread.

Passes over rows read the tile's rows in that order, the pass over columns those of the transposed tile.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

WORDS = 4  # for each 128 columns; of narrower tiles the words are not filled
_TILES_AT_ONCE = 1024


class Fragments(NamedTuple):
    """The tiles of a table for T tiles of BQ x BK bits."""

    rows: torch.Tensor  # int32 [T, BQ, 4 ceil(BK / 128)]
    columns: torch.Tensor  # int32 [T, BK, 4 ceil(BQ / 128)]


_known = WeakTensorKeyDictionary()


def fragments(bits: torch.Tensor, block: tuple[int, int]) -> Fragments:
    """The tiles [T, BQ, ceil(BK / 32)] of a table in fragment order; made once as long as that tensor lives."""
    if bits.is_cuda and torch.cuda.is_current_stream_capturing():
        return _fragments(bits, block[1])  # what a graph allocates is the graph's own
    if bits not in _known:
        with torch.inference_mode(False):
            _known[bits] = _fragments(bits, block[1])
    made: Fragments = _known[bits]
    return made


def _fragments(bits: torch.Tensor, BK: int) -> Fragments:
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    rows, columns = [], []
    for some in bits.split(_TILES_AT_ONCE):
        dense = ((some.unsqueeze(-1) >> lanes) & 1).flatten(-2)[..., :BK]
        rows.append(_packed(dense, lanes))
        columns.append(_packed(dense.mT, lanes))
    return Fragments(torch.cat(rows), torch.cat(columns))


def _packed(dense: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    """int32 0 or 1 [T, rows, columns] to words [T, rows, 4 ceil(columns / 128)]."""
    wide = torch.nn.functional.pad(dense, (0, -dense.shape[-1] % 128))
    by_word = wide.unflatten(-1, (-1, 16, WORDS, 2)).transpose(-3, -2).flatten(-2)  # [T, rows, groups, words, bits]
    return (by_word << lanes).sum(-1, dtype=torch.int32).flatten(-2)


@triton.jit
def load_words(bits_ptr, tile, row, column, there, LINES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Words [ROWS, 4] of the part of a tile of LINES x WIDTH bits that starts at (row, column)."""
    A_ROW: tl.constexpr = (WIDTH + 127) // 128 * 4
    rows = tile.to(tl.int64) * LINES + row + tl.arange(0, ROWS)
    words = bits_ptr + (rows * A_ROW)[:, None] + (column // 128 * 4 + tl.arange(0, 4))[None, :]
    return tl.load(words, mask=there, other=0)


@triton.jit
def spread(words, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Visible or not, [ROWS, COLUMNS], from the words of `load_words`; a part does not cross a multiple of 128."""
    lanes = 2 * tl.arange(0, COLUMNS // 8)[:, None] + tl.arange(0, 2)[None, :]
    words = words >> (column % 128 // 4)
    bits = words[:, None, :, None] & (1 << lanes)[None, :, None, :]
    return tl.reshape(bits, (ROWS, COLUMNS)) != 0
