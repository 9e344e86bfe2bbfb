"""Masked dense attention in plain torch: the oracle. O(N^2) memory, any floating dtype, differentiable."""

from __future__ import annotations

import math

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the allowed pairs, computed as the formula reads.

    Args:
        q: [B, Hq, N, D].
        k: [B, Hkv, M, D], Hq a multiple of Hkv.
        v: [B, Hkv, M, Dv].
        token_mask: bool [N, M], or with leading dims that broadcast to [B, Hq]; None allows all.
        scale: factor on scores; default ``D ** -0.5``.
        return_lse: also return the log-sum-exp of each query's scaled scores, [B, Hq, N].

    Returns:
        [B, Hq, N, Dv] in q's dtype. A query that sees nothing gets 0, lse -inf and zero gradients.

    Example:
        >>> import torch, sparseflash as sf
        >>> q = torch.randn(1, 2, 5, 8)
        >>> mask = torch.from_numpy(sf.patterns.causal().compile(5).to_dense())
        >>> sf.reference.attention(q, q, q, mask).shape
        torch.Size([1, 2, 5, 8])
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * scale
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask, -torch.inf)
    # The log-sum-exp of a row without keys has no gradient that is a number; such rows are cut out before it.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0)
    out = (scores.softmax(-1) @ v).masked_fill(dead, 0)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)
