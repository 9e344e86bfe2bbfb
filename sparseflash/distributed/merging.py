"""Results of split rows, computed by every rank over the keys it holds, merged by lse."""

from __future__ import annotations

import torch


def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key sets, from attention over each. Differentiable, summed in order.

    Args:
        out: [R, ..., D], output over each of R key sets.
        lse: [R, ...], its log-sum-exp; -inf where a query sees no key of the set.

    Returns:
        out [..., D] and lse [...]; 0 and -inf where a query sees no key at all.

    Example:
        >>> import torch
        >>> out, lse = merged(torch.tensor([[[1.0]], [[3.0]]]), torch.tensor([[2.0], [2.0]]))
        >>> out.item(), round(lse.item() - 2, 4)
        (2.0, 0.6931)
    """
    peak = lse.detach().amax(0)
    # A query that has seen nothing has a peak of -inf; 0 in its place keeps exp(-inf - peak) at 0.
    peak = peak.masked_fill(peak == -torch.inf, 0)
    weight = (lse - peak).exp()
    total = weight.sum(0)
    seen = total > 0
    safe = total.masked_fill(~seen, 1)
    mean = (weight.unsqueeze(-1) * out).sum(0) / safe.unsqueeze(-1)
    return mean, (peak + safe.log()).masked_fill(~seen, -torch.inf)
