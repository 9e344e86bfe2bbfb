"""The forward pass for sm_90 in Gluon, the language below Triton: one step's scores are made beside another's softmax.

The schedule is written here instead of left to a compiler. While exponentials of a step are taken, the products of the
next are under way; keys and values come through rings of shared memory, which the tensor memory accelerator fills and
which run on from a line's FULL to its PARTIAL entries. Otherwise it is `triton.forward`, for calls without features
through whole lines: the same tables and formulas, shapes as in `triton.common`. Scores are in base 2.

With `GluonLaunch.persistent`, as many programs as the GPU holds take all lines in turn: the rings run on from line to
line, and a line's first rows come while the results of the line before are written. Short lines are mostly beginnings.

No interpreter runs Gluon. The tests run this source with stand-ins for its operations that keep the hazards of the
hardware (tests/kernels/gluon_emulator.py), and compile it ahead of time. No GPU has run it yet.
"""

# @gluon.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

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

from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.launch import Key, table_key
from sparseflash.kernels.layout import BlockLists, Score, Tiles
from sparseflash.kernels.magnitude import with_normal_scale
from sparseflash.kernels.triton.common import (
    LN2,
    LOG2E,
    device_of,
    entries,
    heads_together,
    list_pointers,
    placed,
    programs,
    readable,
    sink_share,
    tileable,
)
from sparseflash.kernels.triton.merge import pattern_strides
from sparseflash.kernels.triton.tiles import ordered
from sparseflash.kernels.triton.types import Bits, Softmax

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # the latter up to Triton 3.6


class Line(NamedTuple):
    """A step of a block row of one head: what one program, or one turn of it, computes."""

    index: Any  # of the head among those of all samples
    part: Any  # of the steps of the row
    line: Any
    full_start: Any
    full: Any  # number of FULL entries
    partial_start: Any
    partial: Any


class Ring(NamedTuple):
    """Places in shared memory that a descriptor fills in turn, each with its barrier."""

    tiles: Any
    places: Any
    bars: Any


class Rings(NamedTuple):
    """Those of one program."""

    q: Any
    k: Any
    v: Any


class Sizes(NamedTuple):
    """Compile-time constants, see `gluon_kernel`. Made in the call that takes it, as `triton.types` says."""

    D: Any
    DV: Any
    BQ: Any
    BK: Any
    BM: Any
    BN: Any
    STAGES: Any
    QUERIES: Any
    WARPS: Any


@gluon.jit
def _line(item, count, lists, pattern_ptr, pattern_b, pattern_h, lines, heads, together, Hq, STEPS: gl.constexpr):
    """The `Line` of a work item; without entries past the last item."""
    there = item < count
    rank, index = placed(gl.minimum(item, count - 1), lines * STEPS, heads, together)
    p = gl.load(pattern_ptr + index // Hq * pattern_b + index % Hq * pattern_h).to(gl.int64)
    line = gl.load(lists.order + p * lines + rank // STEPS)
    span = lists.ranges + (p * lines + line) * 4
    full_start, full = entries(span, None, None, False)
    partial_start, partial = entries(span, None, None, True)
    full, partial = gl.where(there, full, 0), gl.where(there, partial, 0)
    return Line(index, rank % STEPS, line, full_start, full, partial_start, partial)


@gluon.jit
def _first_key(lists, line, step, BK: gl.constexpr, BN: gl.constexpr):
    """The first key of a step of a line: of its FULL entries, then of its PARTIAL ones; of block 0 past them."""
    STEPS: gl.constexpr = BK // BN
    entry = step // STEPS
    one = gl.load(lists.full_indices + (line.full_start + entry), mask=entry < line.full, other=0)
    entry -= line.full
    there = (entry >= 0) & (entry < line.partial)
    other = gl.load(lists.partial_indices + (line.partial_start + entry), mask=there, other=0)
    return (one + other) * BK + step % STEPS * BN


@gluon.jit
def _fetch(ring, batch, head, row, use, there, PLACES: gl.constexpr):
    """Start to fill a place of a ring, for its use of this number, with rows of one head."""
    bar = ring.bars.index(use % PLACES)
    mbarrier.expect(bar, ring.tiles.block_type.nbytes, pred=there)
    place = ring.places.index(use % PLACES)
    tma.async_copy_global_to_shared(ring.tiles, [batch, head, row, 0], bar, place, pred=there)


@gluon.jit
def _fetched(ring, use, rows: gl.constexpr, width: gl.constexpr, PLACES: gl.constexpr):
    """What was fetched for this use, [rows, width], once it is there."""
    mbarrier.wait(ring.bars.index(use % PLACES), use // PLACES & 1)
    return ring.places.index(use % PLACES).reshape([rows, width])


@gluon.jit
def _scores(q, k, zero):
    """Products of queries and keys, under way."""
    return warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)


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
def _weighed(p, fade, acc, a_layout: gl.constexpr):
    """(probabilities as a product takes them, the sum of values so far as it stands beside them)."""
    fade = gl.convert_layout(fade, gl.SliceLayout(1, a_layout.parent))
    return gl.convert_layout(p, a_layout), acc * fade[:, None]


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
def _clean(v, seen_ptr, tile, key, rows_layout: gl.constexpr, BK: gl.constexpr, BN: gl.constexpr):
    """Zeros for values of keys that no query of the block sees, which may be anything: 0 times NaN is NaN."""
    W: gl.constexpr = (BK + 31) // 32
    keys = key + gl.arange(0, BN, gl.SliceLayout(1, rows_layout))
    seen = (gl.load(seen_ptr + tile.to(gl.int64) * W + keys // 32) >> (keys % 32)) & 1
    if gl.min(seen, 0) == 0:
        v.store(gl.where((seen != 0)[:, None], v.load(rows_layout), 0.0).to(v.dtype))
        fence_async_shared()
        barrier()


@gluon.jit
def _attend(rings, lists, bits, line, batch, kv_head, turn, used, c, sizes):
    """The softmax of BM queries over a line, whose first steps are on their way into the rings.

    `turn` is how many lines the program has done, `used` how often a place of the rings was filled for them, modulo two
    rounds.
    """
    D: gl.constexpr = sizes.D
    DV: gl.constexpr = sizes.DV
    BQ: gl.constexpr = sizes.BQ
    BK: gl.constexpr = sizes.BK
    BM: gl.constexpr = sizes.BM
    BN: gl.constexpr = sizes.BN
    STAGES: gl.constexpr = sizes.STAGES
    WARPS: gl.constexpr = sizes.WARPS
    STEPS: gl.constexpr = BK // BN
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    # Rows in registers on their way to or from memory: a thread has 8 elements, neighbours in a row lie side by side.
    v_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DV, DV // 8], [WARPS, 1], [1, 0])
    dtype: gl.constexpr = rings.v.places.dtype
    zero = gl.zeros([BM, BN], gl.float32, s_layout)
    query = line.part * BM
    plain = line.full * STEPS
    steps = plain + line.partial * STEPS
    acc = gl.zeros([BM, DV], gl.float32, o_layout)
    peak = gl.full([BM], float("-inf"), gl.float32, gl.SliceLayout(1, s_layout))
    total = gl.zeros([BM], gl.float32, gl.SliceLayout(1, s_layout))
    q = _fetched(rings.q, turn, BM, D, sizes.QUERIES)
    if steps > 0:
        s = warpgroup_mma_wait(0, [_scores(q, _fetched(rings.k, used, BN, D, STAGES), zero)])
        barrier()
        # From here on keys are one step ahead of values.
        v_key = _first_key(lists, line, STAGES, BK, BN)
        _fetch(rings.k, batch, kv_head, v_key, used + STAGES, steps > STAGES, STAGES)
        for i in range(0, gl.minimum(plain, steps - 1)):
            ahead = i + 1 + STAGES
            k_key = _first_key(lists, line, ahead, BK, BN)
            coming = _scores(q, _fetched(rings.k, used + i + 1, BN, D, STAGES), zero)
            p, fade, peak, total = _softmax(s, peak, total, c, False)
            p, acc = _weighed(p.to(dtype), fade, acc, a_layout)
            grown = warpgroup_mma(p, _fetched(rings.v, used + i, BN, DV, STAGES), acc, is_async=True)
            s = warpgroup_mma_wait(1, [coming])
            acc = warpgroup_mma_wait(0, [grown])
            barrier()
            _fetch(rings.k, batch, kv_head, k_key, used + ahead, ahead < steps, STAGES)
            _fetch(rings.v, batch, kv_head, v_key, used + ahead - 1, ahead - 1 < steps, STAGES)
            v_key = k_key
        for i in range(plain, steps - 1):
            key = (i - plain) % STEPS * BN
            tile = gl.load(lists.partial_tiles + (line.partial_start + (i - plain) // STEPS))
            v = _fetched(rings.v, used + i, BN, DV, STAGES)
            _clean(v, bits.seen, tile, key, v_layout, BK, BN)
            ahead = i + 1 + STAGES
            k_key = _first_key(lists, line, ahead, BK, BN)
            visible = _visible(bits.words, tile, query, key, s_layout, BQ, BK, BM, BN)
            coming = _scores(q, _fetched(rings.k, used + i + 1, BN, D, STAGES), zero)
            s = gl.where(visible, s, float("-inf"))
            p, fade, peak, total = _softmax(s, peak, total, c, True)
            p, acc = _weighed(p.to(dtype), fade, acc, a_layout)
            grown = warpgroup_mma(p, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, [coming])
            acc = warpgroup_mma_wait(0, [grown])
            barrier()
            _fetch(rings.k, batch, kv_head, k_key, used + ahead, ahead < steps, STAGES)
            _fetch(rings.v, batch, kv_head, v_key, used + ahead - 1, ahead - 1 < steps, STAGES)
            v_key = k_key
        v = _fetched(rings.v, used + steps - 1, BN, DV, STAGES)
        if line.partial > 0:
            key = (steps - 1 - plain) % STEPS * BN
            tile = gl.load(lists.partial_tiles + (line.partial_start + line.partial - 1))
            _clean(v, bits.seen, tile, key, v_layout, BK, BN)
            s = gl.where(_visible(bits.words, tile, query, key, s_layout, BQ, BK, BM, BN), s, float("-inf"))
        p, fade, peak, total = _softmax(s, peak, total, c, True)
        p, acc = _weighed(p.to(dtype), fade, acc, a_layout)
        acc = warpgroup_mma_wait(0, [warpgroup_mma(p, v, acc, is_async=True)])
    return Softmax(acc, peak, total)


@gluon.jit
def _write(softmax, out_ptr, lse_ptr, sinks_ptr, index, head, row, N, sizes):
    """Output and lse of BM queries, the first of which is `row`."""
    DV: gl.constexpr = sizes.DV
    BM: gl.constexpr = sizes.BM
    BN: gl.constexpr = sizes.BN
    WARPS: gl.constexpr = sizes.WARPS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, DV, 16])
    dead = softmax.total == 0.0
    total = gl.where(dead, 1.0, softmax.total)
    lse = gl.where(dead, 0.0, softmax.peak + gl.log2(total))
    share = 1.0 / total
    if sinks_ptr is not None:
        share *= sink_share(lse, gl.load(sinks_ptr + head) * LOG2E)
    value = softmax.acc * gl.convert_layout(share, gl.SliceLayout(1, o_layout))[:, None]
    o_rows = row + gl.arange(0, BM, gl.SliceLayout(1, o_layout))
    at = out_ptr + ((index.to(gl.int64) * N + o_rows) * DV)[:, None]
    at = at + gl.arange(0, DV, gl.SliceLayout(0, o_layout))[None, :]
    gl.store(at, value.to(out_ptr.dtype.element_ty), mask=(o_rows < N)[:, None])
    s_rows = row + gl.arange(0, BM, gl.SliceLayout(1, s_layout))
    lse = gl.where(dead, float("-inf"), lse * LN2)
    gl.store(lse_ptr + (index.to(gl.int64) * N + s_rows), lse, mask=s_rows < N)


@gluon.jit
def _begin(rings, lists, line, batch, head, kv_head, row, turn, used, there, sizes):
    """Fetch the queries of a line and the keys and values of its first steps."""
    STAGES: gl.constexpr = sizes.STAGES
    _fetch(rings.q, batch, head, row, turn, there, sizes.QUERIES)
    for step in gl.static_range(STAGES):
        more = step < (line.full + line.partial) * (sizes.BK // sizes.BN)
        key = _first_key(lists, line, step, sizes.BK, sizes.BN)
        _fetch(rings.k, batch, kv_head, key, used + step, more, STAGES)
        _fetch(rings.v, batch, kv_head, key, used + step, more, STAGES)


@gluon.jit(
    do_not_specialize=[
        *("pattern_b", "pattern_h", "scale", "N", "Hq", "group", "lines", "heads", "together", "sinks_ptr"),
    ]
)
def gluon_kernel(
    out_ptr,
    lse_ptr,
    lists,  # `ListPointers` of the rows
    bits,  # `Bits`
    pattern_ptr,
    q_tiles,  # descriptors of all of q, k and v, of tiles [1, 1, BM or BN, D]
    k_tiles,
    v_tiles,
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
    D: gl.constexpr,
    DV: gl.constexpr,
    BQ: gl.constexpr,
    BK: gl.constexpr,
    BM: gl.constexpr,  # 16 rows a warp
    BN: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,  # places for queries: 2 where a program takes several lines, one after the other
    WARPS: gl.constexpr,
):
    STEPS: gl.constexpr = BQ // BM
    dtype: gl.constexpr = out_ptr.dtype.element_ty

    q_ring = gl.allocate_shared_memory(dtype, [QUERIES, 1, 1, BM, D], q_tiles.layout)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, D], k_tiles.layout)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BN, DV], v_tiles.layout)
    q_bars = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(QUERIES):
        mbarrier.init(q_bars.index(place), 1)
    for place in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(place), 1)
        mbarrier.init(v_bars.index(place), 1)
    fence_async_shared()
    barrier()

    rings = Rings(Ring(q_tiles, q_ring, q_bars), Ring(k_tiles, k_ring, k_bars), Ring(v_tiles, v_ring, v_bars))
    c = scale.to(gl.float32) * LOG2E
    count = lines * STEPS * heads
    item = gl.program_id(0)
    line = _line(item, count, lists, pattern_ptr, pattern_b, pattern_h, lines, heads, together, Hq, STEPS)
    row = line.line * BQ + line.part * BM
    batch, head = line.index // Hq, line.index % Hq
    _begin(
        *(rings, lists, line, batch, head, head // group, row, 0, 0, True),
        Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
    )
    if QUERIES == 1:
        softmax = _attend(
            *(rings, lists, bits, line, batch, head // group, 0, 0, c),
            Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
        )
        _write(
            *(softmax, out_ptr, lse_ptr, sinks_ptr, line.index, head, row, N),
            Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
        )
    else:
        used = 0
        programs = gl.num_programs(0)
        for turn in range(0, (count - 1 - item) // programs + 1):
            softmax = _attend(
                *(rings, lists, bits, line, line.index // Hq, line.index % Hq // group, turn, used, c),
                Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
            )
            # The next line's first rows come while this one's results are written.
            barrier()
            # Places and phases repeat after two rounds of a ring: counted on, 16 million dense tokens would overflow.
            used = (used + (line.full + line.partial) * (BK // BN)) % (2 * STAGES)
            done, done_row = line.index, row
            item += programs
            line = _line(item, count, lists, pattern_ptr, pattern_b, pattern_h, lines, heads, together, Hq, STEPS)
            row = line.line * BQ + line.part * BM
            _begin(
                *(rings, lists, line, line.index // Hq, line.index % Hq, line.index % Hq // group, row),
                *(turn + 1, used, item < count),
                Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
            )
            _write(
                *(softmax, out_ptr, lse_ptr, sinks_ptr, done, done % Hq, done_row, N),
                Sizes(D, DV, BQ, BK, BM, BN, STAGES, QUERIES, WARPS),
            )


def attempt(
    launches: Mapping[Key, GluonLaunch],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: BlockLists,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    score: Score,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `triton.forward.forward` returns for these arguments; None for a call that this kernel does not serve."""
    at = launches.get(table_key(q.device, max(q.shape[-1], v.shape[-1]), q.dtype))
    if at is None or score.featured or rows.slots or block[0] < at.BM or block[1] < at.BN or not q.numel():
        return None
    q, score, _ = with_normal_scale(q, score)
    q, k, v = readable(q), readable(k), readable(v)
    bits, in_fragments = ordered(tiles.bits, block[1], q.dtype)
    if not (in_fragments and tileable(q, k, v)):
        return None
    B, Hq, N, D = q.shape
    _, Hkv, M, DV = v.shape
    out = torch.empty((B, Hq, N, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, Hq, N), dtype=torch.float32, device=q.device)
    BQ, BK = block
    n_rows = rows.order.shape[1]
    (grid,) = programs(n_rows, BQ // at.BM, B * Hq)
    if at.persistent:
        grid = min(grid, at.persistent * multiprocessors(q.device))
    with device_of(q):
        gluon_kernel[(grid,)](
            *(out, lse, list_pointers(rows), Bits(bits, tiles.seen_keys), pattern_of),
            *(*in_rings(at.BM, q), *in_rings(at.BN, k, v)),
            *pattern_strides(pattern_of),
            *(score.scale, N, Hq, Hq // Hkv, n_rows, B * Hq),
            heads_together(M * (D + DV) * q.element_size() * Hkv // Hq, B * Hq),
            None if sinks is None else sinks.float().contiguous(),
            D=D,
            DV=DV,
            BQ=BQ,
            BK=BK,
            BM=at.BM,
            BN=at.BN,
            STAGES=at.stages,
            QUERIES=2 if at.persistent else 1,
            WARPS=at.warps,
            num_warps=at.warps,
        )
    return out, lse


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def in_rings(rows: int, *tensors: torch.Tensor) -> tuple[TensorDescriptor, ...]:
    """Descriptors of [B, H, N, D] in half precision that copy a number of rows of one head into a ring."""
    dtype = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}
    return tuple(
        TensorDescriptor(
            *(x, list(x.shape), list(x.stride()), box := [1, 1, rows, x.shape[-1]]),
            gl.NVMMASharedLayout.get_default_for(box, dtype[x.dtype]),
        )
        for x in tensors
    )
