"""dK and dV: one program owns a step of keys of one key head.

It visits the query blocks of its block column for every query head of the group, and works on S^T = K Q^T, so that P^T
and dS^T enter the next product from registers. The formulas are in triton_backward, shapes as in triton_common.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton_common import (
    LOG2E,
    add_rows,
    entries,
    exponential,
    load_rows,
    load_words_t,
    matrix,
    place,
    share,
    spread_t,
    store_rows,
)
from sparseflash.kernels.triton_score import bend, factor, head_key, kept, retained, row_keys, scored


@triton.jit
def _walk_keys(
    dk,  # fp32 [BN, DP]
    dv,  # fp32 [BN, DVP]
    k,
    v,
    q_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    q_n,
    dout_n,
    q_tiles,  # descriptors of all of q and dout, of tiles [1, 1, BM, D]; None where rows come through pointers
    dout_tiles,
    batch,
    head,
    entries_ptr,  # the column's query blocks of one kind
    tile_ptr,  # their tiles, when PARTIAL
    count,  # how many
    bits_ptr,
    key,  # first key of this step within its block
    c,
    N,
    cap,  # from here to threshold: None where the feature is off
    slope,
    position,  # of the first key of this step, less that of query 0
    columns,  # [BN]: indices of this step's keys
    head_bits,  # dropout's key of this head
    threshold,
    dq_ptr,  # from here to k_finite: None where a pass of its own gives dQ; fp32 [N, D] of this head
    dq_tiles,  # a descriptor of all of dQ, of tiles [1, 1, BM, D]; None where it is added through pointers
    k_finite,
    PARTIAL: tl.constexpr,
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
    W: tl.constexpr = (BK + 31) // 32
    f = factor(c, cap, slope)
    # Read one iteration ahead, as in the forward pass.
    block = tl.load(entries_ptr, mask=count > 0, other=0)
    if PARTIAL:
        tile = tl.load(tile_ptr, mask=count > 0, other=0)
        words = load_words_t(bits_ptr, tile, 0, key, count > 0, BQ, W, BM, BN)
        tile = tl.load(tile_ptr + 1 // SPLIT, mask=count > 1 // SPLIT, other=0)
    for i in range(0, count * SPLIT):
        first = block * BQ + (i % SPLIT) * BM
        following = (i + 1) // SPLIT
        block = tl.load(entries_ptr + following, mask=following < count, other=0)
        rows = first + tl.arange(0, BM)
        keep = None
        if PARTIAL:
            keep = rows < N
            bits = words
            words = load_words_t(bits_ptr, tile, ((i + 1) % SPLIT) * BM, key, following < count, BQ, W, BM, BN)
            following = (i + 2) // SPLIT
            tile = tl.load(tile_ptr + following, mask=following < count, other=0)
        if q_tiles is not None:  # rows that are not there come as zeros
            q = q_tiles.load([batch, head, first, 0]).reshape(BM, DP)
            dout = dout_tiles.load([batch, head, first, 0]).reshape(BM, DVP)
        else:
            q = load_rows(q_ptr, first, q_n, keep, UNIT, BM, D, DP)
            dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
        norm = tl.load(norm_ptr + rows)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        s = scored(product, c, cap, slope, position, first)
        if PARTIAL:
            s = tl.where(spread_t(bits, key, BM, BN), s, float("-inf"))
        p = exponential(s * f - norm[None, :], q.dtype == tl.float32)
        z = p
        if head_bits is not None:
            survives = kept(row_keys(head_bits, rows)[None, :], columns[:, None], threshold)
            z = tl.where(survives, p, 0.0)
            dp = tl.where(survives, dp * retained(threshold), 0.0)
        dv = tl.dot(z.to(dout.dtype), dout, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + rows)  # late: it is not needed, nor in registers, before
        ds = p * (dp - delta[None, :])
        if cap is not None:
            ds *= bend(product, c, cap)
        if PARTIAL:
            ds = tl.where(p == 0.0, 0.0, ds)  # dp of an invisible pair may be anything
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if k_finite is not None:
            dq = tl.dot(tl.trans(ds), k_finite, input_precision="ieee")
            if dq_tiles is not None:  # rows that are not there are left out
                dq_tiles.atomic_add([batch, head, first, 0], dq.reshape(1, 1, BM, DP))
            else:
                add_rows(dq_ptr, first, keep, dq, BM, D, DP)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "M", "Hkv", "group", "lines", "heads", "together"),
        *("items", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
    ]
)
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dq_ptr,  # fp32 [B, Hq, N, D], zeros, to which every program adds; None where a pass of its own gives dQ
    spans_ptr,
    full_ptr,
    partial_ptr,
    tile_ptr,
    order_ptr,
    bits_ptr,
    pattern_ptr,
    q_tiles,  # descriptors: see _walk_keys
    dout_tiles,
    dq_tiles,
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
    M,
    Hkv,
    group,  # query heads per key head
    lines,  # block columns
    heads,  # B * Hkv
    together,
    work_ptr,  # from here to dv_parts_ptr: None where no column is cut
    items,  # of work
    dk_parts_ptr,  # fp32 [slots, B * Hkv, BK, D]
    dv_parts_ptr,  # fp32 [slots, B * Hkv, BK, DV]
    cap,  # from here to threshold: None where the feature is off
    slopes_ptr,
    slopes_b,
    q_offset,
    seed_ptr,
    threshold,
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
    places = lines
    if work_ptr is not None:
        places = items
    rank, index = place(places * SPLIT, heads, together)
    batch = index // Hkv
    key_head = index % Hkv
    # Any fixed pattern's order or work visits every column once; the group's first one stands for the group.
    pattern_ptr += batch * pattern_b
    p = tl.load(pattern_ptr + key_head * group * pattern_h).to(tl.int64)
    low = None
    high = None
    if work_ptr is None:
        line = tl.load(order_ptr + p * lines + rank // SPLIT)
    else:
        item = work_ptr + (p * items + rank // SPLIT) * 6
        line = tl.load(item)
        if line < 0:
            return
        # Another pattern of the group has other entries here: every head gives this program the same share of its own.
        slot = tl.load(item + 5)
        low, high = share(item + 1, spans_ptr + (p * lines + line) * 4)
    key = (rank % SPLIT) * BN
    first = line * BK + key

    c = tl.cast(scale, tl.float32)
    unit = 1.0
    if q_ptr.dtype.element_ty != tl.float32:
        unit = LOG2E
        c *= LOG2E
    if cap is not None:
        cap = tl.cast(cap, tl.float32) * unit
    columns = None
    if seed_ptr is not None:
        columns = first + tl.arange(0, BN)
    keep = first + tl.arange(0, BN) < M
    k = load_rows(matrix(k_ptr, batch, key_head, k_b, k_h, UNIT), first, k_n, keep, UNIT, BN, D, DP)
    v = load_rows(matrix(v_ptr, batch, key_head, v_b, v_h, UNIT), first, v_n, keep, UNIT, BN, DV, DVP)
    k_finite = None
    if dq_ptr is not None:
        # A key that no query sees has dS = 0, but may be anything; queries that see an infinite one have NaN in dS.
        k_finite = tl.where(tl.abs(k) < float("inf"), k, 0.0)
    dk = tl.zeros((BN, DP), tl.float32)
    dv = tl.zeros((BN, DVP), tl.float32)
    for member in range(0, group):
        head = key_head * group + member
        q_at = matrix(q_ptr, batch, head, q_b, q_h, UNIT)
        dout_at = matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT)
        row = (batch * (Hkv * group) + head).to(tl.int64) * NP
        slope = None
        position = None
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + batch * slopes_b + head) * unit
            position = first - q_offset
        dq_at = None
        if dq_ptr is not None:
            dq_at = dq_ptr + (batch * (Hkv * group) + head).to(tl.int64) * N * D
        head_bits = None
        if seed_ptr is not None:
            head_bits = head_key(seed_ptr, batch * (Hkv * group) + head)
        p = tl.load(pattern_ptr + head * pattern_h).to(tl.int64)
        span = spans_ptr + (p * lines + line) * 4
        start, count = entries(span, low, high, False)
        dk, dv = _walk_keys(
            *(dk, dv, k, v, q_at, dout_at, norm_ptr + row, delta_ptr + row, q_n, dout_n),
            q_tiles,
            dout_tiles,
            *(batch, head, full_ptr + start, tile_ptr, count, bits_ptr, key, c, N),
            cap,
            slope,
            position,
            columns,
            head_bits,
            threshold,
            dq_at,
            dq_tiles,
            k_finite,
            *(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        start, count = entries(span, low, high, True)
        dk, dv = _walk_keys(
            *(dk, dv, k, v, q_at, dout_at, norm_ptr + row, delta_ptr + row, q_n, dout_n),
            q_tiles,
            dout_tiles,
            *(batch, head, partial_ptr + start, tile_ptr + start, count, bits_ptr, key, c, N),
            cap,
            slope,
            position,
            columns,
            head_bits,
            threshold,
            dq_at,
            dq_tiles,
            k_finite,
            *(True, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
    row = index.to(tl.int64) * M
    if seed_ptr is not None:
        dv *= retained(threshold)
    if work_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BK
            store_rows(dk_parts_ptr + at * D, key, D, keep, dk * tl.cast(scale, tl.float32), 1, BN, D, DP)
            store_rows(dv_parts_ptr + at * DV, key, DV, keep, dv, 1, BN, DV, DVP)
            return
    store_rows(dk_ptr + row * D, first, D, keep, dk * tl.cast(scale, tl.float32), 1, BN, D, DP)
    store_rows(dv_ptr + row * DV, first, DV, keep, dv, 1, BN, DV, DVP)
