"""An additive bias on scores: its two forms, and what of its gradient needs no kernel.

- dense: [B or 1, Hq or 1, N or 1, M or 1], where a dim of 1 is broadcast;
- relative: [Hq or 1, 2 R + 1]. A query at position p and key j take number R + clamp(j - p, -R, R) of their head.

The gradient of a bias is dS, summed over the pairs that share an element. Over all keys of a query that sum is known:
with P_j = exp(s_j - lse), D = sum_j P_j dP_j and dS_j = P_j (dP_j - D + dlse), it is dlse, and with a sink, which takes
its share of the weight (see `sinks`), dlse + (1 - w) D. So a bias of each query needs no walk over blocks.
"""

from __future__ import annotations

import torch

from sparseflash.kernels import sinks as sink_logits


def reach(bias: torch.Tensor) -> int:
    """R of a relative bias: the distance from which on all share an element."""
    return bias.shape[1] // 2


def is_relative(bias: torch.Tensor) -> bool:
    """Whether a bias speaks of distances, and not of pairs."""
    return bias.dim() == 2


def is_of_queries(bias: torch.Tensor) -> bool:
    """Whether a bias is one number for all keys of a query."""
    return bias.dim() == 4 and bias.shape[3] == 1


def of_queries(
    bias: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient [B or 1, Hq or 1, N or 1, 1] of a bias of queries.

    dout [B, Hq, N, Dv] is the cotangent of out, sinks or not; lse [B, Hq, N], sinks [Hq].
    """
    rows = torch.zeros_like(lse) if dlse is None else dlse.to(lse.dtype)
    if sinks is not None:
        rows = rows + sink_logits.surplus(dout, out, lse, sinks)
    rows = rows + 0 * lse  # what is NaN stays so
    return summed(rows.masked_fill(lse == -torch.inf, 0).unsqueeze(-1), bias.shape).to(bias.dtype)


def summed(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The sum over the dims in which a shape, of as many, has 1."""
    dims = [dim for dim, (have, size) in enumerate(zip(x.shape, shape, strict=True)) if size == 1 != have]
    return x.sum(dims, keepdim=True) if dims else x
