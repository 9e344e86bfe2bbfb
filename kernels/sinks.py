"""Attention sinks in the backward pass: one more logit a head, which the gradient kernels need not know of.

With P_j = exp(s_j - lse) over the keys alone and w = exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink), the keys'
share of a row's weight, out = w * sum_j P_j v_j. Hence, with D = rowsum(dout * out),

    dv_j  = P_j (w dout)
    ds_j  = P_j (w dout . v_j  -  w D  +  dlse)
    dsink = - (1 - w) D, summed over samples and rows,

which are the gradients of attention without sinks for the cotangent w dout. Nothing overflows however far sink and lse
are apart, and dlse keeps its weight where w vanishes.
"""

from __future__ import annotations

import torch


def share(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The keys' share w [B, Hq, N] of each row; lse [B, Hq, N], sinks [Hq]. 0 in a row that sees nothing.

    A sink of -inf is none.
    """
    return _lead(lse, sinks).sigmoid()


def differentiable_share(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The same for autograd, whose derivative of sigmoid, w (1 - w), would lose 1 - w where the sink is light."""
    return torch.nn.functional.logsigmoid(_lead(lse, sinks)).exp()


def fold(
    dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(w dout, dsinks): the cotangent [B, Hq, N, Dv] to go on with, and the gradient of sinks [Hq]."""
    lead = _lead(lse, sinks)
    w, rest = lead.sigmoid(), (-lead).sigmoid()  # not 1 - w, which cancels where the sink is light
    w.masked_fill_(lse.isnan(), 1)  # a NaN in dout would reach keys that its query does not see
    wide = dout.to(w.dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    lost = rest * (wide * out.to(w.dtype)).sum(-1)
    return (wide * w.unsqueeze(-1)).to(dout.dtype), -lost.sum((0, 2)).to(sinks.dtype)


def surplus(dout: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """(1 - w) D [B, Hq, N], which the ds of a row sum to beside dlse; for dout that is not folded."""
    wide = dout.to(lse.dtype).masked_fill((lse == -torch.inf).unsqueeze(-1), 0)
    return (-_lead(lse, sinks)).sigmoid() * (wide * out.to(lse.dtype)).sum(-1)


def _lead(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """By how much the keys outweigh the sink; -inf in a row that sees nothing."""
    lead = lse - sinks.to(lse.dtype).unsqueeze(-1)
    return lead.masked_fill(lse == -torch.inf, -torch.inf)
