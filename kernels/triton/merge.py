"""What pieces of a heavy line gave, put together: outputs by their lse, gradients by addition.

A line (block row or block column) far above the mean is shared by several programs. Each writes its partial result, in
fp32, into a slot of its own; the programs here read the slots of a line in their order, so nothing is atomic and a
rerun gives the same bits.

Shape legend: S slots, H heads a sample, N tokens of all lines, D the width of a result, BL tokens a line, BM a
program's step.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparseflash.kernels.layout import Side
from sparseflash.kernels.triton.common import LN2, LOG2E, load_rows, padded, programs, sink_share, store_rows
from sparseflash.kernels.triton.softmax import nothing_seen, with_part
from sparseflash.kernels.triton.types import Pieces

STEP = 16  # rows of a program: enough programs even for a single line, and few registers at any width


@triton.jit
def _pieces(merges_ptr, pattern_ptr, pattern_b, pattern_h, H, group, heads, cut_lines, STEPS: tl.constexpr):
    """The pieces that this program puts together."""
    index = tl.program_id(0) // STEPS % heads
    head = index % H * group
    p = tl.load(pattern_ptr + index // H * pattern_b + head * pattern_h).to(tl.int64)
    merge = merges_ptr + (p * cut_lines + tl.program_id(0) // (STEPS * heads)) * 3
    return Pieces(index, tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.program_id(0) % STEPS)


@triton.jit(do_not_specialize=["pattern_b", "pattern_h", "N", "H", "heads", "cut_lines", "sinks_ptr"])
def outputs_kernel(
    parts_ptr,  # fp32 [S, heads, BL, D]: outputs of pieces
    lses_ptr,  # fp32 [S, heads, BL]: theirs, base 2
    out_ptr,  # [heads, N, D]
    lse_ptr,  # fp32 [heads, N], natural
    merges_ptr,
    pattern_ptr,
    pattern_b,
    pattern_h,
    N,
    H,
    heads,  # B * H
    cut_lines,
    sinks_ptr,  # fp32 [H] or None
    D: tl.constexpr,
    DP: tl.constexpr,
    BL: tl.constexpr,
    BM: tl.constexpr,
):
    pieces = _pieces(merges_ptr, pattern_ptr, pattern_b, pattern_h, H, 1, heads, cut_lines, BL // BM)
    if pieces.line < 0:
        return
    first = pieces.step * BM
    rows = pieces.line * BL + first + tl.arange(0, BM)
    keep = rows < N
    softmax = nothing_seen(BM, DP)
    at = (pieces.begin.to(tl.int64) * heads + pieces.index) * BL
    for _ in range(pieces.begin, pieces.end):
        part = load_rows(parts_ptr + at * D, first, D, keep, 1, BM, D, DP)
        lse = tl.load(lses_ptr + at + first + tl.arange(0, BM), mask=keep, other=float("-inf"))
        softmax = with_part(softmax, part, lse)
        at += tl.cast(heads, tl.int64) * BL
    dead = softmax.total == 0.0
    total = tl.where(dead, 1.0, softmax.total)
    lse = tl.where(dead, 0.0, softmax.peak) + tl.log2(total)
    value = softmax.acc / total[:, None]
    if sinks_ptr is not None:
        value *= sink_share(lse, tl.load(sinks_ptr + pieces.index % H) * LOG2E)[:, None]
    row = pieces.index.to(tl.int64) * N
    store_rows(out_ptr + row * D, pieces.line * BL + first, D, keep, value, 1, BM, D, DP)
    tl.store(lse_ptr + row + rows, tl.where(dead, float("-inf"), lse * LN2), mask=keep)


@triton.jit(do_not_specialize=["pattern_b", "pattern_h", "N", "H", "group", "heads", "cut_lines"])
def sums_kernel(
    parts_ptr,  # fp32 [S, heads, BL, D]
    to_ptr,  # [heads, N, D]
    merges_ptr,
    pattern_ptr,
    pattern_b,
    pattern_h,
    N,
    H,
    group,  # pattern heads per head here; the group's first one's pattern counts
    heads,  # B * H
    cut_lines,
    D: tl.constexpr,
    DP: tl.constexpr,
    BL: tl.constexpr,
    BM: tl.constexpr,
):
    pieces = _pieces(merges_ptr, pattern_ptr, pattern_b, pattern_h, H, group, heads, cut_lines, BL // BM)
    if pieces.line < 0:
        return
    first = pieces.step * BM
    keep = pieces.line * BL + first + tl.arange(0, BM) < N
    acc = tl.zeros((BM, DP), tl.float32)
    at = (pieces.begin.to(tl.int64) * heads + pieces.index) * BL
    for _ in range(pieces.begin, pieces.end):
        acc += load_rows(parts_ptr + at * D, first, D, keep, 1, BM, D, DP)
        at += tl.cast(heads, tl.int64) * BL
    row = pieces.index.to(tl.int64) * N
    store_rows(to_ptr + row * D, pieces.line * BL + first, D, keep, acc, 1, BM, D, DP)


def partial_results(side: Side, heads: int, *size: int) -> torch.Tensor | None:
    """Room for the partial results of the pieces of lines, fp32 [slots, heads, *size]; None when no line is cut."""
    if not side.slots:
        return None
    return torch.empty((side.slots, heads, *size), dtype=torch.float32, device=side.spans.device)


def merge_outputs(
    parts: torch.Tensor,  # fp32 [S, B * Hq, BQ, DV]
    lses: torch.Tensor,  # fp32 [S, B * Hq, BQ], base 2
    out: torch.Tensor,  # [B, Hq, N, DV]; the cut rows are written
    lse: torch.Tensor,  # fp32 [B, Hq, N]; likewise
    rows: Side,
    pattern_of: torch.Tensor,
    sinks: torch.Tensor | None,  # fp32 [Hq]
) -> None:
    """Outputs and lse of cut block rows from those of their pieces."""
    (B, H, N, D), BL = out.shape, parts.shape[2]
    cut_lines = rows.merges.shape[1]
    outputs_kernel[programs(cut_lines, BL // STEP, B * H)](
        *(parts, lses, out, lse, rows.merges, pattern_of),
        *(*pattern_strides(pattern_of), N, H, B * H, cut_lines, sinks),
        *(D, padded(D), BL, STEP),
        num_warps=4,
    )


def add_partials(
    parts: torch.Tensor,  # fp32 [S, B * H, tokens a line, D]
    total: torch.Tensor,  # [B, H, N, D]; the cut lines are written
    side: Side,
    pattern_of: torch.Tensor,  # [B or 1, H * group or 1]
    group: int,
) -> None:
    """Gradients of cut lines from those of their pieces."""
    (B, H, N, D), BL = total.shape, parts.shape[2]
    cut_lines = side.merges.shape[1]
    sums_kernel[programs(cut_lines, BL // STEP, B * H)](
        *(parts, total, side.merges, pattern_of),
        *(*pattern_strides(pattern_of), N, H, group, B * H, cut_lines),
        *(D, padded(D), BL, STEP),
        num_warps=4,
    )


def pattern_strides(pattern_of: torch.Tensor) -> tuple[int, int]:
    """How to index pattern_of [B or 1, H or 1] by sample and head: 0 where one stands for all."""
    b, h = (s if n > 1 else 0 for s, n in zip(pattern_of.stride(), pattern_of.shape, strict=True))
    return b, h
