"""Block-sparse attention, backward: two passes over the tables, no atomics, bitwise deterministic.

With c = scale * log2(e) and norm = log2(e) lse, P = exp2(c s - norm) is recomputed (in fp32 with base e, which rounds
less for one more product), and dS = P (dP - delta) with delta = rowsum(dout * out) - dlse. A first small kernel writes
norm and delta, padded to whole blocks so that the loops read them unmasked; a query that sees nothing gets norm = +inf
and delta = 0, hence P = 0 and dS = 0, never NaN. A cap multiplies dS by its derivative, a bias changes nothing more;
dropout's bits Z are drawn again, dV takes P Z and dS takes dP Z, both scaled. Sinks were folded into dout before.

One program of `keys_kernel` owns a step of keys of one key head, visits the query blocks of its block column for every
query head of the group, and works on S^T = K Q^T, so that P^T and dS^T enter the next product from registers.
One program of `queries_kernel` owns a step of queries of one query head, as in the forward pass.
Shapes as in triton_common; NP = N rounded up to whole blocks.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels.launch import configuration
from sparseflash.kernels.layout import Score, Side, Tiles
from sparseflash.kernels.triton_common import (
    LOG2E,
    device_of,
    entries,
    heads_together,
    load_rows,
    load_seen,
    load_words,
    load_words_t,
    matrix,
    padded,
    place,
    readable,
    share,
    spread,
    spread_t,
    store_rows,
    stride_unit,
    strides_in,
)
from sparseflash.kernels.triton_merge import add_partials, partial_results, pattern_strides
from sparseflash.kernels.triton_score import bend, factor, feature_arguments, head_key, kept, retained, row_keys, scored


@triton.jit(do_not_specialize=["dout_b", "dout_h", "dout_n", "N", "NP", "Hq"])
def prepare_kernel(
    out_ptr,  # contiguous
    dout_ptr,
    lse_ptr,
    dlse_ptr,  # contiguous, or None
    norm_ptr,
    delta_ptr,
    dout_b,
    dout_h,
    dout_n,
    N,
    NP,
    Hq,
    UNIT: tl.constexpr,
    DV: tl.constexpr,
    DVP: tl.constexpr,
    BM: tl.constexpr,
):
    steps = NP // BM
    index = tl.program_id(0) // steps
    first = (tl.program_id(0) % steps) * BM
    rows = first + tl.arange(0, BM)
    keep = rows < N
    row = index.to(tl.int64) * N
    out = load_rows(out_ptr + row * DV, first, DV, keep, 1, BM, DV, DVP)
    dout_ptr = matrix(dout_ptr, index // Hq, index % Hq, dout_b, dout_h, UNIT)
    dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
    lse = tl.load(lse_ptr + row + rows, mask=keep, other=float("-inf"))
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row + rows, mask=keep, other=0.0)
    dead = lse == float("-inf")
    at = index.to(tl.int64) * NP + rows
    norm = lse if out_ptr.dtype.element_ty == tl.float32 else lse * LOG2E
    tl.store(norm_ptr + at, tl.where(dead, float("inf"), norm))
    tl.store(delta_ptr + at, tl.where(dead, 0.0, delta))


@triton.jit
def _exponential(x, NATURAL: tl.constexpr):
    if NATURAL:
        return tl.exp(x)
    else:
        return tl.exp2(x)


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
        q = load_rows(q_ptr, first, q_n, keep, UNIT, BM, D, DP)
        dout = load_rows(dout_ptr, first, dout_n, keep, UNIT, BM, DV, DVP)
        norm = tl.load(norm_ptr + rows)
        product = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        s = scored(product, c, cap, slope, position, first)
        if PARTIAL:
            s = tl.where(spread_t(bits, key, BM, BN), s, float("-inf"))
        p = _exponential(s * f - norm[None, :], q.dtype == tl.float32)
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
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
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
    spans_ptr,
    full_ptr,
    partial_ptr,
    tile_ptr,
    order_ptr,
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
        head_bits = None
        if seed_ptr is not None:
            head_bits = head_key(seed_ptr, batch * (Hkv * group) + head)
        p = tl.load(pattern_ptr + head * pattern_h).to(tl.int64)
        span = spans_ptr + (p * lines + line) * 4
        start, count = entries(span, low, high, False)
        dk, dv = _walk_keys(
            *(dk, dv, k, v, q_at, dout_at, norm_ptr + row, delta_ptr + row, q_n, dout_n),
            *(full_ptr + start, tile_ptr, count, bits_ptr, key, c, N),
            cap,
            slope,
            position,
            columns,
            head_bits,
            threshold,
            *(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        start, count = entries(span, low, high, True)
        dk, dv = _walk_keys(
            *(dk, dv, k, v, q_at, dout_at, norm_ptr + row, delta_ptr + row, q_n, dout_n),
            *(partial_ptr + start, tile_ptr + start, count, bits_ptr, key, c, N),
            cap,
            slope,
            position,
            columns,
            head_bits,
            threshold,
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
        words = load_words(bits_ptr, tile, query, 0, count > 0, BQ, W, BM, BN)
        tile = tl.load(tile_ptr + 1 // SPLIT, mask=count > 1 // SPLIT, other=0)
    for i in range(0, count * SPLIT):
        first = block * BK + (i % SPLIT) * BN
        following = (i + 1) // SPLIT
        block = tl.load(entries_ptr + following, mask=following < count, other=0)
        keep = None
        if PARTIAL:
            keep = seen
            visible = spread(words, (i % SPLIT) * BN, BM, BN)
            key = ((i + 1) % SPLIT) * BN
            seen = load_seen(seen_ptr, tile, key, following < count, W, BN)
            words = load_words(bits_ptr, tile, query, key, following < count, BQ, W, BM, BN)
            following = (i + 2) // SPLIT
            tile = tl.load(tile_ptr + following, mask=following < count, other=0)
        k = load_rows(k_ptr, first, k_n, keep, UNIT, BN, D, DP)
        v = load_rows(v_ptr, first, v_n, keep, UNIT, BN, DV, DVP)
        product = tl.dot(q, tl.trans(k), input_precision="ieee")
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        s = scored(product, c, cap, slope, position, first)
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        p = _exponential(s * f - norm[:, None], q.dtype == tl.float32)
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
        *(dq, q, dout, norm, delta, k_ptr, v_ptr, k_n, v_n, full_ptr + start, tile_ptr, count),
        *(bits_ptr, seen_ptr, query, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    start, count = entries(span, None, None, True)
    dq = _walk_queries(
        *(dq, q, dout, norm, delta, k_ptr, v_ptr, k_n, v_n, partial_ptr + start, tile_ptr + start, count),
        *(bits_ptr, seen_ptr, query, c),
        cap,
        slope,
        position,
        drops,
        threshold,
        *(True, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    if work_ptr is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * D, query, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)
            return
    store_rows(dq_ptr + index.to(tl.int64) * N * D, first, D, keep, dq * tl.cast(scale, tl.float32), 1, BM, D, DP)


def backward(
    dout: torch.Tensor,  # [B, Hq, N, DV]
    dlse: torch.Tensor | None,  # [B, Hq, N], the cotangent of the natural-log lse
    q: torch.Tensor,  # [B, Hq, N, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    out: torch.Tensor,  # [B, Hq, N, DV]
    lse: torch.Tensor,  # [B, Hq, N]
    rows: Side,
    columns: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of `triton_forward.forward` without sinks, contiguous, in the dtypes of q, k and v."""
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dq.numel() + dk.numel() == 0:
        return dq, dk, dv
    q, k, v, dout = readable(q), readable(k), readable(v), readable(dout)
    out, lse = out.contiguous(), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    launch = configuration(q.device, max(D, DV), q.dtype, score.featured, rows.slots + columns.slots > 0)
    unit = stride_unit(q, k, v, dout)
    n_rows, n_columns = rows.order.shape[1], columns.order.shape[1]
    NP = n_rows * BQ
    norm, delta = torch.empty((2, B, Hq, NP), dtype=torch.float32, device=q.device)
    pattern_b, pattern_h = pattern_strides(pattern_of)
    strides = *strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), *strides_in(unit, dout)
    features = feature_arguments(score, q.device)
    widths = {"UNIT": unit, "D": D, "DP": padded(D), "DV": DV, "DVP": padded(DV), "BQ": BQ, "BK": BK}

    with device_of(q):
        if NP:
            step = min(BQ, 64)
            prepare_kernel[(NP // step * B * Hq,)](
                *(out, dout, lse, dlse, norm, delta),
                *strides_in(unit, dout),
                *(N, NP, Hq),
                *(unit, DV, padded(DV), step),
                num_warps=4,
            )
        at = launch.keys.within(block)
        width = (D + DV) * q.element_size()
        dk_parts, dv_parts = (partial_results(columns, B * Hkv, BK, d) for d in (D, DV))
        keys_kernel[(columns.items * (BK // at.BN) * B * Hkv,)](
            *(q, k, v, dout, norm, delta, dk, dv),
            *(columns.spans, columns.full, columns.partial, columns.tile, columns.order, tiles.bits, pattern_of),
            *(*strides, pattern_b, pattern_h),
            *(score.scale, N, NP, M, Hkv, Hq // Hkv, n_columns, B * Hkv),
            heads_together(N * width * (Hq // Hkv), B * Hkv),
            *((None, None) if dk_parts is None else (columns.work, columns.items)),
            *(dk_parts, dv_parts),
            **features,
            **widths,
            BM=at.BM,
            BN=at.BN,
            num_warps=at.warps,
            num_stages=at.stages,
        )
        for parts, total in ((dk_parts, dk), (dv_parts, dv)):
            if parts is not None:
                add_partials(parts, total, columns, pattern_of, Hq // Hkv)
        del dk_parts, dv_parts, parts  # before those of dq are made
        at = launch.queries.within(block)
        dq_parts = partial_results(rows, B * Hq, BQ, D)
        queries_kernel[(rows.items * (BQ // at.BM) * B * Hq,)](
            *(q, k, v, dout, norm, delta, dq),
            *(rows.spans, rows.full, rows.partial, rows.tile, rows.order, tiles.bits, tiles.seen_keys, pattern_of),
            *(*strides, pattern_b, pattern_h),
            *(score.scale, N, NP, Hq, Hq // Hkv, n_rows, B * Hq),
            heads_together(M * width * Hkv // Hq, B * Hq),
            *((None, None) if dq_parts is None else (rows.work, rows.items)),
            dq_parts,
            **features,
            **widths,
            BM=at.BM,
            BN=at.BN,
            num_warps=at.warps,
            num_stages=at.stages,
        )
        if dq_parts is not None:
            add_partials(dq_parts, dq, rows, pattern_of, 1)
    return dq, dk, dv
