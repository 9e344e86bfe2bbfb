"""The forward pass for sm_90 in Gluon, the language below Triton: one step's scores are made beside another's softmax.

The schedule is written here instead of left to a compiler. While exponentials of a step are taken, the products of the
next are under way; keys and values come through rings of shared memory, which the tensor memory accelerator fills and
which run on from a line's FULL to its PARTIAL entries. Otherwise it is triton_forward, for calls without features
through whole lines: the same tables and formulas, shapes as in triton_common. Scores are in base 2.

No interpreter runs Gluon. The tests run this source with stand-ins for its operations that keep the hazards of the
hardware (tests/kernels/gluon_emulator.py), and compile it ahead of time. No GPU has run it yet, and no committed launch
takes it.
"""

# @gluon.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseflash.kernels.launch import Launch
from sparseflash.kernels.layout import Side, Tiles
from sparseflash.kernels.triton_common import LN2, LOG2E, entries, place, programs, sink_share, stride_unit, strides_in
from sparseflash.kernels.triton_merge import pattern_strides

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the latter up to Triton 3.6


@gluon.jit
def _block(full_ptr, partial_ptr, full, partial, step, SPLIT: gl.constexpr):
    """The key block of a step: of the FULL entries, then of the PARTIAL ones; 0 past the last."""
    entry = step // SPLIT
    one = gl.load(full_ptr + entry, mask=entry < full, other=0)
    two = gl.load(partial_ptr + (entry - full), mask=(entry >= full) & (entry < full + partial), other=0)
    return one + two


@gluon.jit
def _fetch(tiles, ring, bars, batch, head, key, step, steps, STAGES: gl.constexpr):
    """Start to fill the place of a step in a ring with rows from `key` on; nothing past the last step."""
    there = step < steps
    bar = bars.index(step % STAGES)
    mbarrier.expect(bar, tiles.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(tiles, [batch, head, key, 0], bar, ring.index(step % STAGES), pred=there)


@gluon.jit
def _scores(q, k_ring, k_bars, step, zero, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr):
    """Products of queries and the keys of a step, under way."""
    slot = step % STAGES
    mbarrier.wait(k_bars.index(slot), step // STAGES & 1)
    k = k_ring.index(slot).reshape([BN, D]).permute((1, 0))
    return warpgroup_mma(q, k, zero, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, peak, total, c, PARTIAL: gl.constexpr):
    """(probabilities, what becomes of those before, peak, total) with one step of scores more."""
    top = gl.maximum(peak, gl.max(s, 1) * c)
    base = top
    if PARTIAL:
        base = gl.where(top == float("-inf"), 0.0, top)  # a row that saw nothing yet: -inf - -inf is NaN
    p = gl.exp2(s * c - base[:, None])
    fade = gl.exp2(peak - base)
    return p, fade, top, total * fade + gl.sum(p, 1)


@gluon.jit
def _weighed(
    p,
    fade,
    acc,
    v_ring,
    v_bars,
    step,
    a_layout: gl.constexpr,
    BN: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The sum of values with a step more, under way."""
    slot = step % STAGES
    o_layout: gl.constexpr = a_layout.parent
    v = v_ring.index(slot).reshape([BN, DV])
    p = gl.convert_layout(p.to(v.dtype), a_layout)
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, o_layout))[:, None]
    mbarrier.wait(v_bars.index(slot), step // STAGES & 1)
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _visible(
    bits_ptr,
    tile,
    query,
    key,
    s_layout: gl.constexpr,
    BQ: gl.constexpr,
    BK: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
):
    """Visible or not, [BM, BN], of the part of a tile (in fragment order) that starts at (query, key)."""
    A_ROW: gl.constexpr = (BK + 127) // 128 * 4
    columns = key % 128 + gl.arange(0, BN, gl.SliceLayout(0, s_layout))  # within the 128 that four words hold
    rows = query + gl.arange(0, BM, gl.SliceLayout(1, s_layout))
    # Column 8 j + 2 t + i is bit 2 j + i of word t: a thread's columns have one t, so it reads one word a row.
    at = (tile.to(gl.int64) * BQ + rows)[:, None] * A_ROW + (key // 128 * 4 + columns % 8 // 2)[None, :]
    return ((gl.load(bits_ptr + at) >> (columns // 8 * 2 + columns % 2)[None, :]) & 1) != 0


@gluon.jit
def _clean(
    v_ring,
    v_bars,
    step,
    seen_ptr,
    tile,
    key,
    rows_layout: gl.constexpr,
    BK: gl.constexpr,
    BN: gl.constexpr,
    DV: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Zeros for values of keys that no query of the block sees, which may be anything: 0 times NaN is NaN."""
    W: gl.constexpr = (BK + 31) // 32
    keys = key + gl.arange(0, BN, gl.SliceLayout(1, rows_layout))
    seen = (gl.load(seen_ptr + tile.to(gl.int64) * W + keys // 32) >> (keys % 32)) & 1
    if gl.min(seen, 0) == 0:
        slot = step % STAGES
        mbarrier.wait(v_bars.index(slot), step // STAGES & 1)
        v = v_ring.index(slot).reshape([BN, DV])
        v.store(gl.where((seen != 0)[:, None], v.load(rows_layout), 0.0).to(v.dtype))
        fence_async_shared()
        barrier()


@gluon.jit(
    do_not_specialize=[
        *("q_b", "q_h", "q_n", "pattern_b", "pattern_h", "scale", "N", "Hq", "group", "lines", "heads", "together"),
        "sinks_ptr",
    ]
)
def gluon_kernel(
    q_ptr,
    out_ptr,
    lse_ptr,
    spans_ptr,
    full_ptr,
    partial_ptr,
    tile_ptr,
    order_ptr,
    bits_ptr,
    seen_ptr,
    pattern_ptr,
    k_tiles,  # descriptors of all of k and v, of tiles [1, 1, BN, D]
    v_tiles,
    q_b,
    q_h,
    q_n,
    pattern_b,
    pattern_h,
    scale,
    N,
    Hq,
    group,  # query heads per key head
    lines,  # block rows
    heads,  # B * Hq
    together,
    sinks_ptr,  # fp32 [Hq], or None
    UNIT: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
    BQ: gl.constexpr,
    BK: gl.constexpr,
    BM: gl.constexpr,  # 16 rows a warp
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):
    SPLIT: gl.constexpr = BK // BN
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    # Rows in registers on their way to or from memory: a thread has 8 elements, neighbours in a row lie side by side.
    q_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = q_ptr.dtype.element_ty

    rank, index = place(lines * (BQ // BM), heads, together)
    batch = index // Hq
    head = index % Hq
    p_index = gl.load(pattern_ptr + batch * pattern_b + head * pattern_h).to(gl.int64)
    line = gl.load(order_ptr + p_index * lines + rank // (BQ // BM))
    query = rank % (BQ // BM) * BM
    first = line * BQ + query
    span = spans_ptr + (p_index * lines + line) * 4
    full_start, full = entries(span, None, None, False)
    partial_start, partial = entries(span, None, None, True)
    full_ptr += full_start
    partial_ptr += partial_start
    tile_ptr += partial_start
    plain = full * SPLIT
    steps = plain + partial * SPLIT
    kv_head = head // group
    c = scale.to(gl.float32) * LOG2E

    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_tiles.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV], v_tiles.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(slot), 1)
        mbarrier.init(v_bars.index(slot), 1)
    fence_async_shared()
    barrier()
    for step in gl.static_range(STAGES):
        key = _block(full_ptr, partial_ptr, full, partial, step, SPLIT) * BK + step % SPLIT * BN
        _fetch(k_tiles, k_ring, k_bars, batch, kv_head, key, step, steps, STAGES)
        _fetch(v_tiles, v_ring, v_bars, batch, kv_head, key, step, steps, STAGES)

    # Queries come while the first keys and values are on their way.
    rows = first + gl.arange(0, BM, gl.SliceLayout(1, q_layout))
    at = q_ptr + (batch.to(gl.int64) * q_b + head.to(gl.int64) * q_h) * UNIT
    at = at + (rows.to(gl.int64) * q_n * UNIT)[:, None] + gl.arange(0, D, gl.SliceLayout(0, q_layout))[None, :]
    queries = gl.load(at, mask=(rows < N)[:, None], other=0.0)
    q = gl.allocate_shared_memory(dtype, [BM, D], gl.NVMMASharedLayout.get_default_for([BM, D], dtype), queries)
    fence_async_shared()
    barrier()

    acc = gl.zeros([BM, DV], gl.float32, o_layout)
    peak = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, s_layout))
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    if steps > 0:
        s = warpgroup_mma_wait(0, [_scores(q, k_ring, k_bars, 0, zero, BN, D, STAGES)])
        barrier()
        # From here on keys are one step ahead of values.
        v_key = _block(full_ptr, partial_ptr, full, partial, STAGES, SPLIT) * BK + STAGES % SPLIT * BN
        _fetch(k_tiles, k_ring, k_bars, batch, kv_head, v_key, STAGES, steps, STAGES)
        for i in range(0, gl.minimum(plain, steps - 1)):
            ahead = i + 1 + STAGES
            k_key = _block(full_ptr, partial_ptr, full, partial, ahead, SPLIT) * BK + ahead % SPLIT * BN
            coming = _scores(q, k_ring, k_bars, i + 1, zero, BN, D, STAGES)
            p, fade, peak, total = _softmax(s, peak, total, c, False)
            grown = _weighed(p, fade, acc, v_ring, v_bars, i, a_layout, BN, DV, STAGES)
            s = warpgroup_mma_wait(1, [coming])
            acc = warpgroup_mma_wait(0, [grown])
            barrier()
            _fetch(k_tiles, k_ring, k_bars, batch, kv_head, k_key, ahead, steps, STAGES)
            _fetch(v_tiles, v_ring, v_bars, batch, kv_head, v_key, i + STAGES, steps, STAGES)
            v_key = k_key
        for i in range(plain, steps - 1):
            key = (i - plain) % SPLIT * BN
            tile = gl.load(tile_ptr + (i - plain) // SPLIT)
            _clean(v_ring, v_bars, i, seen_ptr, tile, key, v_layout, BK, BN, DV, STAGES)
            ahead = i + 1 + STAGES
            k_key = _block(full_ptr, partial_ptr, full, partial, ahead, SPLIT) * BK + ahead % SPLIT * BN
            visible = _visible(bits_ptr, tile, query, key, s_layout, BQ, BK, BM, BN)
            coming = _scores(q, k_ring, k_bars, i + 1, zero, BN, D, STAGES)
            s = gl.where(visible, s, float("-inf"))
            p, fade, peak, total = _softmax(s, peak, total, c, True)
            grown = _weighed(p, fade, acc, v_ring, v_bars, i, a_layout, BN, DV, STAGES)
            s = warpgroup_mma_wait(1, [coming])
            acc = warpgroup_mma_wait(0, [grown])
            barrier()
            _fetch(k_tiles, k_ring, k_bars, batch, kv_head, k_key, ahead, steps, STAGES)
            _fetch(v_tiles, v_ring, v_bars, batch, kv_head, v_key, i + STAGES, steps, STAGES)
            v_key = k_key
        if partial > 0:
            key = (steps - 1 - plain) % SPLIT * BN
            tile = gl.load(tile_ptr + (partial - 1))
            _clean(v_ring, v_bars, steps - 1, seen_ptr, tile, key, v_layout, BK, BN, DV, STAGES)
            s = gl.where(_visible(bits_ptr, tile, query, key, s_layout, BQ, BK, BM, BN), s, float("-inf"))
        p, fade, peak, total = _softmax(s, peak, total, c, True)
        acc = warpgroup_mma_wait(0, [_weighed(p, fade, acc, v_ring, v_bars, steps - 1, a_layout, BN, DV, STAGES)])

    dead = total == 0.0
    total = gl.where(dead, 1.0, total)
    lse = gl.where(dead, 0.0, peak + gl.log2(total))
    share = 1.0 / total
    if sinks_ptr is not None:
        share *= sink_share(lse, gl.load(sinks_ptr + head) * LOG2E)
    value = acc * gl.convert_layout(share, gl.SliceLayout(1, o_layout))[:, None]
    rows = first + gl.arange(0, BM, gl.SliceLayout(1, o_layout))
    at = (
        out_ptr
        + ((index.to(gl.int64) * N + rows) * DV)[:, None]
        + gl.arange(0, DV, gl.SliceLayout(0, o_layout))[None, :]
    )
    gl.store(at, value.to(dtype), mask=(rows < N)[:, None])
    rows = first + gl.arange(0, BM, gl.SliceLayout(1, s_layout))
    lse = gl.where(dead, float("-inf"), lse * LN2)
    gl.store(lse_ptr + index.to(gl.int64) * N + rows, lse, mask=rows < N)


def forward(
    q: torch.Tensor,  # [B, Hq, N, D], half precision, D and DV powers of two
    k: torch.Tensor,  # [B, Hkv, M, D]; it and v as descriptors can read them
    v: torch.Tensor,  # [B, Hkv, M, DV]
    out: torch.Tensor,  # [B, Hq, N, DV], written
    lse: torch.Tensor,  # [B, Hq, N], written
    rows: Side,  # no line of which is cut
    bits: torch.Tensor,  # the tiles in fragment order
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    scale: float,
    sinks: torch.Tensor | None,  # fp32 [Hq]
    together: int,  # heads to work on at a time
    at: Launch,  # whose steps divide the block, with 16 queries a warp
) -> None:
    """Write out and lse as `triton_forward.forward` returns them."""
    B, Hq, N, D = q.shape
    (BQ, BK), n_rows = block, rows.order.shape[1]
    unit = stride_unit(q)
    gluon_kernel[programs(n_rows, BQ // at.BM, B * Hq)](
        *(q, out, lse, rows.spans, rows.full, rows.partial, rows.tile, rows.order, bits, tiles.seen_keys, pattern_of),
        *in_rings(at.BN, k, v),
        *(*strides_in(unit, q), *pattern_strides(pattern_of)),
        *(scale, N, Hq, Hq // k.shape[1], n_rows, B * Hq, together, sinks),
        UNIT=unit,
        D=D,
        DV=v.shape[-1],
        BQ=BQ,
        BK=BK,
        BM=at.BM,
        BN=at.BN,
        STAGES=at.stages,
        WARPS=at.warps,
        num_warps=at.warps,
    )


def in_rings(rows: int, *tensors: torch.Tensor) -> tuple[TensorDescriptor, ...]:
    """Descriptors of [B, H, N, D] in half precision, for copies of so many rows of one head into a ring."""
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
    return tuple(
        TensorDescriptor(
            *(x, list(x.shape), list(x.stride()), box := [1, 1, rows, x.shape[-1]]),
            gl.NVMMASharedLayout.get_default_for(box, dtype[x.dtype]),
        )
        for x in tensors
    )
