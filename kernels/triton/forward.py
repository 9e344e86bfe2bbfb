"""Block-sparse attention, forward: one program per query head and step of a block row, or of a split of one.

Shapes as in `common`. Scores live in base 2: with c = scale * log2(e), softmax is exp2(c s - max(c s)) / sum.
What a cap, a bias and dropout do to them is in `score`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels import candidates, layout
from sparseflash.kernels.launch import configuration
from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.bias import bias_at, bias_of, biased
from sparseflash.kernels.triton.common import (
    LN2,
    LOG2E,
    device_of,
    heads_together,
    in_tiles,
    list_pointers,
    load_rows,
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
from sparseflash.kernels.triton.merge import merge_outputs, partial_results, pattern_strides
from sparseflash.kernels.triton.score import (
    dropout_keys,
    factor,
    feature_arguments,
    in_unit,
    keep_scale,
    position_of,
    scored,
    slope_of,
)
from sparseflash.kernels.triton.softmax import absorb, nothing_seen
from sparseflash.kernels.triton.tiles import ordered, seen_by
from sparseflash.kernels.triton.types import Bias, Bits, Place, Rows, Score, Sizes
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
def _walk(softmax, q, k_rows, v_rows, blocks, bits, query, row, score, PARTIAL: tl.constexpr, sizes):
    """The softmax after a row's blocks of one kind.

    `query` is the first one of the program within its block, `row` within the sequence.
    """
    HIDDEN: tl.constexpr = PARTIAL or score.bias is not None
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
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = scored(s, score, first)
        if score.bias is not None:
            s = biased(s, bias_at(score.bias, row, first, PARTIAL, BM, BN), score.bias)
        if PARTIAL:
            s = tl.where(visible, s, float("-inf"))
        softmax = absorb(softmax, s, f, v, first, score, HIDDEN)
    return softmax


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "pattern_b", "pattern_h"),
        *("scale", "N", "M", "Hq", "group", "lines", "heads", "together"),
        *("items", "sinks_ptr", "cap", "slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"),
        *("bias_ptr", "bias_b", "bias_h", "bias_n", "bias_m", "reach"),
    ]
)
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    lists,  # `ListPointers` of the rows
    bits,  # `Bits`
    pattern_ptr,
    k_tiles,  # descriptors of all of k and v, of tiles [1, 1, BN, D]; None where rows come through pointers
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
    items,  # work items; from here to lses_ptr: None where no row is split
    parts_ptr,  # fp32 [slots, B * Hq, BQ, DV]: outputs of splits, sinks left out
    lses_ptr,  # fp32 [slots, B * Hq, BQ], base 2
    sinks_ptr,  # fp32 [Hq]; from here to reach: None where the feature is off
    cap,
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

    c = in_unit(scale, LOG2E)
    cap = in_unit(cap, LOG2E)
    slope = slope_of(slopes_ptr, slopes_b, batch, head, LOG2E)
    position = position_of(first, q_offset)
    dropout = dropout_keys(seed_ptr, index, first, BM)
    bias = None
    if bias_ptr is not None:
        start = bias_of(bias_ptr, batch, head, bias_b, bias_h)
        bias = Bias(start, bias_n, bias_m, reach, q_offset, N, M, in_unit(1.0, LOG2E))
    score = Score(c, cap, slope, position, dropout, threshold, bias)
    keep = first + tl.arange(0, BM) < N
    q = load_rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), first, q_n, keep, UNIT, BM, D, DP)
    k_rows = Rows(matrix(k_ptr, batch, head // group, k_b, k_h, UNIT), k_n, k_tiles, batch, head // group)
    v_rows = Rows(matrix(v_ptr, batch, head // group, v_b, v_h, UNIT), v_n, v_tiles, batch, head // group)
    softmax = nothing_seen(BM, DVP)

    span = ranges_of(lists, own, line)
    blocks = blocks_of(lists, span, None, None, False)
    softmax = _walk(
        *(softmax, q, k_rows, v_rows, blocks, bits, query, first, score, False),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )
    blocks = blocks_of(lists, span, None, None, True)
    # Through pointers: values of keys that are not there, or that no query sees, may be NaN and are not read.
    k_rows = Rows(k_rows.ptr, k_n, None, batch, head // group)
    v_rows = Rows(v_rows.ptr, v_n, None, batch, head // group)
    softmax = _walk(
        *(softmax, q, k_rows, v_rows, blocks, bits, query, first, score, True),
        Sizes(FRAGMENTS, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
    )

    acc, peak, total = softmax.acc, softmax.peak, softmax.total
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    row = index.to(tl.int64) * N
    out = out_ptr + row * DV
    value = acc / total[:, None]
    if lists.work_items is not None:  # noqa: SIM102 - Triton evaluates both sides of `and`
        if slot >= 0:
            if seed_ptr is not None:
                value *= keep_scale(threshold)
            at = (slot.to(tl.int64) * heads + index) * BQ
            store_rows(parts_ptr + at * DV, query, DV, keep, value, 1, BM, DV, DVP)
            lse = tl.where(dead, float("-inf"), peak + tl.log2(total))
            tl.store(lses_ptr + at + query + tl.arange(0, BM), lse, mask=keep)
            return
    if sinks_ptr is not None:
        lse = tl.where(dead, 0.0, peak + tl.log2(total))
        value *= sink_share(lse, tl.load(sinks_ptr + head) * LOG2E)[:, None]
    if seed_ptr is not None:
        value *= keep_scale(threshold)
    store_rows(out, first, DV, keep, value, 1, BM, DV, DVP)
    lse = tl.where(dead, float("-inf"), (peak + tl.log2(total)) * LN2)
    tl.store(lse_ptr + row + first + tl.arange(0, BM), lse, mask=keep)


def forward(
    q: torch.Tensor,  # [B, Hq, N, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    rows: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: layout.Score,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [B, Hq, N, DV] in q's dtype, lse [B, Hq, N] in fp32, natural log, of the keys alone), both contiguous.

    A query that sees nothing gets out 0 and lse -inf.
    """
    if candidates.forward is not None:
        given = candidates.forward(q, k, v, rows, tiles, pattern_of, block, score, sinks)
        if given is not None:
            return given
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
        *(q.device, max(D, DV), q.dtype),
        featured=score.featured,
        split=rows.slots > 0,
        block=block,
        tma=tileable(k, v),
        biased=score.bias is not None,
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
        forward_kernel[programs(rows.items, BQ // at.BM, B * Hq)](
            *(q, k, v, out, lse),
            *(list_pointers(rows), Bits(bits, tiles.seen_keys), pattern_of),
            *in_tiles(at.tma, at.BN, k, v),
            *(*strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), pattern_b, pattern_h),
            *(score.scale, N, M, Hq, Hq // Hkv, n_rows, B * Hq),
            together,
            *(None if parts is None else rows.items, parts, lses, sinks),
            **feature_arguments(score, q.device),
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
