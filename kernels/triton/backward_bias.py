"""The gradient of a bias: dS, summed over the pairs that share an element. No atomics, bitwise deterministic.

One program owns a step of keys of one head of the bias, and visits its block column for every sample and query head
that share this head of the bias, in turn. Its dS^T of a step of queries, see `backward_keys`,

- is added to the gradient in place, for a bias of pairs: no other program writes there;
- is summed in registers over all of them, for one of keys;
- is summed along its diagonals, for one of distances, into a row of the program's own. torch sums the
  rows of all programs, as many at a time as fit into MEMORY.

Lines are not split here. Shapes as in `common`; a bias of queries needs no kernel, see
`sparseflash.kernels.bias`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels import bias as biases
from sparseflash.kernels.launch import configuration
from sparseflash.kernels.layout import BlockLists, Results, Score, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.backward import prepared
from sparseflash.kernels.triton.bias import bias_at, bias_of, biased
from sparseflash.kernels.triton.common import (
    LOG2E,
    device_of,
    exponential,
    list_pointers,
    load_rows,
    matrix,
    padded,
    programs,
    readable,
    spread_t,
    stride_unit,
    strides_in,
)
from sparseflash.kernels.triton.merge import pattern_strides
from sparseflash.kernels.triton.score import (
    factor,
    feature_arguments,
    head_key,
    in_unit,
    keep_mask,
    keep_scale,
    row_keys,
    scored,
    slope_of,
)
from sparseflash.kernels.triton.types import Bias, Bits, Held, Rows, Saved, Sizes, Sums
from sparseflash.kernels.triton.types import Score as Scoring
from sparseflash.kernels.triton.walk import block_of, blocks_of, first_query_bits, load_step, next_query_bits

MEMORY = 1 << 26  # bytes of sums by distance


@triton.jit
def _add_diagonals(sums, ds, queries, keys, bias, BM: tl.constexpr, BN: tl.constexpr):
    """The sums with those of ds [BN, BM] along its diagonals, for queries and keys that count up from their first."""
    WIDE: tl.constexpr = 2 * (BM if BM > BN else BN)  # diagonals; the first is key 0 and query BM - 1
    t = tl.arange(0, WIDE)
    row = t[:, None] + tl.arange(0, BM)[None, :] - (BM - 1)
    there = (row >= 0) & (row < BN)
    turned = tl.gather(ds, tl.minimum(tl.maximum(row, 0), BN - 1), 0)
    total = tl.sum(tl.where(there, turned, 0.0), 1)
    apart = keys - (queries + bias.offset) + (t - (BM - 1))
    met = t < BM + BN - 1
    inside = met & (apart >= -bias.reach) & (apart <= bias.reach)
    at = sums.ptr + (bias.reach + apart)
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)
    tl.debug_barrier()  # other threads read these in the next step
    below = sums.below + tl.sum(tl.where(met & (apart < -bias.reach), total, 0.0), 0)
    above = sums.above + tl.sum(tl.where(met & (apart > bias.reach), total, 0.0), 0)
    return below, above


@triton.jit
def _walk(sums, keys, q_rows, dout_rows, saved, blocks, bits, key, score, columns, PARTIAL: tl.constexpr, sizes):
    """The sums with a column's blocks of one kind; the rest as in `backward_keys`."""
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
        s = scored(tl.dot(keys.k, tl.trans(q), input_precision="ieee"), score, first)
        s = biased(s, tl.trans(bias_at(score.bias, first, keys.first, PARTIAL, BM, BN)), score.bias)
        if PARTIAL:
            s = tl.where(spread_t(words, key, BM, BN), s, float("-inf"))
        p = exponential(s * f - tl.load(saved.norm + rows)[None, :], q.dtype == tl.float32)
        dp = tl.dot(keys.v, tl.trans(dout), input_precision="ieee")
        if score.dropout is not None:
            survives = keep_mask(row_keys(score.dropout, rows)[None, :], columns[:, None], score.threshold)
            dp = tl.where(survives, dp * keep_scale(score.threshold), 0.0)
        ds = p * (dp - tl.load(saved.delta + rows)[None, :])
        ds = tl.where(p == 0.0, 0.0, ds)  # dp of an invisible pair may be anything
        if score.bias.reach is not None:
            below, above = _add_diagonals(sums, ds, first, keys.first, score.bias, BM, BN)
            sums = Sums(sums.ptr, sums.width, sums.keys, below, above)
        elif score.bias.row is None:
            sums = Sums(sums.ptr, sums.width, sums.keys + tl.sum(ds, 1), sums.below, sums.above)
        else:
            at = sums.ptr + rows.to(tl.int64)[:, None] * sums.width + columns[None, :]
            there = (rows < score.bias.queries)[:, None] & (columns < score.bias.keys)[None, :]
            tl.store(at, tl.load(at, mask=there, other=0.0) + tl.trans(ds), mask=there)
    return sums


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "M", "Hq", "group", "lines"),
        *("begin", "owners", "own_heads", "heads", "members", "length"),
        *("cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
        *("bias_ptr", "bias_b", "bias_h", "bias_n", "bias_m", "reach"),
    ]
)
def bias_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    sums_ptr,  # fp32 [owners, N, M] or [owners, M]; of distances [programs, 2 R + 1]
    lists,  # `ListPointers` of the columns
    bits,  # `Bits`
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
    Hq,
    group,  # query heads per key head
    lines,  # block columns
    begin,  # the first program's number: owners side by side, the longest lines first
    owners,  # heads of all samples that the bias has
    own_heads,  # of these of one sample
    heads,  # query heads that share one of the bias: 1 or Hq
    members,  # heads of all samples that do
    length,  # elements of an owner in sums_ptr, or of a program
    cap,  # from here to threshold: None where the feature is off
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
    number = begin + tl.program_id(0)
    rank = number // owners
    owner = number % owners
    p = tl.load(pattern_ptr + owner // own_heads * pattern_b + owner % own_heads * pattern_h).to(tl.int64)
    line = tl.load(lists.order + p * lines + rank // STEPS)
    key = (rank % STEPS) * BN
    first = line * BK + key

    unit = 1.0 if q_ptr.dtype.element_ty == tl.float32 else LOG2E
    c = in_unit(scale, unit)
    cap = in_unit(cap, unit)
    columns = first + tl.arange(0, BN)
    keep = columns < M
    position = None
    if slopes_ptr is not None:
        position = first - q_offset
    place = owner
    if reach is not None:
        place = tl.program_id(0)
    zero = tl.cast(0.0, tl.float32)
    sums = Sums(sums_ptr + place.to(tl.int64) * length, M, tl.zeros((BN,), tl.float32), zero, zero)
    for member in range(0, members):
        batch = owner // own_heads + member // heads
        head = owner % own_heads + member % heads
        index = batch * Hq + head
        k = load_rows(matrix(k_ptr, batch, head // group, k_b, k_h, UNIT), first, k_n, keep, UNIT, BN, D, DP)
        v = load_rows(matrix(v_ptr, batch, head // group, v_b, v_h, UNIT), first, v_n, keep, UNIT, BN, DV, DVP)
        keys = Held(k, v, first)
        row = index.to(tl.int64) * NP
        q_rows = Rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), q_n, None, batch, head)
        dout_rows = Rows(matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT), dout_n, None, batch, head)
        saved = Saved(norm_ptr + row, delta_ptr + row, N)
        slope = slope_of(slopes_ptr, slopes_b, batch, head, unit)
        dropout = None
        if seed_ptr is not None:
            dropout = head_key(seed_ptr, index)
        start = bias_of(bias_ptr, batch, head, bias_b, bias_h)
        bias = Bias(start, bias_n, bias_m, reach, q_offset, N, M, in_unit(1.0, unit))
        score = Scoring(c, cap, slope, position, dropout, threshold, bias)
        p = tl.load(pattern_ptr + batch * pattern_b + head * pattern_h).to(tl.int64)
        span = lists.ranges + (p * lines + line) * 4
        blocks = blocks_of(lists, span, None, None, False)
        sums = _walk(
            *(sums, keys, q_rows, dout_rows, saved, blocks, bits, key, score, columns, False),
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        blocks = blocks_of(lists, span, None, None, True)
        sums = _walk(
            *(sums, keys, q_rows, dout_rows, saved, blocks, bits, key, score, columns, True),
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        tl.debug_barrier()  # the next head may lay out a block otherwise
    if reach is not None:
        tl.store(sums.ptr, tl.load(sums.ptr) + sums.below)
        tl.debug_barrier()  # of R = 0 both ends are one
        tl.store(sums.ptr + 2 * reach, tl.load(sums.ptr + 2 * reach) + sums.above)
    elif bias_n is None:
        tl.store(sums.ptr + columns, sums.keys, mask=keep)


def bias_gradient(
    results: Results,
    q: torch.Tensor,  # [B, Hq, N, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    bias: torch.Tensor,
    columns: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: Score,
) -> torch.Tensor:
    """The gradient of a bias that is not one of queries, in its shape and dtype; contiguous. Sums are in fp32."""
    dout, dlse, out, lse = results
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    relative = biases.is_relative(bias)
    own_samples, own_heads = (1, bias.shape[0]) if relative else bias.shape[:2]
    owners = own_samples * own_heads
    total = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
    q, score, _ = with_normal_scale(q, score)
    q, k, v, dout = readable(q), readable(k), readable(v), readable(dout)
    chosen = configuration(
        *(q.device, max(D, DV), q.dtype), featured=True, split=False, block=block, tma=False, biased=True
    )
    at = chosen.keys.within(block)
    unit = stride_unit(q, k, v, dout)
    n_columns = columns.order.shape[1]
    ranks = n_columns * (BK // at.BN)
    width = bias.shape[1] if relative else total.numel() // owners
    together = max(1, MEMORY // (4 * owners * width)) if relative else ranks
    with device_of(q):
        norm, delta = prepared(dout, dlse, out, lse, unit, BQ, -(-N // BQ))
        for begin in range(0, ranks, together):
            here = min(together, ranks - begin)
            sums = total
            if relative:
                sums = torch.zeros((here, owners, width), dtype=torch.float32, device=bias.device)
            bias_kernel[programs(here, 1, owners)](
                *(q, k, v, dout, norm, delta, sums),
                *(list_pointers(columns)._replace(work_items=None), Bits(tiles.bits, None), pattern_of),
                *(*strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), *strides_in(unit, dout)),
                *pattern_strides(pattern_of),
                *(score.scale, N, norm.shape[-1], M, Hq, Hq // Hkv, n_columns),
                *(begin * owners, owners, own_heads, Hq // own_heads, B * Hq // owners, width),
                **feature_arguments(score, q.device),
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
            if relative:
                total += sums.sum(0)
    return total.to(bias.dtype)
