"""dQ: one program owns a step of queries of one query head, as in the forward pass.

The formulas are in `backward`, shapes as in `common`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.common import (
    LOG2E,
    entries,
    exponential,
    load_rows,
    matrix,
    place,
    store_rows,
)
from sparseflash.kernels.triton.score import bend, factor, head_key, kept, retained, row_keys, scored
from sparseflash.kernels.triton.tiles import seen_by
from sparseflash.kernels.triton.types import Bits, Blocks, Queries, Rows, Score, Sizes
from sparseflash.kernels.triton.walk import block_of, first_key_bits, load_step, next_key_bits


@triton.jit
def _walk(dq, queries, k_rows, v_rows, blocks, bits, query, score, PARTIAL: tl.constexpr, sizes):
    """dQ, fp32 [BM, DP], with a row's blocks of one kind; `query` is the first one of the program within its block."""
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    SPLIT: tl.constexpr = sizes.BK // BN
    f = factor(score.c, score.cap, score.slope)
    block = block_of(blocks, 0, SPLIT)
    if PARTIAL:
        ahead = first_key_bits(blocks, bits, query, sizes)
    for i in range(0, blocks.count * SPLIT):
        first = block * sizes.BK + (i % SPLIT) * BN
        block = block_of(blocks, i + 1, SPLIT)
        keep = None
        if PARTIAL:
            keep = ahead.seen
            visible = seen_by(ahead.words, (i % SPLIT) * BN, sizes.FRAGMENTS, BM, BN)
            ahead = next_key_bits(ahead, i, blocks, bits, query, sizes)
        k = load_step(k_rows, first, keep, sizes.UNIT, BN, sizes.D, sizes.DP)
        v = load_step(v_rows, first, keep, sizes.UNIT, BN, sizes.DV, sizes.DVP)
        product = tl.dot(queries.q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(queries.dout, tl.trans(v), input_precision="ieee")
        s = scored(product, score.c, score.cap, score.slope, score.position, first)
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        p = exponential(s * f - queries.norm[:, None], k.dtype == tl.float32)
        if score.dropout is not None:
            survives = kept(score.dropout[:, None], (first + tl.arange(0, BN))[None, :], score.threshold)
            dp = tl.where(survives, dp * retained(score.threshold), 0.0)
        ds = p * (dp - queries.delta[:, None])
        if score.cap is not None:
            ds *= bend(product, score.c, score.cap)
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
    k_tiles,  # descriptors, as in the forward pass
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
    dropout = None
    if seed_ptr is not None:
        dropout = row_keys(head_key(seed_ptr, index), rows)
    keep = rows < N
    q = load_rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), first, q_n, keep, UNIT, BM, D, DP)
    dout_ptr = matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT)
    dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
    row = index.to(tl.int64) * NP
    queries = Queries(q, dout, tl.load(norm_ptr + row + rows), tl.load(delta_ptr + row + rows))
    k_ptr = matrix(k_ptr, batch, head // group, k_b, k_h, UNIT)
    v_ptr = matrix(v_ptr, batch, head // group, v_b, v_h, UNIT)
    k_rows = Rows(k_ptr, k_n, k_tiles, batch, head // group)
    v_rows = Rows(v_ptr, v_n, v_tiles, batch, head // group)
    bits = Bits(bits_ptr, seen_ptr)
    score = Score(c, cap, slope, position, dropout, threshold)
    dq = tl.zeros((BM, DP), tl.float32)

    span = spans_ptr + (p * lines + line) * 4 if work_ptr is None else item + 1
    start, count = entries(span, None, None, False)
    dq = _walk(
        *(dq, queries, k_rows, v_rows, Blocks(full_ptr + start, tile_ptr, count), bits, query, score, False),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    start, count = entries(span, None, None, True)
    k_rows = Rows(k_ptr, k_n, None, batch, head // group)  # through pointers, as in the forward pass
    v_rows = Rows(v_ptr, v_n, None, batch, head // group)
    dq = _walk(
        *(dq, queries, k_rows, v_rows, Blocks(partial_ptr + start, tile_ptr + start, count), bits, query, score, True),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    if work_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * D, query, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
            return
    store_rows(dq_ptr + index.to(tl.int64) * N * D, first, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
