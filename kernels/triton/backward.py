"""Block-sparse attention, backward: two passes over the tables, no atomics, bitwise deterministic.

With c = scale * log2(e) and norm = log2(e) lse, P = exp2(c s - norm) is recomputed (in fp32 with base e, which rounds
less for one more product), and dS = P (dP - delta) with delta = rowsum(dout * out) - dlse. A first small kernel writes
norm and delta, padded to whole blocks so that the loops read them unmasked; a query that sees nothing gets norm = +inf
and delta = 0, hence P = 0 and dS = 0, never NaN. Where lse is NaN, norm is the least number, hence P = inf for keys
that the query sees and 0 for others. A cap multiplies dS by its derivative; a bias changes nothing more. Dropout's bits
Z are drawn again: dV takes P Z and dS takes dP Z, both scaled. Sinks were folded into dout before.

The passes are in `backward_keys` and `backward_queries`; the preparation and the launches are here.
Shapes as in `common`; NP = N rounded up to whole blocks.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from sparseflash.kernels import candidates
from sparseflash.kernels.launch import configuration
from sparseflash.kernels.layout import BlockLists, Score, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.backward_keys import keys_kernel
from sparseflash.kernels.triton.backward_queries import queries_kernel
from sparseflash.kernels.triton.common import (
    LOG2E,
    device_of,
    heads_together,
    in_tiles,
    list_pointers,
    load_rows,
    matrix,
    padded,
    programs,
    readable,
    stride_unit,
    strides_in,
    tileable,
)
from sparseflash.kernels.triton.merge import add_partials, partial_results, pattern_strides
from sparseflash.kernels.triton.score import feature_arguments
from sparseflash.kernels.triton.tiles import ordered
from sparseflash.kernels.triton.types import Bits

LEAST = tl.constexpr(torch.finfo(torch.float32).min)


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
    norm = tl.where(norm == norm, norm, LEAST)
    tl.store(norm_ptr + at, tl.where(dead, float("inf"), norm))
    tl.store(delta_ptr + at, tl.where(dead, 0.0, delta))


def prepared(
    dout: torch.Tensor,  # as `readable` gives it
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    unit: int,  # of dout's strides
    BQ: int,
    n_rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and delta, fp32 [B, Hq, NP] each."""
    B, Hq, N, DV = out.shape
    NP, step = n_rows * BQ, min(BQ, 64)
    norm, delta = torch.empty((2, B, Hq, NP), dtype=torch.float32, device=out.device)
    if NP:
        prepare_kernel[programs(NP // step, 1, B * Hq)](
            *(out.contiguous(), dout, lse.contiguous(), None if dlse is None else dlse.contiguous(), norm, delta),
            *strides_in(unit, dout),
            *(N, NP, Hq),
            *(unit, DV, padded(DV), step),
            num_warps=4,
        )
    return norm, delta


def backward(
    dout: torch.Tensor,  # [B, Hq, N, DV]
    dlse: torch.Tensor | None,  # [B, Hq, N], the cotangent of the natural-log lse
    q: torch.Tensor,  # [B, Hq, N, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, DV]
    out: torch.Tensor,  # [B, Hq, N, DV]
    lse: torch.Tensor,  # [B, Hq, N]
    rows: BlockLists,
    columns: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: Score,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv) of `forward.forward` without sinks, contiguous, in the dtypes of q, k and v.

    Bitwise equal in every run; ``deterministic`` matters to candidates alone.
    """
    if candidates.backward is not None:
        given = candidates.backward(
            *(dout, dlse, q, k, v, out, lse, rows, columns, tiles, pattern_of, block, score, deterministic)
        )
        if given is not None:
            return given
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    if dq.numel() + dk.numel() == 0:
        return dq, dk, dv
    q, score, share = with_normal_scale(q, score)
    q, k, v, dout = readable(q), readable(k), readable(v), readable(dout)
    split = rows.slots + columns.slots > 0
    featured, biased = score.featured, score.bias is not None
    chosen = partial(
        configuration, q.device, max(D, DV), q.dtype, featured=featured, split=split, block=block, biased=biased
    )
    unit = stride_unit(q, k, v, dout)
    n_rows, n_columns = rows.order.shape[1], columns.order.shape[1]
    pattern_b, pattern_h = pattern_strides(pattern_of)
    strides = *strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), *strides_in(unit, dout)
    features = feature_arguments(score, q.device)
    bits, in_fragments = ordered(tiles.bits, BK, q.dtype)
    widths = {"UNIT": unit, "D": D, "DP": padded(D), "DV": DV, "DVP": padded(DV), "BQ": BQ, "BK": BK}

    with device_of(q):
        norm, delta = prepared(dout, dlse, out, lse, unit, BQ, n_rows)
        NP = norm.shape[-1]
        at = chosen(tma=tileable(q, dout)).keys.within(block)
        width = (D + DV) * q.element_size()
        dk_parts, dv_parts = (partial_results(columns, B * Hkv, BK, d) for d in (D, DV))
        keys_kernel[programs(columns.items, BK // at.BN, B * Hkv)](
            *(q, k, v, dout, norm, delta, dk, dv),
            *(list_pointers(columns), Bits(tiles.bits, None), pattern_of),
            *in_tiles(at.tma, at.BM, q, dout),
            *(*strides, pattern_b, pattern_h),
            *(score.scale, N, NP, M, Hkv, Hq // Hkv, n_columns, B * Hkv),
            heads_together(N * width * (Hq // Hkv), B * Hkv),
            *(None if dk_parts is None else columns.items, dk_parts, dv_parts),
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
        at = chosen(tma=tileable(k, v)).queries.within(block)
        dq_parts = partial_results(rows, B * Hq, BQ, D)
        queries_kernel[programs(rows.items, BQ // at.BM, B * Hq)](
            *(q, k, v, dout, norm, delta, dq),
            *(list_pointers(rows), Bits(bits, tiles.seen_keys), pattern_of),
            *in_tiles(at.tma, at.BN, k, v),
            *(*strides, pattern_b, pattern_h),
            *(score.scale, N, NP, Hq, Hq // Hkv, n_rows, B * Hq),
            heads_together(M * width * Hkv // Hq, B * Hq),
            *(None if dq_parts is None else rows.items, dq_parts),
            **features,
            bias_keys=M if biased else None,
            FRAGMENTS=in_fragments,
            **widths,
            BM=at.BM,
            BN=at.BN,
            num_warps=at.warps,
            num_stages=at.stages,
        )
        if dq_parts is not None:
            add_partials(dq_parts, dq, rows, pattern_of, 1)
        if share != 1:
            dq *= share
    return dq, dk, dv
