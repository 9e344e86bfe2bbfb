"""dK, dV and dQ in one pass: a program owns a step of keys, and adds what these give to dQ.

Five products for each step instead of the seven of two passes. dQ is summed in fp32 in whatever order programs come, so
a rerun gives other bits: calls that ask for a deterministic gradient take two passes, as do those with features and
those through split lines. Otherwise as `triton.backward_keys`.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from sparseflash.kernels.launch import Key, Launch, table_key
from sparseflash.kernels.layout import BlockLists, Score, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.backward import prepared
from sparseflash.kernels.triton.common import (
    LOG2E,
    device_of,
    exponential,
    grid_of,
    heads_together,
    in_tiles,
    list_pointers,
    load_rows,
    matrix,
    padded,
    place,
    programs,
    readable,
    spread_t,
    store_rows,
    stride_unit,
    strides_in,
    tileable,
)
from sparseflash.kernels.triton.merge import pattern_strides
from sparseflash.kernels.triton.types import Bits, Keys, Rows, Saved, Sizes
from sparseflash.kernels.triton.walk import block_of, blocks_of, first_query_bits, load_step, next_query_bits


@triton.jit
def _add_rows(ptr, first, keep, value, ROWS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Add `value` [ROWS, DP] to contiguous rows, where `keep` [ROWS] is true (None: all), columns below D."""
    pointers = grid_of(ptr, first, D, 1, ROWS, DP)
    if keep is None:
        if D == DP:
            tl.atomic_add(pointers, value, sem="relaxed")
        else:
            tl.atomic_add(pointers, value, mask=(tl.arange(0, DP) < D)[None, :], sem="relaxed")
    else:
        if D == DP:
            tl.atomic_add(pointers, value, mask=keep[:, None], sem="relaxed")
        else:
            tl.atomic_add(pointers, value, mask=keep[:, None] & (tl.arange(0, DP) < D)[None, :], sem="relaxed")


@triton.jit
def _walk(keys, finite, q_rows, dout_rows, dq_rows, saved, blocks, bits, key, c, PARTIAL: tl.constexpr, sizes):
    """As in `triton.backward_keys`; the product with `finite`, the keys without infinities, is added to `dq_rows`."""
    BM: tl.constexpr = sizes.BM
    BN: tl.constexpr = sizes.BN
    STEPS: tl.constexpr = sizes.BQ // BM
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
        s = tl.dot(keys.k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(keys.v, tl.trans(dout), input_precision="ieee")
        if PARTIAL:
            s = tl.where(spread_t(words, key, BM, BN), s, float("-inf"))
        p = exponential(s * c - norm[None, :], q.dtype == tl.float32)
        dv = tl.dot(p.to(dout.dtype), dout, keys.dv, input_precision="ieee")
        delta = tl.load(saved.delta + rows)  # late: it is not needed, nor in registers, before
        ds = p * (dp - delta[None, :])
        if PARTIAL:
            ds = tl.where(p == 0.0, 0.0, ds)  # dp of an invisible pair may be anything
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, keys.dk, input_precision="ieee")
        keys = Keys(keys.k, keys.v, dk, dv, keys.first)
        dq = tl.dot(tl.trans(ds), finite, input_precision="ieee")
        if dq_rows.descriptor is not None:  # rows that are not there are left out
            dq_rows.descriptor.atomic_add([dq_rows.batch, dq_rows.head, first, 0], dq.reshape(1, 1, BM, sizes.DP))
        else:
            _add_rows(dq_rows.ptr, first, keep, dq, BM, sizes.D, sizes.DP)
    return keys


@triton.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "k_b", "k_h", "k_n", "v_b", "v_h", "v_n", "dout_b", "dout_h", "dout_n"),
        *("pattern_b", "pattern_h", "scale", "N", "NP", "M", "Hkv", "group", "lines", "heads", "together"),
    ]
)
def one_pass_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    norm_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    dq_ptr,  # fp32 [B, Hq, N, D], zeros
    lists,  # `ListPointers` of the columns
    bits,  # `Bits`
    pattern_ptr,
    q_tiles,  # descriptors of all of q, dout and dQ, of tiles [1, 1, BM, D]; None where rows come through pointers
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
    rank, index = place(lines * STEPS, heads, together)
    batch = index // Hkv
    key_head = index % Hkv
    pattern_ptr += batch * pattern_b
    p = tl.load(pattern_ptr + key_head * group * pattern_h).to(tl.int64)
    line = tl.load(lists.order + p * lines + rank // STEPS)
    key = (rank % STEPS) * BN
    first = line * BK + key
    c = tl.cast(scale, tl.float32)
    if q_ptr.dtype.element_ty != tl.float32:
        c *= LOG2E
    keep = first + tl.arange(0, BN) < M
    k = load_rows(matrix(k_ptr, batch, key_head, k_b, k_h, UNIT), first, k_n, keep, UNIT, BN, D, DP)
    v = load_rows(matrix(v_ptr, batch, key_head, v_b, v_h, UNIT), first, v_n, keep, UNIT, BN, DV, DVP)
    # A key that no query sees has dS = 0, but may be anything; queries that see an infinite one have NaN in dS.
    finite = tl.where(tl.abs(k) < float("inf"), k, 0.0)
    keys = Keys(k, v, tl.zeros((BN, DP), tl.float32), tl.zeros((BN, DVP), tl.float32), first)
    for member in range(0, group):
        head = key_head * group + member
        row = (batch * (Hkv * group) + head).to(tl.int64)
        q_rows = Rows(matrix(q_ptr, batch, head, q_b, q_h, UNIT), q_n, q_tiles, batch, head)
        dout_rows = Rows(matrix(dout_ptr, batch, head, dout_b, dout_h, UNIT), dout_n, dout_tiles, batch, head)
        dq_rows = Rows(dq_ptr + row * N * D, D, dq_tiles, batch, head)
        saved = Saved(norm_ptr + row * NP, delta_ptr + row * NP, N)
        p = tl.load(pattern_ptr + head * pattern_h).to(tl.int64)
        span = lists.ranges + (p * lines + line) * 4
        blocks = blocks_of(lists, span, None, None, False)
        keys = _walk(
            *(keys, finite, q_rows, dout_rows, dq_rows, saved, blocks, bits, key, c, False),
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
        blocks = blocks_of(lists, span, None, None, True)
        keys = _walk(
            *(keys, finite, q_rows, dout_rows, dq_rows, saved, blocks, bits, key, c, True),
            Sizes(False, UNIT, D, DP, DV, DVP, BQ, BK, BM, BN),
        )
    row = index.to(tl.int64) * M
    store_rows(dk_ptr + row * D, first, D, keep, keys.dk * tl.cast(scale, tl.float32), 1, BN, D, DP)
    store_rows(dv_ptr + row * DV, first, DV, keep, keys.dv, 1, BN, DV, DVP)


def attempt(
    launches: Mapping[Key, Launch],
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: BlockLists,
    columns: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    score: Score,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """What `triton.backward.backward` returns for these arguments; None for a call that this kernel does not serve."""
    at = launches.get(table_key(q.device, max(q.shape[-1], v.shape[-1]), q.dtype))
    if at is None or score.featured or rows.slots + columns.slots or deterministic or not q.numel() + k.numel():
        return None
    q, score, share = with_normal_scale(q, score)
    q, k, v, dout = readable(q), readable(k), readable(v), readable(dout)
    if torch.are_deterministic_algorithms_enabled() or (at.tma and not tileable(q, dout)):
        return None
    at = at.within(block)
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    BQ, BK = block
    n_columns = columns.order.shape[1]
    unit = stride_unit(q, k, v, dout)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    with device_of(q):
        norm, delta = prepared(dout, dlse, out, lse, unit, BQ, rows.order.shape[1])
        sums = torch.zeros((B, Hq, N, D), dtype=torch.float32, device=q.device)
        one_pass_kernel[programs(n_columns, BK // at.BN, B * Hkv)](
            *(q, k, v, dout, norm, delta, dk, dv, sums),
            *(list_pointers(columns), Bits(tiles.bits, None), pattern_of),
            *(*in_tiles(at.tma, at.BM, q, dout), *in_tiles(at.tma, at.BM, sums)),
            *(*strides_in(unit, q), *strides_in(unit, k), *strides_in(unit, v), *strides_in(unit, dout)),
            *pattern_strides(pattern_of),
            *(score.scale, N, norm.shape[-1], M, Hkv, Hq // Hkv, n_columns, B * Hkv),
            heads_together(N * (D + DV) * q.element_size() * (Hq // Hkv), B * Hkv),
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
    torch.mul(sums, score.scale * share, out=dq)
    return dq, dk, dv
