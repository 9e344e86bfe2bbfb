"""The reduction of split lines: outputs are combined by their lse, gradients are added.

A line (block row or block column) far above the mean is split among several programs. Each writes its partial result,
in fp32, to a slot of its own. The programs here read the slots of a line in order: nothing is atomic, and a rerun gives
the same bits.

Shape legend: S slots, H heads a sample, N tokens of all lines, D the width of a result, BL tokens a line, BM a
program's step.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels.layout import BlockLists
from sparseflash.kernels.triton.common import LN2, LOG2E, load_rows, padded, programs, sink_share, store_rows
from sparseflash.kernels.triton.softmax import nothing_seen, with_part
from sparseflash.kernels.triton.types import Splits

STEP = 16  # rows of a program: enough programs even for a single line, and few registers at any width


@triton.jit
def _splits(reductions_ptr, pattern_ptr, pattern_b, pattern_h, H, group, heads, split_lines, STEPS: tl.constexpr):
    """The splits that this program reduces."""
    index = tl.program_id(0) // STEPS % heads
    head = index % H * group
    p = tl.load(pattern_ptr + index // H * pattern_b + head * pattern_h).to(tl.int64)
    item = reductions_ptr + (p * split_lines + tl.program_id(0) // (STEPS * heads)) * 3
    return Splits(index, tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.program_id(0) % STEPS)


@triton.jit(do_not_specialize=["pattern_b", "pattern_h", "N", "H", "heads", "split_lines", "sinks_ptr"])
def outputs_kernel(
    parts_ptr,  # fp32 [S, heads, BL, D]: outputs of splits
    lses_ptr,  # fp32 [S, heads, BL]: theirs, base 2
    out_ptr,  # [heads, N, D]
    lse_ptr,  # fp32 [heads, N], natural
    reductions_ptr,
    pattern_ptr,
    pattern_b,
    pattern_h,
    N,
    H,
    heads,  # B * H
    split_lines,
    sinks_ptr,  # fp32 [H] or None
    D: tl.constexpr,
    DP: tl.constexpr,
    BL: tl.constexpr,
    BM: tl.constexpr,
):
    splits = _splits(reductions_ptr, pattern_ptr, pattern_b, pattern_h, H, 1, heads, split_lines, BL // BM)
    if splits.line < 0:
        return
    first = splits.step * BM
    rows = splits.line * BL + first + tl.arange(0, BM)
    keep = rows < N
    softmax = nothing_seen(BM, DP)
    at = (splits.begin.to(tl.int64) * heads + splits.index) * BL
    for _ in range(splits.begin, splits.end):
        part = load_rows(parts_ptr + at * D, first, D, keep, 1, BM, D, DP)
        lse = tl.load(lses_ptr + at + first + tl.arange(0, BM), mask=keep, other=float("-inf"))
        softmax = with_part(softmax, part, lse)
        at += tl.cast(heads, tl.int64) * BL
    dead = softmax.total == 0.0
    total = tl.where(dead, 1.0, softmax.total)
    lse = tl.where(dead, 0.0, softmax.peak) + tl.log2(total)
    value = softmax.acc / total[:, None]
    if sinks_ptr is not None:
        value *= sink_share(lse, tl.load(sinks_ptr + splits.index % H) * LOG2E)[:, None]
    row = splits.index.to(tl.int64) * N
    store_rows(out_ptr + row * D, splits.line * BL + first, D, keep, value, 1, BM, D, DP)
    tl.store(lse_ptr + row + rows, tl.where(dead, float("-inf"), lse * LN2), mask=keep)


@triton.jit(do_not_specialize=["pattern_b", "pattern_h", "N", "H", "group", "heads", "split_lines"])
def sums_kernel(
    parts_ptr,  # fp32 [S, heads, BL, D]
    to_ptr,  # [heads, N, D]
    reductions_ptr,
    pattern_ptr,
    pattern_b,
    pattern_h,
    N,
    H,
    group,  # pattern heads per head here; the group's first one's pattern counts
    heads,  # B * H
    split_lines,
    D: tl.constexpr,
    DP: tl.constexpr,
    BL: tl.constexpr,
    BM: tl.constexpr,
):
    splits = _splits(reductions_ptr, pattern_ptr, pattern_b, pattern_h, H, group, heads, split_lines, BL // BM)
    if splits.line < 0:
        return
    first = splits.step * BM
    keep = splits.line * BL + first + tl.arange(0, BM) < N
    acc = tl.zeros((BM, DP), tl.float32)
    at = (splits.begin.to(tl.int64) * heads + splits.index) * BL
    for _ in range(splits.begin, splits.end):
        acc += load_rows(parts_ptr + at * D, first, D, keep, 1, BM, D, DP)
        at += tl.cast(heads, tl.int64) * BL
    row = splits.index.to(tl.int64) * N
    store_rows(to_ptr + row * D, splits.line * BL + first, D, keep, acc, 1, BM, D, DP)


def partial_results(side: BlockLists, heads: int, *size: int) -> torch.Tensor | None:
    """A buffer for partial results, fp32 [slots, heads, *size]; None when no line is split."""
    if not side.slots:
        return None
    return torch.empty((side.slots, heads, *size), dtype=torch.float32, device=side.ranges.device)


def merge_outputs(
    parts: torch.Tensor,  # fp32 [S, B * Hq, BQ, DV]
    lses: torch.Tensor,  # fp32 [S, B * Hq, BQ], base 2
    out: torch.Tensor,  # [B, Hq, N, DV]; only split rows are written
    lse: torch.Tensor,  # fp32 [B, Hq, N]; likewise
    rows: BlockLists,
    pattern_of: torch.Tensor,
    sinks: torch.Tensor | None,  # fp32 [Hq]
) -> None:
    """Outputs and lse of split block rows."""
    (B, H, N, D), BL = out.shape, parts.shape[2]
    split_lines = rows.reductions.shape[1]
    outputs_kernel[programs(split_lines, BL // STEP, B * H)](
        *(parts, lses, out, lse, rows.reductions, pattern_of),
        *(*pattern_strides(pattern_of), N, H, B * H, split_lines, sinks),
        *(D, padded(D), BL, STEP),
        num_warps=4,
    )


def add_partials(
    parts: torch.Tensor,  # fp32 [S, B * H, tokens a line, D]
    total: torch.Tensor,  # [B, H, N, D]; only split lines are written
    side: BlockLists,
    pattern_of: torch.Tensor,  # [B or 1, H * group or 1]
    group: int,
) -> None:
    """Gradients of split lines."""
    (B, H, N, D), BL = total.shape, parts.shape[2]
    split_lines = side.reductions.shape[1]
    sums_kernel[programs(split_lines, BL // STEP, B * H)](
        *(parts, total, side.reductions, pattern_of),
        *(*pattern_strides(pattern_of), N, H, group, B * H, split_lines),
        *(D, padded(D), BL, STEP),
        num_warps=4,
    )


def pattern_strides(pattern_of: torch.Tensor) -> tuple[int, int]:
    """How to index pattern_of [B or 1, H or 1] by sample and head: 0 where one stands for all."""
    b, h = (s if n > 1 else 0 for s, n in zip(pattern_of.stride(), pattern_of.shape, strict=True))
    return b, h
