"""Block-sparse attention, forward: one program per step of a block row, or of a piece of one, and query head.

Shapes as in triton_common. Scores live in base 2: with c = scale * log2(e), softmax is exp2(c s - max(c s)) / sum.
What a cap, a bias and dropout do to them is in triton_score.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels.launch import configuration
from sparseflash.kernels.layout import Score, Side, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton_common import (
    LN2,
    LOG2E,
    device_of,
    entries,
    heads_together,
    in_tiles,
    load_rows,
    load_seen,
    matrix,
    padded,
    place,
    programs,
    readable,
    sink_share,
    store_rows,
    stride_unit,
    strides_in,
    tileable,
)
from sparseflash.kernels.triton_merge import merge_outputs, partial_results, pattern_strides
from sparseflash.kernels.triton_score import factor, feature_arguments, head_key, kept, retained, row_keys, scored
from sparseflash.kernels.triton_tiles import load_bits, ordered, seen_by


@triton.jit
def _absorb(
    acc,  # fp32 [BM, DVP]: sum of exp2(c s - peak) v
    peak,  # fp32 [BM]: largest c s so far
    total,  # fp32 [BM]: sum of exp2(c s - peak)
    s,  # fp32 [BM, BN]: products of queries and keys
    v,
    first,  # key of this step
    c,
    visible,  # [BM, BN], when PARTIAL
    cap,
    slope,
    position,
    drops,
    threshold,
    PARTIAL: tl.constexpr,
    BN: tl.constexpr,
):
    """(acc, peak, total) with one step of keys more."""
    f = factor(c, cap, slope)
    s = scored(s, c, cap, slope, position, first)
    if PARTIAL:
        s = tl.where(visible, s, float("-inf"))
    top = tl.maximum(peak, tl.max(s, 1) * f)
    base = top
    if PARTIAL:
        base = tl.where(top == float("-inf"), 0.0, top)  # a row that saw nothing yet: -inf - -inf is NaN
    p = tl.exp2(s * f - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    if drops is not None:
        p = tl.where(kept(drops[:, None], (first + tl.arange(0, BN))[None, :], threshold), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit
def _walk(
    acc,  # see _absorb
    peak,
    total,
    q,
    k_ptr,
    v_ptr,
    k_n,
    v_n,
    k_tiles,  # descriptors of all of k and v, of tiles [1, 1, BN, D]; None where rows come through pointers
    v_tiles,
    batch,
    kv_head,
    entries_ptr,  # the line's blocks of one kind
    tile_ptr,  # their tiles, when PARTIAL
    count,  # how many
    bits_ptr,
    seen_ptr,
    query,  # first query of this step within its block
    M,
    c,
    cap,  # from here to threshold: None where the feature is off
    slope,
    position,  # of the first query of this step
    drops,  # [BM]: row keys of dropout
    threshold,
    PARTIAL: tl.constexpr,
    AHEAD: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    SPLIT: tl.constexpr = BK // BN
    W: tl.constexpr = (BK + 31) // 32
    # What an iteration needs to address its loads is read one iteration ahead: read at the loop's head, it would drain
    # the prefetch of K and V.
    block = tl.load(entries_ptr, mask=count > 0, other=0)
    if PARTIAL:
        tile = tl.load(tile_ptr, mask=count > 0, other=0)
        seen = load_seen(seen_ptr, tile, 0, count > 0, W, BN)
        words = load_bits(bits_ptr, tile, query, 0, count > 0, FRAGMENTS, BQ, BK, BM, BN)
        tile = tl.load(tile_ptr + 1 // SPLIT, mask=count > 1 // SPLIT, other=0)
    if AHEAD:
        # Where no block is FULL, there may be fewer keys than a step has.
        k = load_rows(k_ptr, block * BK, k_n, _inside(block * BK, M, True, BN), UNIT, BN, D, DP)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        next_block = tl.load(entries_ptr + 1 // SPLIT, mask=count > 1 // SPLIT, other=0)
    for i in range(0, count * SPLIT):
        first = block * BK + (i % SPLIT) * BN
        following = (i + 1) // SPLIT
        block = tl.load(entries_ptr + following, mask=following < count, other=0)
        keep = None
        visible = None
        if PARTIAL:
            keep = seen
            visible = seen_by(words, (i % SPLIT) * BN, FRAGMENTS, BM, BN)
            key = ((i + 1) % SPLIT) * BN
            seen = load_seen(seen_ptr, tile, key, following < count, W, BN)
            words = load_bits(bits_ptr, tile, query, key, following < count, FRAGMENTS, BQ, BK, BM, BN)
            following = (i + 2) // SPLIT
            tile = tl.load(tile_ptr + following, mask=following < count, other=0)
        if AHEAD:
            # Indices of their own, since the compiler prefetches nothing whose index moves from variable to variable.
            next_first = next_block * BK + ((i + 1) % SPLIT) * BN
            next_block = tl.load(entries_ptr + (i + 2) // SPLIT, mask=(i + 2) // SPLIT < count, other=0)
            k = load_rows(k_ptr, next_first, k_n, _inside(next_first, M, PARTIAL, BN), UNIT, BN, D, DP)
            v = load_rows(v_ptr, first, v_n, keep, UNIT, BN, DV, DVP)
            next_s = tl.dot(q, tl.trans(k), input_precision="ieee")
        elif k_tiles is not None:
            k = k_tiles.load([batch, kv_head, first, 0]).reshape(BN, DP)
            v = v_tiles.load([batch, kv_head, first, 0]).reshape(BN, DVP)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            k = load_rows(k_ptr, first, k_n, keep, UNIT, BN, D, DP)
            v = load_rows(v_ptr, first, v_n, keep, UNIT, BN, DV, DVP)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
        acc, peak, total = _absorb(
            *(acc, peak, total, s, v, first, c),
            visible,
            cap,
            slope,
            position,
            drops,
            threshold,
            PARTIAL,
            BN,
        )
        if AHEAD:
            s = next_s
    return acc, peak, total


@triton.jit
def _inside(first, M, PARTIAL: tl.constexpr, BN: tl.constexpr):
    """Which keys from `first` on there are, [BN]; None for all, as in a FULL block."""
    keep = None
    if PARTIAL:
        keep = first + tl.arange(0, BN) < M
    return keep


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "pattern_b", "pattern_h"),
        *("scale", "N", "M", "Hq", "group", "lines", "heads", "together"),
        *("items", "sinks_ptr", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
    ]
)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    spans_ptr,
    full_ptr,
    partial_ptr,
    tile_ptr,
    order_ptr,
    bits_ptr,
    seen_ptr,
    pattern_ptr,
    k_tiles,  # descriptors: see _walk
    v_tiles,
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
    N,
    M,
    Hq,
    group,  # query heads per key head
    lines,  # block rows
    heads,  # B * Hq
    together,
    work_ptr,  # from here to lses_ptr: None where no row is cut
    items,  # of work
    parts_ptr,  # fp32 [slots, B * Hq, BQ, DV]: outputs of pieces, sinks left out
    lses_ptr,  # fp32 [slots, B * Hq, BQ], base 2
    sinks_ptr,  # fp32 [Hq]; from here to threshold: None where the feature is off
    cap,
    slopes_ptr,
    slopes_b,
    q_offset,
    seed_ptr,
    threshold,
    AHEAD: tl.constexpr,
    FRAGMENTS: tl.constexpr,
    UNIT: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    SPLIT: tl.constexpr = BQ // BM
    places = lines
    if work_ptr is not None:
        places = items
    rank, index = place(places * SPLIT, heads, together)
    batch = index // Hq
    head = index % Hq
    p = tl.load(pattern_ptr + batch * pattern_b + head * pattern_h).to(tl.int64)
    if work_ptr is None:
        line = tl.load(order_ptr + p * lines + rank // SPLIT)
    else:
        item = work_ptr + (p * items + rank // SPLIT) * 6
        line = tl.load(item)
        if line < 0:
            return
        slot = tl.load(item + 5)
    query = (rank % SPLIT) * BM
    first = line * BQ + query

    c = tl.cast(scale, tl.float32) * LOG2E
    if cap is not None:
        cap = tl.cast(cap, tl.float32) * LOG2E
    slope = None
    position = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_b + head) * LOG2E
        position = first + q_offset
    drops = None
    if seed_ptr is not None:
        drops = row_keys(head_key(seed_ptr, index), first + tl.arange(0, BM))
    keep = first + tl.arange(0, BM) < N
    q = load_rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), first, q_n, keep, UNIT, BM, D, DP)
    k_ptr = matrix(k_ptr, batch, head // group, k_b, k_h, UNIT)
    v_ptr = matrix(v_ptr, batch, head // group, v_b, v_h, UNIT)
    acc = tl.zeros((BM, DVP), tl.float32)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)

    span = spans_ptr + (p * lines + line) * 4 if work_ptr is None else item + 1
    start, count = entries(span, None, None, False)
    acc, peak, total = _walk(
        *(acc, peak, total, q, k_ptr, v_ptr, k_n, v_n),
        k_tiles,
        v_tiles,
        *(batch, head // group, full_ptr + start, tile_ptr, count),
        *(bits_ptr, seen_ptr, query, M, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(False, AHEAD, FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    start, count = entries(span, None, None, True)
    acc, peak, total = _walk(
        *(acc, peak, total, q, k_ptr, v_ptr, k_n, v_n),
        None,  # not the values of keys that are not there, or that no query sees: they may be NaN
        None,
        *(batch, head // group, partial_ptr + start, tile_ptr + start, count),
        *(bits_ptr, seen_ptr, query, M, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(True, AHEAD, FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )

    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    row = index.to(tl.int64) * N
    out = out_ptr + row * DV
    value = acc / total[:, None]
    if work_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            if seed_ptr is not None:
                value *= retained(threshold)
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * DV, query, DV, keep, value, 1, BM, DV, DVP)
            lse = tl.where(dead, float("-inf"), peak + tl.log2(total))
            tl.store(lses_ptr + at + query + tl.arange(0, BM), lse, mask=keep)
            return
    if sinks_ptr is not None:
        lse = tl.where(dead, 0.0, peak + tl.log2(total))
        value *= sink_share(lse, tl.load(sinks_ptr + head) * LOG2E)[:, None]
    if seed_ptr is not None:
        value *= retained(threshold)
    store_rows(out, first, DV, keep, value, 1, BM, DV, DVP)
    lse = tl.where(dead, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(lse_ptr + row + first + tl.arange(0, BM), lse, mask=keep)


def forward(
    q: torch.Tensor,  # [B, Hq, N, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    rows: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: Score,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Hq, N, DV] in q's dtype, lse [B, Hq, N] in fp32, natural log, of the keys alone), both contiguous.

    A query that sees nothing gets out 0 and lse -inf.
    """
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    out = torch.empty((B, Hq, N, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq, N), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, score, _ = with_normal_scale(q, score)
    q, k, v = readable(q), readable(k), readable(v)
    chosen = configuration(
        q.device, max(D, DV), q.dtype, featured=score.featured, cut=rows.slots > 0, block=block, tma=tileable(k, v)
    )
    at = chosen.forward.within(block)
    unit = stride_unit(q, k, v)
    n_rows = rows.order.shape[1]
    sinks = None if sinks is None else sinks.float().contiguous()
    parts, lses = partial_results(rows, B * Hq, BQ, DV), partial_results(rows, B * Hq, BQ)
    pattern_b, pattern_h = pattern_strides(pattern_of)
    bits, in_fragments = ordered(tiles.bits, BK, q.dtype)
    together = heads_together(M * (D + DV) * q.element_size() * Hkv // Hq, B * Hq)
    with device_of(q):
        plain = parts is None and not score.featured
        if at.gluon and at == chosen.forward and in_fragments and plain and tileable(q, k, v):
            from sparseflash.kernels import gluon_forward

            gluon_forward.forward(
                q, k, v, out, lse, rows, bits, tiles, pattern_of, block, score.scale, sinks, together, at
            )
            return out, lse
        forward_kernel[programs(rows.items, BQ // at.BM, B * Hq)](
            *(q, k, v, out, lse),
            *(rows.spans, rows.full, rows.partial, rows.tile, rows.order, bits, tiles.seen_keys, pattern_of),
            *in_tiles(at.tma, at.BN, k, v),
            *(*strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), pattern_b, pattern_h),
            *(score.scale, N, M, Hq, Hq // Hkv, n_rows, B * Hq),
            together,
            *((None, None) if parts is None else (rows.work, rows.items)),
            *(parts, lses, sinks),
            **feature_arguments(score, q.device),
            AHEAD=at.ahead,
            FRAGMENTS=in_fragments,
            UNIT=unit,
            D=D,
            DP=padded(D),
            DV=DV,
            DVP=padded(DV),
            BQ=BQ,
            BK=BK,
            BM=at.BM,
            BN=at.BN,
            num_warps=at.warps,
            num_stages=at.stages,
        )
        if parts is not None and lses is not None:
            merge_outputs(parts, lses, out, lse, rows, pattern_of, sinks)
    return out, lse
