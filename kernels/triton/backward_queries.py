"""dQ: one program owns a step of queries of one query head, as in the forward pass.

The formulas are in `backward`, shapes as in `common`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.bias import bias_at, bias_of, biased
from sparseflash.kernels.triton.common import LOG2E, exponential, load_rows, matrix, place, store_rows
from sparseflash.kernels.triton.score import (
    dropout_keys,
    factor,
    in_unit,
    keep_mask,
    keep_scale,
    position_of,
    scored,
    slope_of,
    softcap_grad,
)
from sparseflash.kernels.triton.tiles import seen_by
from sparseflash.kernels.triton.types import Bias, Place, Queries, Rows, Score, Sizes
from sparseflash.kernels.triton.walk import (
    block_of,
    blocks_of,
    first_key_bits,
    line_of,
    load_step,
    next_key_bits,
    ranges_of,
    slot_of,
)


@triton.jit
def _walk(dq, queries, k_rows, v_rows, blocks, bits, query, score, PARTIAL: tl.constexpr, sizes):
    """dQ, fp32 [BM, DP], with a row's blocks of one kind; `query` is the first one of the program within its block."""
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    STEPS: tl.constexpr = sizes.BK // BN
    f = factor(score)
    block = block_of(blocks, 0, STEPS)
    if PARTIAL:
        ahead = first_key_bits(blocks, bits, query, sizes)
    for i in range(0, blocks.count * STEPS):
        first = block * sizes.BK + (i % STEPS) * BN
        block = block_of(blocks, i + 1, STEPS)
        keep = None
        if PARTIAL:
            keep = ahead.seen
            visible = seen_by(ahead.words, (i % STEPS) * BN, sizes.FRAGMENTS, BM, BN)
            ahead = next_key_bits(ahead, i, blocks, bits, query, sizes)
        k = load_step(k_rows, first, keep, sizes.UNIT, BN, sizes.D, sizes.DP)
        v = load_step(v_rows, first, keep, sizes.UNIT, BN, sizes.DV, sizes.DVP)
        product = tl.dot(queries.q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(queries.dout, tl.trans(v), input_precision="ieee")
        s = scored(product, score, first)
        if score.bias is not None:
            s = biased(s, bias_at(score.bias, queries.first, first, PARTIAL, BM, BN), score.bias)
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        p = exponential(s * f - queries.norm[:, None], k.dtype == tl.float32)
        if score.dropout is not None:
            survives = keep_mask(score.dropout[:, None], (first + tl.arange(0, BN))[None, :], score.threshold)
            dp = tl.where(survives, dp * keep_scale(score.threshold), 0.0)
        ds = p * (dp - queries.delta[:, None])
        if score.cap is not None:
            ds *= softcap_grad(product, score.c, score.cap)
        if PARTIAL:
            ds = tl.where(visible, ds, 0.0)
        if score.bias is not None:
            ds = tl.where(p == 0.0, 0.0, ds)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "Hq", "group", "lines", "heads", "together"),
        *("items", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
        *("bias_ptr", "bias_b", "bias_h", "bias_n", "bias_m", "reach", "bias_keys"),
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
    lists,  # `ListPointers` of the rows
    bits,  # `Bits`
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
    items,  # work items; from here to parts_ptr: None where no row is split
    parts_ptr,  # fp32 [slots, B * Hq, BQ, D]
    cap,  # from here to bias_keys: None where the feature is off
    slopes_ptr,
    slopes_b,
    q_offset,
    seed_ptr,
    threshold,
    bias_ptr,
    bias_b,
    bias_h,
    bias_n,
    bias_m,
    reach,
    bias_keys,  # M
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
    STEPS: tl.constexpr = BQ // BM
    rank, index = place((lines if lists.work_items is None else items) * STEPS, heads, together)
    batch = index // Hq
    head = index % Hq
    p = tl.load(pattern_ptr + batch * pattern_b + head * pattern_h).to(tl.int64)
    own = Place(p, rank, STEPS, lines, items)
    line = line_of(lists, own)
    if lists.work_items is not None:
        if line < 0:
            return
        slot = slot_of(lists, own)
    query = (rank % STEPS) * BM
    first = line * BQ + query

    unit = 1.0 if q_ptr.dtype.element_ty == tl.float32 else LOG2E
    c = in_unit(scale, unit)
    cap = in_unit(cap, unit)
    slope = slope_of(slopes_ptr, slopes_b, batch, head, unit)
    position = position_of(first, q_offset)
    rows = first + tl.arange(0, BM)
    dropout = dropout_keys(seed_ptr, index, first, BM)
    bias = None
    if bias_ptr is not None:
        start = bias_of(bias_ptr, batch, head, bias_b, bias_h)
        bias = Bias(start, bias_n, bias_m, reach, q_offset, N, bias_keys, in_unit(1.0, unit))
    score = Score(c, cap, slope, position, dropout, threshold, bias)
    keep = rows < N
    q = load_rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), first, q_n, keep, UNIT, BM, D, DP)
    dout_ptr = matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT)
    dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
    row = index.to(tl.int64) * NP
    queries = Queries(q, dout, tl.load(norm_ptr + row + rows), tl.load(delta_ptr + row + rows), first)
    k_rows = Rows(matrix(k_ptr, batch, head // group, k_b, k_h, UNIT), k_n, k_tiles, batch, head // group)
    v_rows = Rows(matrix(v_ptr, batch, head // group, v_b, v_h, UNIT), v_n, v_tiles, batch, head // group)
    dq = tl.zeros((BM, DP), tl.float32)

    span = ranges_of(lists, own, line)
    blocks = blocks_of(lists, span, None, None, False)
    dq = _walk(
        *(dq, queries, k_rows, v_rows, blocks, bits, query, score, False),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    blocks = blocks_of(lists, span, None, None, True)
    k_rows = Rows(k_rows.ptr, k_n, None, batch, head // group)  # through pointers, as in the forward pass
    v_rows = Rows(v_rows.ptr, v_n, None, batch, head // group)
    dq = _walk(
        *(dq, queries, k_rows, v_rows, blocks, bits, query, score, True),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    if lists.work_items is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * D, query, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
            return
    store_rows(dq_ptr + index.to(tl.int64) * N * D, first, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
