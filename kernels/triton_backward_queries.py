"""dQ: one program owns a step of queries of one query head, as in the forward pass.

The formulas are in triton_backward, shapes as in triton_common.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton_common import (
    LOG2E,
    entries,
    exponential,
    load_rows,
    load_seen,
    matrix,
    place,
    store_rows,
)
from sparseflash.kernels.triton_score import bend, factor, head_key, kept, retained, row_keys, scored
from sparseflash.kernels.triton_tiles import load_bits, seen_by


@triton.jit
def _walk_queries(
    dq,  # fp32 [BM, DP]
    q,
    dout,
    norm,
    delta,
    k_ptr,
    v_ptr,
    k_n,
    v_n,
    k_tiles,  # from here to kv_head as in the forward pass
    v_tiles,
    batch,
    kv_head,
    entries_ptr,  # the row's key blocks of one kind
    tile_ptr,  # their tiles, when PARTIAL
    count,  # how many
    bits_ptr,
    seen_ptr,
    query,  # first query of this step within its block
    c,
    cap,  # from here to threshold: None where the feature is off
    slope,
    position,  # of the first query of this step
    drops,  # [BM]: row keys of dropout
    threshold,
    PARTIAL: tl.constexpr,
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
    f = factor(c, cap, slope)
    # Read one iteration ahead, as in the forward pass.
    block = tl.load(entries_ptr, mask=count > 0, other=0)
    if PARTIAL:
        tile = tl.load(tile_ptr, mask=count > 0, other=0)
        seen = load_seen(seen_ptr, tile, 0, count > 0, W, BN)
        words = load_bits(bits_ptr, tile, query, 0, count > 0, FRAGMENTS, BQ, BK, BM, BN)
        tile = tl.load(tile_ptr + 1 // SPLIT, mask=count > 1 // SPLIT, other=0)
    for i in range(0, count * SPLIT):
        first = block * BK + (i % SPLIT) * BN
        following = (i + 1) // SPLIT
        block = tl.load(entries_ptr + following, mask=following < count, other=0)
        keep = None
        if PARTIAL:
            keep = seen
            visible = seen_by(words, (i % SPLIT) * BN, FRAGMENTS, BM, BN)
            key = ((i + 1) % SPLIT) * BN
            seen = load_seen(seen_ptr, tile, key, following < count, W, BN)
            words = load_bits(bits_ptr, tile, query, key, following < count, FRAGMENTS, BQ, BK, BM, BN)
            following = (i + 2) // SPLIT
            tile = tl.load(tile_ptr + following, mask=following < count, other=0)
        if k_tiles is not None:
            k = k_tiles.load([batch, kv_head, first, 0]).reshape(BN, DP)
            v = v_tiles.load([batch, kv_head, first, 0]).reshape(BN, DVP)
        else:
            k = load_rows(k_ptr, first, k_n, keep, UNIT, BN, D, DP)
            v = load_rows(v_ptr, first, v_n, keep, UNIT, BN, DV, DVP)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        s = scored(product, c, cap, slope, position, first)
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        p = exponential(s * f - norm[:, None], q.dtype == tl.float32)
        if drops is not None:
            survives = kept(drops[:, None], (first + tl.arange(0, BN))[None, :], threshold)
            dp = tl.where(survives, dp * retained(threshold), 0.0)
        ds = p * (dp - delta[:, None])
        if cap is not None:
            ds *= bend(product, c, cap)
        if PARTIAL:
            ds = tl.where(visible, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "Hq", "group", "lines", "heads", "together"),
        *("items", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
    ]
)
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    dq_ptr,
    spans_ptr,
    full_ptr,
    partial_ptr,
    tile_ptr,
    order_ptr,
    bits_ptr,
    seen_ptr,
    pattern_ptr,
    k_tiles,  # descriptors: see _walk_queries
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
    dout_b,
    dout_h,
    dout_n,
    pattern_b,
    pattern_h,
    scale,
    N,
    NP,
    Hq,
    group,  # query heads per key head
    lines,  # block rows
    heads,  # B * Hq
    together,
    work_ptr,  # from here to parts_ptr: None where no row is cut
    items,  # of work
    parts_ptr,  # fp32 [slots, B * Hq, BQ, D]
    cap,  # from here to threshold: None where the feature is off
    slopes_ptr,
    slopes_b,
    q_offset,
    seed_ptr,
    threshold,
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

    c = tl.cast(scale, tl.float32)
    unit = 1.0
    if q_ptr.dtype.element_ty != tl.float32:
        unit = LOG2E
        c *= LOG2E
    if cap is not None:
        cap = tl.cast(cap, tl.float32) * unit
    slope = None
    position = None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + batch * slopes_b + head) * unit
        position = first + q_offset
    rows = first + tl.arange(0, BM)
    drops = None
    if seed_ptr is not None:
        drops = row_keys(head_key(seed_ptr, index), rows)
    keep = rows < N
    q = load_rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), first, q_n, keep, UNIT, BM, D, DP)
    dout_ptr = matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT)
    dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
    row = index.to(tl.int64) * NP
    norm = tl.load(norm_ptr + row + rows)
    delta = tl.load(delta_ptr + row + rows)
    k_ptr = matrix(k_ptr, batch, head // group, k_b, k_h, UNIT)
    v_ptr = matrix(v_ptr, batch, head // group, v_b, v_h, UNIT)
    dq = tl.zeros((BM, DP), tl.float32)

    span = spans_ptr + (p * lines + line) * 4 if work_ptr is None else item + 1
    start, count = entries(span, None, None, False)
    dq = _walk_queries(
        *(dq, q, dout, norm, delta, k_ptr, v_ptr, k_n, v_n),
        k_tiles,
        v_tiles,
        *(batch, head // group, full_ptr + start, tile_ptr, count),
        *(bits_ptr, seen_ptr, query, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(False, FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    start, count = entries(span, None, None, True)
    dq = _walk_queries(
        *(dq, q, dout, norm, delta, k_ptr, v_ptr, k_n, v_n),
        None,
        None,
        *(batch, head // group, partial_ptr + start, tile_ptr + start, count),
        *(bits_ptr, seen_ptr, query, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(True, FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    if work_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * D, query, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
            return
    store_rows(dq_ptr + index.to(tl.int64) * N * D, first, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
