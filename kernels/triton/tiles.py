"""Tile bits for the passes over rows: in the natural order of tables, or in the order in which threads hold scores.

In the results of NVIDIA's matrix units (PTX ISA, fragments of m16n8 and wider) a thread holds, of each of its rows,
columns 8 j + 2 t and 8 j + 2 t + 1 for one t and every j. In *fragment order*, word t of 128 columns has column
8 j + 2 t + i as its bit 2 j + i: a thread needs one word a row, and which bit masks which of its scores is known when
the kernel is compiled. Of the natural order it needs every word, and shifts that depend on the thread.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels.launch import family
from sparseflash.kernels.triton.common import load_words, spread

WORDS = 4  # for each 128 columns; of narrower tiles the words are not filled
_TILES_AT_ONCE = 1024
# Where the machine code was read and is shorter. On sm_80 some launches would spill, elsewhere nobody has looked.
FRAGMENTED = ("sm_90", "interpreter")

_known = WeakTensorKeyDictionary()


def fragmented(architecture: str, single: bool) -> bool:
    """Whether kernels for operands in half or single precision read tiles in fragment order."""
    # Without matrix units, as single precision is, scores lie otherwise, and some launches would spill.
    return architecture in FRAGMENTED and not single


def ordered(bits: torch.Tensor, BK: int, dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
    """The tiles [T, BQ, ceil(BK / 32)] of a table as kernels on their device read them; whether in fragment order."""
    if not fragmented(family(bits.device), dtype.itemsize == 4):
        return bits, False
    if bits.is_cuda and torch.cuda.is_current_stream_capturing():
        return fragments(bits, BK), True  # what a graph allocates is the graph's own
    if bits not in _known:
        with torch.inference_mode(False):
            _known[bits] = fragments(bits, BK)
    made: torch.Tensor = _known[bits]
    return made, True


def fragments(bits: torch.Tensor, BK: int) -> torch.Tensor:
    """Tiles int32 [T, BQ, ceil(BK / 32)] in fragment order: int32 [T, BQ, 4 ceil(BK / 128)]."""
    lanes = torch.arange(32, dtype=torch.int32, device=bits.device)
    made = []
    for some in bits.split(_TILES_AT_ONCE):
        dense = ((some.unsqueeze(-1) >> lanes) & 1).flatten(-2)[..., :BK]
        wide = torch.nn.functional.pad(dense, (0, -BK % 128))
        by_word = wide.unflatten(-1, (-1, 16, WORDS, 2)).transpose(-3, -2).flatten(-2)  # [T, BQ, groups, words, bits]
        made.append((by_word << lanes).sum(-1, dtype=torch.int32).flatten(-2))
    return torch.cat(made)


@triton.jit
def load_bits(
    bits_ptr,
    tile,
    query,
    key,
    there,
    FRAGMENTS: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Words [BM, any] of the BM x BN part of a tile that starts at (query, key), in either order."""
    if FRAGMENTS:
        A_ROW: tl.constexpr = (BK + 127) // 128 * 4
        rows = tile.to(tl.int64) * BQ + query + tl.arange(0, BM)
        words = bits_ptr + (rows * A_ROW)[:, None] + (key // 128 * 4 + tl.arange(0, 4))[None, :]
        return tl.load(words, mask=there, other=0)
    else:
        return load_words(bits_ptr, tile, query, key, there, BQ, (BK + 31) // 32, BM, BN)


@triton.jit
def seen_by(words, key, FRAGMENTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Visible or not, [BM, BN], from the words of `load_bits`; a part does not cross a multiple of 128 keys."""
    if FRAGMENTS:
        lanes = 2 * tl.arange(0, BN // 8)[:, None] + tl.arange(0, 2)[None, :]
        words = words >> (key % 128 // 4)
        bits = words[:, None, :, None] & (1 << lanes)[None, :, None, :]
        return tl.reshape(bits, (BM, BN)) != 0
    else:
        return spread(words, key, BM, BN)
