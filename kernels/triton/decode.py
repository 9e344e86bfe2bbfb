"""Decoding: a few new queries against a long cache of keys, split over the keys.

A program takes one of the two block rows that the new queries can touch and one part of that row's blocks. The rows of
its products are the new queries of all query heads that share a key head and a pattern, so keys and values are read
once for all of them. A second kernel merges the parts by lse. Lengths are read on the device: the host does not wait,
and the launch depends only on shapes.

Shapes as in `common`, with n new queries, M the capacity of the cache, G query heads a key head, S parts. Row r of
a program's BM rows is query r % n of the group's head r // n.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from sparseflash.kernels import layout
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.launch import Launch, family
from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.common import (
    LN2,
    LOG2E,
    device_of,
    matrix,
    padded,
    readable,
    spread,
    stride_unit,
    strides_in,
)
from sparseflash.kernels.triton.score import capped, factor
from sparseflash.kernels.triton.softmax import absorb, nothing_seen
from sparseflash.kernels.triton.types import Blocks, ListPointers, RowBits, Rows, Score, Sizes
from sparseflash.kernels.triton.walk import block_of, load_step

# A row is cut into at most MOST_PARTS parts; none but a row's last holds fewer than PART_KEYS keys, for each part costs
# a program and a share of the merge.
MOST_PARTS = 64
PART_KEYS = 256
# Programs to offer each multiprocessor of a GPU, so that enough loads are in flight to use its bandwidth.
PROGRAMS_EACH = 4

# One or a few new queries times a group of heads seldom make more than 16 rows, the least that a product takes. Where
# they do, the programs that share keys run side by side, so that all but one read them from the L2 cache.
ROWS = 16

LAUNCHES: dict[tuple[str, int, str], Launch] = {}
for _architecture in ("sm_80", "sm_90", "sm_100"):
    LAUNCHES |= {
        (_architecture, 32, "half"): Launch(ROWS, 64, 4, 3),
        (_architecture, 64, "half"): Launch(ROWS, 64, 4, 3),
        (_architecture, 128, "half"): Launch(ROWS, 32, 4, 4),
        (_architecture, 256, "half"): Launch(ROWS, 32, 8, 3),
    }
LAUNCHES |= {
    ("gfx942", 32, "half"): Launch(ROWS, 64, 4, 1),
    ("gfx942", 64, "half"): Launch(ROWS, 64, 8, 1),
    ("gfx942", 128, "half"): Launch(ROWS, 64, 8, 1),
    ("gfx942", 256, "half"): Launch(ROWS, 32, 8, 1),
}
for _architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
    LAUNCHES |= {(_architecture, head_dim, "single"): Launch(ROWS, 16, 4, 1) for head_dim in (32, 128, 256)}
    LAUNCHES[_architecture, 64, "single"] = Launch(ROWS, 32, 4, 1)
# With a softcap or a bias these would spill; the replacements fit with either and with both.
FEATURED = {
    ("sm_80", 256, "single"): Launch(ROWS, 16, 8, 1),
    ("sm_90", 64, "single"): Launch(ROWS, 16, 4, 1),
    ("sm_100", 128, "single"): Launch(ROWS, 32, 8, 1),
    ("gfx942", 128, "half"): Launch(ROWS, 32, 8, 1),
}


@triton.jit
def _before(ptr, count, limit):
    """How many of the `count` ascending numbers at ptr are below limit: 64 probes at a time."""
    low = 0
    size = count
    while size > 0:
        step = (size + 63) // 64
        at = tl.arange(0, 64) * step
        below = tl.load(ptr + low + at, mask=at < size, other=0) < limit
        hits = tl.sum((below & (at < size)).to(tl.int32), 0)
        # The border lies behind the last probe that is below, and no further than the next probe.
        passed = tl.where(hits > 0, (hits - 1) * step + 1, 0)
        size = tl.where(hits > 0, tl.minimum(step - 1, size - passed), 0)
        low += passed
    return low


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _words_of(bits, tile, key, there, BK: tl.constexpr, BN: tl.constexpr):
    """Words [BM, ceil(BN / 32)] of the rows of a tile, from `key` on."""
    W: tl.constexpr = (BK + 31) // 32
    WORDS: tl.constexpr = (BN + 31) // 32
    start = bits.words + (tile.to(tl.int64) * (bits.height * W) + key // 32)
    return tl.load(start + ((bits.rows * W)[:, None] + tl.arange(0, WORDS)[None, :]), mask=there, other=0)


@triton.jit
def _walk(softmax, q, k_rows, v_rows, blocks, bits, bound, score, PARTIAL: tl.constexpr, sizes):
    """The softmax with a part's blocks of one kind; keys from `bound` on are not there."""
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    STEPS: tl.constexpr = sizes.BK // BN
    f = factor(score)
    block = block_of(blocks, 0, STEPS)
    if PARTIAL:
        tile = tl.load(blocks.tile, mask=blocks.count > 0, other=0)
        words = _words_of(bits, tile, 0, blocks.count > 0, sizes.BK, BN)
        tile = tl.load(blocks.tile + 1 // STEPS, mask=blocks.count > 1 // STEPS, other=0)
    for i in range(0, blocks.count * STEPS):
        first = block * sizes.BK + (i % STEPS) * BN
        block = block_of(blocks, i + 1, STEPS)
        keys = first + tl.arange(0, BN)
        keep = keys < bound
        # A sum masks in fewer registers than a choice: what is not kept was loaded as 0.
        hidden = tl.where(keep, 0.0, float("-inf"))
        if PARTIAL:
            visible = spread(words, (i % STEPS) * BN, BM, BN)
            # Keys that none of these queries sees are not read: what lies there must not matter.
            seen = tl.reduce(words, 0, _either)
            keep = keep & tl.reshape(spread(seen[None, :], (i % STEPS) * BN, 1, BN), (BN,))
            key = ((i + 1) % STEPS) * BN
            words = _words_of(bits, tile, key, (i + 1) // STEPS < blocks.count, sizes.BK, BN)
            after = (i + 2) // STEPS
            tile = tl.load(blocks.tile + after, mask=after < blocks.count, other=0)
        k = load_step(k_rows, first, keep, sizes.UNIT, BN, sizes.D, sizes.DP)
        v = load_step(v_rows, first, keep, sizes.UNIT, BN, sizes.DV, sizes.DVP)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = capped(s, score)
        if score.slope is not None:
            s -= score.slope[:, None] * tl.abs(score.position[:, None] - keys[None, :]).to(tl.float32)
        s += hidden[None, :]
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        softmax = absorb(softmax, s, f, v, first, score, True)
    return softmax


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "pattern_b", "pattern_h"),
        *("scale", "samples", "n", "M", "Hq", "group", "chunks", "leaders", "lines", "crossed", "parts", "shortest"),
        *("BQ", "cap", "slopes_ptr", "slopes_b"),
    ]
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [S, B, Hq, n, DV]
    lse_ptr,  # fp32 [S, B, Hq, n]
    lengths_ptr,  # [B]
    lists,  # `ListPointers` of the rows
    bits_ptr,
    pattern_ptr,
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    v_b,
    v_h,
    v_n,
    pattern_b,
    pattern_h,
    scale,
    samples,  # B
    n,
    M,
    Hq,
    group,  # G
    chunks,  # programs that the rows of a group take
    leaders,  # heads of a group that may be the first of their pattern: 1 if the group shares one, else G
    lines,  # block rows
    crossed,  # block rows that the new queries can touch: 1 or 2
    parts,  # S
    shortest,  # blocks of a part, at least
    BQ,
    cap,  # None where the feature is off
    slopes_ptr,  # likewise
    slopes_b,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    chunk = tl.program_id(0) % chunks
    leader = tl.program_id(0) // chunks % leaders
    kv_index = tl.program_id(0) // (chunks * leaders)
    batch = kv_index // (Hq // group)
    kv_head = kv_index % (Hq // group)
    side = tl.program_id(1) % crossed  # the block row of the first new query, or the next
    part = tl.program_id(1) // crossed

    packed = chunk * BM + tl.arange(0, BM)
    mine = packed < group * n
    packed = tl.minimum(packed, group * n - 1)
    head = kv_head * group + packed // n
    query = packed % n
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    oldest = length - n  # position of the first new query
    line = tl.maximum(oldest, 0) // BQ
    position = oldest + query
    # Every row of the group is written by one program of each part, also where it sees nothing.
    mine = mine & ((position >= (line + 1) * BQ) == (side == 1))
    line += side

    pattern_ptr += batch.to(tl.int64) * pattern_b
    p = tl.load(pattern_ptr + (kv_head * group + leader) * pattern_h)
    mine = mine & (tl.load(pattern_ptr + head * pattern_h) == p)
    taken = 0  # how many earlier heads of the group have this pattern: the first one's program takes the rows of all
    for other in range(0, leader):
        taken += (tl.load(pattern_ptr + (kv_head * group + other) * pattern_h) == p).to(tl.int32)
    mine = mine & (taken == 0)

    bound = tl.minimum(length, M)
    lowest = tl.maximum(tl.maximum(oldest, 0), line * BQ)
    highest = tl.minimum(bound, (line + 1) * BQ) - 1
    there = (lowest <= highest) & (taken == 0)
    # Rows that do not stand in this line compute what the nearest one does: they must not make more keys be read.
    alive = (position >= lowest) & (position <= highest)
    rows = tl.minimum(tl.maximum(position, lowest), highest) - line * BQ

    span = lists.ranges + (p.to(tl.int64) * lines + line) * 4
    full_ptr = lists.full_indices + tl.load(span, mask=there, other=0)
    full = tl.load(span + 1, mask=there, other=0) - tl.load(span, mask=there, other=0)
    first_partial = tl.load(span + 2, mask=there, other=0)
    partial_ptr = lists.partial_indices + first_partial
    tile_ptr = lists.partial_tiles + first_partial
    partial = tl.load(span + 3, mask=there, other=0) - first_partial
    blocks = (bound + BK - 1) // BK
    full = _before(full_ptr, full, blocks)
    partial = _before(partial_ptr, partial, blocks)

    # FULL and PARTIAL entries are one list, cut into parts.
    longest = tl.maximum(shortest, (full + partial + parts - 1) // parts)
    start = tl.minimum(part * longest, full + partial)
    stop = tl.minimum(start + longest, full + partial)
    worked = (start < stop) | (parts == 1)

    q_at = batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h + query.to(tl.int64) * q_n
    q_at = (q_at * UNIT)[:, None] + tl.arange(0, DP)[None, :]
    q = tl.load(q_ptr + q_at, mask=(tl.arange(0, DP) < D)[None, :], other=0.0)
    k_rows = Rows(matrix(k_ptr, batch, kv_head, k_b, k_h, UNIT), k_n, None, batch, kv_head)
    v_rows = Rows(matrix(v_ptr, batch, kv_head, v_b, v_h, UNIT), v_n, None, batch, kv_head)
    c = tl.cast(scale, tl.float32) * LOG2E
    if cap is not None:
        cap = tl.cast(cap, tl.float32) * LOG2E
    slope = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_b + head) * LOG2E
    bits = RowBits(bits_ptr, rows, BQ)
    score = Score(c, cap, slope, position, None, None, None)
    softmax = nothing_seen(BM, DVP)

    begin = tl.minimum(start, full)
    blocks = Blocks(full_ptr + begin, tile_ptr, tl.minimum(stop, full) - begin)
    softmax = _walk(
        *(softmax, q, k_rows, v_rows, blocks, bits, bound, score, False),
        Sizes(False, UNIT, D, DP, DV, DVP, None, BK, BM, BN),
    )
    begin = tl.maximum(start, full) - full
    blocks = Blocks(partial_ptr + begin, tile_ptr + begin, tl.maximum(stop, full) - full - begin)
    softmax = _walk(
        *(softmax, q, k_rows, v_rows, blocks, bits, bound, score, True),
        Sizes(False, UNIT, D, DP, DV, DVP, None, BK, BM, BN),
    )

    acc, peak, total = softmax.acc, softmax.peak, softmax.total
    dead = (total == 0.0) | (alive == 0)
    total = tl.where(dead, 1.0, total)
    value = tl.where(dead[:, None], 0.0, acc / total[:, None])
    row = ((part * samples + batch).to(tl.int64) * Hq + head) * n + query
    at = (row * DV)[:, None] + tl.arange(0, DVP)[None, :]
    # The merge reads no output whose lse is -inf.
    tl.store(
        out_ptr + at,
        value.to(out_ptr.dtype.element_ty),
        mask=(mine & worked)[:, None] & (tl.arange(0, DVP) < DV)[None, :],
    )
    tl.store(lse_ptr + row, tl.where(dead, float("-inf"), (peak + tl.log2(total)) * LN2), mask=mine)


@triton.jit(do_not_specialize=["rows", "parts"])
def merge_kernel(
    parts_ptr,  # fp32 [S, rows, DV]
    lses_ptr,  # fp32 [S, rows]
    out_ptr,  # [rows, DV]
    lse_ptr,  # fp32 [rows]
    rows,
    parts,  # S
    DV: tl.constexpr,
    DVP: tl.constexpr,
    MOST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, MOST)
    column = tl.arange(0, DVP)
    lses = tl.load(lses_ptr + part.to(tl.int64) * rows + row, mask=part < parts, other=float("-inf"))
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2((lses - base) * LOG2E)
    at = ((part.to(tl.int64) * rows + row) * DV)[:, None] + column[None, :]
    value = tl.load(parts_ptr + at, mask=(lses > float("-inf"))[:, None] & (column < DV)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    value = tl.sum(value * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * DV + column, value.to(out_ptr.dtype.element_ty), mask=column < DV)
    lse = tl.where(total == 0.0, float("-inf"), base + tl.log2(tl.where(total == 0.0, 1.0, total)) * LN2)
    tl.store(lse_ptr + row, lse)


def launch(device: torch.device, head_dim: int, dtype: torch.dtype, featured: bool) -> Launch:
    """The launch for a device, the larger of the two head dims, and a dtype; featured: see FEATURED."""
    architecture = family(device)
    if architecture == "interpreter":
        return Launch(ROWS, 32, 4, 1)
    bucket = max(32, 1 << (head_dim - 1).bit_length())
    return committed((architecture, bucket, "single" if dtype == torch.float32 else "half"), featured)


def committed(key: tuple[str, int, str], featured: bool) -> Launch:
    """A row of LAUNCHES, or what FEATURED puts in its place."""
    return FEATURED.get(key, LAUNCHES[key]) if featured else LAUNCHES[key]


@lru_cache
def _programs(device: torch.device) -> int:
    """How many programs fill a device."""
    if device.type != "cuda":
        return 64
    return PROGRAMS_EACH * torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    q: torch.Tensor,  # [B, Hq, n, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    lengths: torch.Tensor,  # int32 or int64 [B]: tokens in the cache, the n new ones included
    rows: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: layout.Score,
    sinks: torch.Tensor | None,  # [Hq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Hq, n, DV] in q's dtype, lse [B, Hq, n] in fp32, natural log, of the keys alone), both contiguous.

    Query i of a sample stands at position length - n + i. One that sees nothing gets out 0 and lse -inf.
    """
    B, Hq, n, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    group = Hq // Hkv
    dtype = q.dtype if sinks is None else torch.float32  # rounded once, when the sinks have had their share
    out = torch.empty((B, Hq, n, DV), dtype=dtype, device=q.device)
    lse = torch.empty((B, Hq, n), dtype=torch.float32, device=q.device)
    q, score, _ = with_normal_scale(q, score)
    q, k, v, lengths = readable(q), readable(k), readable(v), lengths.contiguous()
    at = launch(q.device, max(D, DV), q.dtype, score.featured).within((256, BK))
    unit = stride_unit(q, k, v)
    pattern_b, pattern_h = (s if size > 1 else 0 for s, size in zip(pattern_of.stride(), pattern_of.shape, strict=True))
    leaders = group if pattern_h else 1
    crossed = min(n, 2)
    slopes = None if score.slopes is None else score.slopes.contiguous()
    chunks = triton.cdiv(group * n, at.BM)
    lists = ListPointers(rows.ranges, rows.full_indices, rows.partial_indices, rows.partial_tiles, None, None)
    # A row holds at most all blocks of the cache.
    wanted = triton.cdiv(_programs(q.device), B * Hkv * chunks)
    parts = max(1, min(wanted, MOST_PARTS, triton.cdiv(M, PART_KEYS)))
    if parts == 1:
        part_out, part_lse = out, lse
    else:
        part_out = torch.empty((parts, B, Hq, n, DV), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((parts, B, Hq, n), dtype=torch.float32, device=q.device)
    with device_of(q):
        decode_kernel[(B * Hkv * leaders * chunks, parts * crossed)](
            *(q, k, v, part_out, part_lse, lengths, lists, tiles.bits, pattern_of),
            *(*strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), pattern_b, pattern_h),
            *(score.scale, B, n, M, Hq, group, chunks, leaders, rows.ranges.shape[1], crossed, parts),
            *(max(1, PART_KEYS // BK), BQ),
            cap=score.softcap,
            slopes_ptr=slopes,
            slopes_b=slopes.shape[-1] if slopes is not None and slopes.dim() == 2 else 0,
            UNIT=unit,
            D=D,
            DP=padded(D),
            DV=DV,
            DVP=padded(DV),
            BK=BK,
            BM=at.BM,
            BN=at.BN,
            num_warps=at.warps,
            num_stages=at.stages,
        )
        if parts > 1:
            merge_kernel[(B * Hq * n,)](
                *(part_out, part_lse, out, lse, B * Hq * n, parts),
                DV=DV,
                DVP=padded(DV),
                MOST=MOST_PARTS,
                num_warps=8 if DV > 128 else 4,
            )
    if sinks is not None:
        out = (out * sink_logits.share(lse, sinks).unsqueeze(-1)).to(q.dtype)
    return out, lse
