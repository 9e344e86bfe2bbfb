"""Attention over lookup tables on a CPU: the compiled kernel, or torch where there is none and for float64."""

from __future__ import annotations

import torch

from sparseflash.kernels.cpu import native, plain
from sparseflash.kernels.layout import BlockLists, Results, Score, Tiles


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score, sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32 (fp64 for fp64 inputs)."""
    run = native.forward if native.serves(q, score) else plain.forward
    return run(q, k, v, rows, tiles, pattern_of, block, score, sinks)


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, rows: BlockLists, columns: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v (without sinks) in their dtypes."""
    run = native.backward if native.serves(q, score) else plain.backward
    return run(dout, dlse, q, k, v, out, lse, rows, columns, tiles, pattern_of, block, score)


def bias_gradient(
    results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, rows: BlockLists,
    columns: BlockLists, tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int], score: Score,
) -> torch.Tensor:  # fmt: skip
    """The gradient of a bias that is not one of queries (without sinks), in its shape and dtype."""
    if native.serves(q, score):
        return native.bias_gradient(results, q, k, v, bias, rows, columns, tiles, pattern_of, block, score)
    return plain.bias_gradient(results, q, k, v, bias, rows, tiles, pattern_of, block, score)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, rows: BlockLists, tiles: Tiles,
    pattern_of: torch.Tensor, block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, n, V] in q's dtype and lse [B, Hq, n], for queries at the ends of samples of given lengths [B]."""
    run = native.decode if native.serves(q, score) else plain.decode
    return run(q, k, v, lengths, rows, tiles, pattern_of, block, score, sinks)
