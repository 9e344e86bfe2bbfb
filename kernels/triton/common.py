"""What the forward and the backward kernels share: work order, loads, tile bits, launch helpers.

Shape legend: B batch, Hq / Hkv heads of queries / of keys, N queries, M keys, D / DV head dims of q, k / of v (DP and
DVP padded to powers of two), BQ x BK a block of the table, BM x BN a kernel's step, W = ceil(BK / 32) words a tile row.

A kernel's *line* is a block row or a block column; its *entries* are the blocks that the line lists. A block is walked
in steps that divide it, so an entry is visited (block / step) times, at consecutive loop indices.

Strides arrive divided by UNIT (8 elements when all are multiples of 8, else 1) and are multiplied by the constant
again, so the compiler knows that rows are aligned while no argument is specialised by its value: one binary serves
every length, stride, number of heads and mask. Operands that descriptors can read (`tileable`) have another binary.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from sparseflash.kernels.layout import BlockLists
from sparseflash.kernels.triton.types import ListPointers

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


# A launch takes no more programs, and a kernel counts them in int32.
MOST_PROGRAMS = (1 << 31) - 1


def programs(lines: int, steps: int, heads: int) -> tuple[int]:
    """The grid for this many lines of each head, and steps of each line.

    Raises:
        ValueError: more programs than a launch takes.
    """
    count = lines * steps * heads
    if count > MOST_PROGRAMS:
        raise ValueError(
            f"{heads:,} heads of all samples with {lines:,} block rows or columns in {steps} steps are {count:,} "
            f"programs, and one launch takes {MOST_PROGRAMS:,}: attend to fewer samples or heads at a time"
        )
    return (count,)


@triton.jit
def place(places, heads, together):
    """The (rank, head) of this program. Heads go in sections of `together`; in a section the ranks count up.

    Ranks are sorted by work, so long lines start first; sections keep the keys in flight within the L2 cache.
    """
    return placed(tl.program_id(0), places, heads, together)


@triton.jit
def placed(pid, places, heads, together):
    """The (rank, head) of the program of this number: see `place`."""
    section = pid // (places * together)
    within = pid - section * places * together
    width = tl.minimum(together, heads - section * together)
    return within // width, section * together + within % width


@triton.jit
def share(split, span):
    """Where a split starts and stops, as shares of its line; 0 and 1 for a line without entries."""
    before = tl.load(span) + tl.load(span + 2)
    whole = tl.load(span + 1) + tl.load(span + 3) - before
    low = tl.load(split) + tl.load(split + 2) - before
    high = tl.load(split + 1) + tl.load(split + 3) - before
    unit = tl.maximum(whole, 1).to(tl.float32)
    return low.to(tl.float32) / unit, tl.where(high == whole, 1.0, high.to(tl.float32) / unit)


@triton.jit
def entries(span, low, high, PARTIAL: tl.constexpr):
    """(start, count) of a line's FULL or PARTIAL entries, or, of all its entries, of those in the share low to high.

    The end of one share and the start of the next come from the same formula: no entry is skipped or taken twice.
    """
    FIRST: tl.constexpr = 2 if PARTIAL else 0
    start = tl.load(span + FIRST)
    count = tl.load(span + FIRST + 1) - start
    if low is not None:
        full = tl.load(span + 1) - tl.load(span)
        weight = (full + tl.load(span + 3) - tl.load(span + 2)).to(tl.float32)
        begin = (weight * low).to(tl.int32)
        end = (weight * high).to(tl.int32)
        if PARTIAL:
            begin, end = tl.maximum(begin - full, 0), tl.maximum(end - full, 0)
        else:
            begin, end = tl.minimum(begin, full), tl.minimum(end, full)
        start += begin
        count = end - begin
    return start, count


@triton.jit
def sink_share(lse, sink):
    """The keys' share of a row's weight, sigmoid(lse - sink), both in base 2; lse finite."""
    gap = lse - sink
    e = tl.exp2(-tl.abs(gap))  # at most 1, whichever is larger
    return tl.where(gap < 0, e, 1.0) / (1.0 + e)


@triton.jit
def matrix(ptr, batch, head, stride_b, stride_h, UNIT: tl.constexpr):
    """Where the [rows, columns] matrix of one head starts."""
    return ptr + (batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h) * UNIT


@triton.jit
def grid_of(ptr, first, stride, UNIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers [ROWS, WIDTH] to rows first, first + 1, ... of a matrix."""
    start = ptr + first.to(tl.int64) * stride * UNIT
    # Rows within a step are near each other (see `readable`): 32 bits hold their offsets and spare registers.
    offsets = tl.arange(0, ROWS) * stride * UNIT
    return start + (offsets[:, None] + tl.arange(0, WIDTH)[None, :])


@triton.jit
def load_rows(ptr, first, stride, keep, UNIT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[ROWS, DP] rows of a matrix. Rows where `keep` [ROWS] is false, and columns past D, are 0 and never read."""
    pointers = grid_of(ptr, first, stride, UNIT, ROWS, DP)
    if keep is None:
        if D == DP:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(tl.arange(0, DP) < D)[None, :], other=0.0)
    else:
        if D == DP:
            return tl.load(pointers, mask=keep[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=keep[:, None] & (tl.arange(0, DP) < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    ptr, first, stride, keep, value, UNIT: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Write the rows of `value` [ROWS, DP] where `keep` [ROWS] is true, columns below D."""
    pointers = grid_of(ptr, first, stride, UNIT, ROWS, DP)
    keep = keep[:, None]
    if D != DP:
        keep = keep & (tl.arange(0, DP) < D)[None, :]
    tl.store(pointers, value.to(ptr.dtype.element_ty), mask=keep)


@triton.jit
def load_words(
    bits_ptr, tile, query, key, there, BQ: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """Words [BM, ceil(BN / 32)] of the BM x BN part of a tile that starts at (query, key)."""
    WORDS: tl.constexpr = (BN + 31) // 32
    rows = tile.to(tl.int64) * BQ + query + tl.arange(0, BM)
    return tl.load(bits_ptr + (rows * W)[:, None] + (key // 32 + tl.arange(0, WORDS))[None, :], mask=there, other=0)


@triton.jit
def spread(words, key, BM: tl.constexpr, BN: tl.constexpr):
    """Visible or not, [BM, BN], from the words of `load_words`."""
    LANES: tl.constexpr = BN if BN < 32 else 32
    lanes = key % 32 + tl.arange(0, LANES)
    bits = (words[:, :, None] >> lanes[None, None, :]) & 1
    return tl.reshape(bits, (BM, BN)) != 0


@triton.jit
def load_words_t(
    bits_ptr, tile, query, key, there, BQ: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """The words of `load_words`, transposed: [ceil(BN / 32), BM]."""
    WORDS: tl.constexpr = (BN + 31) // 32
    rows = tile.to(tl.int64) * BQ + query + tl.arange(0, BM)
    return tl.load(bits_ptr + (rows * W)[None, :] + (key // 32 + tl.arange(0, WORDS))[:, None], mask=there, other=0)


@triton.jit
def spread_t(words, key, BM: tl.constexpr, BN: tl.constexpr):
    """Visible or not, [BN, BM], from the words of `load_words_t`."""
    LANES: tl.constexpr = BN if BN < 32 else 32
    lanes = key % 32 + tl.arange(0, LANES)
    bits = (words[:, None, :] >> lanes[None, :, None]) & 1
    return tl.reshape(bits, (BN, BM)) != 0


@triton.jit
def load_seen(seen_ptr, tile, key, there, W: tl.constexpr, BN: tl.constexpr):
    """Is key + 0, 1, ... of a tile seen by any of its queries? [BN]"""
    keys = key + tl.arange(0, BN)
    words = tl.load(seen_ptr + tile.to(tl.int64) * W + keys // 32, mask=there, other=0)
    return ((words >> (keys % 32)) & 1) != 0


def padded(width: int) -> int:
    """A head dim's width inside the kernels: a power of two, at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, copied only if its rows are not contiguous or too far apart for 32-bit offsets within a step."""
    near = tensor.stride(-2) < 1 << 22
    return tensor if near and tensor.stride(-1) == 1 else tensor.contiguous()


def list_pointers(side: BlockLists) -> ListPointers:
    """What kernels take of block lists."""
    work = side.work_items if side.slots else None
    return ListPointers(side.ranges, side.full_indices, side.partial_indices, side.partial_tiles, side.order, work)


def device_of(tensor: torch.Tensor) -> torch.cuda.device_of:
    """A context in which kernels start on the device of `tensor`."""
    return torch.cuda.device_of(tensor)


def stride_unit(*tensors: torch.Tensor) -> int:
    """8 when every row of every head starts at a multiple of 8 elements from its base, else 1."""
    strides = (s for t in tensors for s in t.stride()[:-1])
    return 8 if all(s % 8 == 0 for s in strides) else 1


def strides_in(unit: int, tensor: torch.Tensor) -> tuple[int, int, int]:
    """The strides of batch, head and row, in units of `unit` elements."""
    b, h, n = (s // unit for s in tensor.stride()[:-1])
    return b, h, n


def tileable(*tensors: torch.Tensor) -> bool:
    """Whether the tensor memory accelerator can read all of these [B, H, N, D].

    It takes rows of a power of two of elements that start at multiples of 16 bytes. No stride is 0: that an expanded
    tensor can be read so is not known.
    """
    return all(
        x.numel() > 0
        and padded(x.shape[-1]) == x.shape[-1]
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def in_tiles(wanted: bool, rows: int, *tensors: torch.Tensor) -> tuple[TensorDescriptor | None, ...]:
    """Descriptors of [B, H, N, D] that load `rows` rows of one head at a time; None for each if not wanted."""
    if not wanted:
        return (None,) * len(tensors)
    return tuple(TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[-1]]) for x in tensors)


def heads_together(bytes_per_head: int, heads: int, cache_bytes: int = 24 << 20) -> int:
    """How many heads to work on at a time so that what they reread stays in a GPU's L2 cache."""
    return max(1, min(heads, cache_bytes // max(1, bytes_per_head)))


@triton.jit
def exponential(x, NATURAL: tl.constexpr):
    """exp(x), or exp2(x)."""
    if NATURAL:
        return tl.exp(x)
    else:
        return tl.exp2(x)
