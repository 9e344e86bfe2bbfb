"""dK and dV: one program owns a step of keys of one key head.

It visits the query blocks of its block column for every query head of the group, and works on S^T = K Q^T, so that P^T
and dS^T enter the next product from registers. The formulas are in `backward`, shapes as in `common`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.bias import bias_at, bias_of, biased
from sparseflash.kernels.triton.common import LOG2E, exponential, load_rows, matrix, place, share, spread_t, store_rows
from sparseflash.kernels.triton.score import (
    factor,
    head_key,
    in_unit,
    keep_mask,
    keep_scale,
    row_keys,
    scored,
    slope_of,
    softcap_grad,
)
from sparseflash.kernels.triton.types import Bias, Keys, Place, Rows, Saved, Score, Sizes
from sparseflash.kernels.triton.walk import (
    block_of,
    blocks_of,
    first_query_bits,
    line_of,
    load_step,
    next_query_bits,
    ranges_of,
    slot_of,
)


@triton.jit
def _walk(keys, q_rows, dout_rows, saved, blocks, bits, key, score, columns, PARTIAL: tl.constexpr, sizes):
    """The keys with their gradients from a column's blocks of one kind.

    `key` is the first one of the program within its block, `columns` [BN] are the indices of its keys.
    """
    HIDDEN: tl.constexpr = PARTIAL or score.bias is not None
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    STEPS: tl.constexpr = sizes.BQ // BM
    f = factor(score)
    block = block_of(blocks, 0, STEPS)
    if PARTIAL:
        ahead = first_query_bits(blocks, bits, key, sizes)
    for i in range(0, blocks.count * STEPS):
        first = block * sizes.BQ + (i % STEPS) * BM
        block = block_of(blocks, i + 1, STEPS)
        rows = first + tl.arange(0, BM)
        keep = None
        words = None
        if PARTIAL:
            keep = rows < saved.count
            words = ahead.words
            ahead = next_query_bits(ahead, i, blocks, bits, key, sizes)
        q = load_step(q_rows, first, keep, sizes.UNIT, BM, sizes.D, sizes.DP)
        dout = load_step(dout_rows, first, keep, sizes.UNIT, BM, sizes.DV, sizes.DVP)
        norm = tl.load(saved.norm + rows)
        product = tl.dot(keys.k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(keys.v, tl.trans(dout), input_precision="ieee")
        s = scored(product, score, first)
        if score.bias is not None:
            s = biased(s, tl.trans(bias_at(score.bias, first, keys.first, PARTIAL, BM, BN)), score.bias)
        if PARTIAL:
            s = tl.where(spread_t(words, key, BM, BN), s, float("-inf"))
        p = exponential(s * f - norm[None, :], q.dtype == tl.float32)
        z = p
        if score.dropout is not None:
            survives = keep_mask(row_keys(score.dropout, rows)[None, :], columns[:, None], score.threshold)
            z = tl.where(survives, p, 0.0)
            dp = tl.where(survives, dp * keep_scale(score.threshold), 0.0)
        dv = tl.dot(z.to(dout.dtype), dout, keys.dv, input_precision="ieee")
        delta = tl.load(saved.delta + rows)  # late: it is not needed, nor in registers, before
        ds = p * (dp - delta[None, :])
        if score.cap is not None:
            ds *= softcap_grad(product, score.c, score.cap)
        if HIDDEN:
            ds = tl.where(p == 0.0, 0.0, ds)  # dp of an invisible pair may be anything
        dk = tl.dot(ds.to(q.dtype), q, keys.dk, input_precision="ieee")
        keys = Keys(keys.k, keys.v, dk, dv, keys.first)
    return keys


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "M", "Hkv", "group", "lines", "heads", "together"),
        *("items", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
        *("bias_ptr", "bias_b", "bias_h", "bias_n", "bias_m", "reach"),
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
    lists,  # `ListPointers` of the columns
    bits,  # `Bits`
    pattern_ptr,
    q_tiles,  # descriptors of all of q and dout, of tiles [1, 1, BM, D]; None where rows come through pointers
    dout_tiles,
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
    items,  # work items; from here to dv_parts_ptr: None where no column is split
    dk_parts_ptr,  # fp32 [slots, B * Hkv, BK, D]
    dv_parts_ptr,  # fp32 [slots, B * Hkv, BK, DV]
    cap,  # from here to reach: None where the feature is off
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
    STEPS: tl.constexpr = BK // BN
    rank, index = place((lines if lists.work_items is None else items) * STEPS, heads, together)
    batch = index // Hkv
    key_head = index % Hkv
    # Any fixed pattern's order or work visits every column once; the group's first one stands for the group.
    pattern_ptr += batch * pattern_b
    p = tl.load(pattern_ptr + key_head * group * pattern_h).to(tl.int64)
    own = Place(p, rank, STEPS, lines, items)
    line = line_of(lists, own)
    low = None
    high = None
    if lists.work_items is not None:
        if line < 0:
            return
        # Another pattern of the group has other entries here: every head gives this program the same share of its own.
        slot = slot_of(lists, own)
        low, high = share(ranges_of(lists, own, line), lists.ranges + (p * lines + line) * 4)
    key = (rank % STEPS) * BN
    first = line * BK + key

    unit = 1.0 if q_ptr.dtype.element_ty == tl.float32 else LOG2E
    c = in_unit(scale, unit)
    cap = in_unit(cap, unit)
    columns = None
    if seed_ptr is not None:
        columns = first + tl.arange(0, BN)
    keep = first + tl.arange(0, BN) < M
    k = load_rows(matrix(k_ptr, batch, key_head, k_b, k_h, UNIT), first, k_n, keep, UNIT, BN, D, DP)
    v = load_rows(matrix(v_ptr, batch, key_head, v_b, v_h, UNIT), first, v_n, keep, UNIT, BN, DV, DVP)
    keys = Keys(k, v, tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DVP), tl.float32), first)
    for member in range(0, group):
        head = key_head * group + member
        row = (batch * (Hkv * group) + head).to(tl.int64) * NP
        q_rows = Rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), q_n, q_tiles, batch, head)
        dout_rows = Rows(matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT), dout_n, dout_tiles, batch, head)
        saved = Saved(norm_ptr + row, delta_ptr + row, N)
        slope = slope_of(slopes_ptr, slopes_b, batch, head, unit)
        position = None
        if q_offset is not None:
            position = first - q_offset
        dropout = None
        if seed_ptr is not None:
            dropout = head_key(seed_ptr, batch * (Hkv * group) + head)
        bias = None
        if bias_ptr is not None:
            start = bias_of(bias_ptr, batch, head, bias_b, bias_h)
            bias = Bias(start, bias_n, bias_m, reach, q_offset, N, M, in_unit(1.0, unit))
        score = Score(c, cap, slope, position, dropout, threshold, bias)
        p = tl.load(pattern_ptr + head * pattern_h).to(tl.int64)
        span = lists.ranges + (p * lines + line) * 4
        blocks = blocks_of(lists, span, low, high, False)
        keys = _walk(
            *(keys, q_rows, dout_rows, saved, blocks, bits, key, score),
            columns,  # None has no place in a tuple that is unpacked
            False,
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        blocks = blocks_of(lists, span, low, high, True)
        keys = _walk(
            *(keys, q_rows, dout_rows, saved, blocks, bits, key, score),
            columns,
            True,
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
    dk, dv = keys.dk, keys.dv
    row = index.to(tl.int64) * M
    if seed_ptr is not None:
        dv *= keep_scale(threshold)
    if lists.work_items is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            at = (slot.to(tl.int64) * heads + index) * BK
            store_rows(dk_parts_ptr + at * D, key, D, keep, dk * tl.cast(scale, tl.float32), 1, BN, D, DP)
            store_rows(dv_parts_ptr + at * DV, key, DV, keep, dv, 1, BN, DV, DVP)
            return
    store_rows(dk_ptr + row * D, first, D, keep, dk * tl.cast(scale, tl.float32), 1, BN, D, DP)
    store_rows(dv_ptr + row * DV, first, DV, keep, dv, 1, BN, DV, DVP)
