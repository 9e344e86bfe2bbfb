"""Masked dense attention in plain torch: the oracle. O(N^2) memory, any floating dtype, differentiable."""

from __future__ import annotations

import math

import torch

from sparseflash.kernels import bias as biases
from sparseflash.kernels import dropout


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    q_offset: int | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the allowed pairs, computed directly from the formula.

    Args:
        q: [B, Hq, N, D].
        k: [B, Hkv, M, D], Hq a multiple of Hkv.
        v: [B, Hkv, M, Dv].
        token_mask: bool [N, M], or with leading dims that broadcast to [B, Hq]; None allows all.
        scale: factor on scores; default ``D ** -0.5``.
        softcap: c turns a scaled score s into ``c * tanh(s / c)``.
        alibi_slopes: [Hq] or [B, Hq]; ``slope * |q_position - k_position|`` is then subtracted.
        bias: [B or 1, Hq or 1, N or 1, M or 1], or [Hq or 1, 2 R + 1] of distances, is then added; -inf hides a pair.
            See :func:`sparseflash.attention`.
        q_offset: position of the first query; the first key has position 0. Default M - N.
        sinks: [Hq], one more logit for each row of a head, with no value.
        dropout_p: probability that an attention probability becomes 0, see :func:`dropout_mask`.
        seed: seed of dropout; required with it.
        return_lse: also return the log-sum-exp of each query's scores, without the sink, [B, Hq, N].

    Returns:
        [B, Hq, N, Dv] in q's dtype. A query that sees no key gets 0, lse -inf and zero gradients.

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
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = (torch.arange(n, device=q.device) for n in scores.shape[-2:])
    distance = keys - (queries[:, None] + (len(keys) - len(queries) if q_offset is None else q_offset))
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(scores.dtype)[..., None, None] * distance.abs()
    if bias is not None:
        if biases.is_relative(bias):
            reach = biases.reach(bias)
            bias = bias[:, distance.clamp(-reach, reach) + reach]
        scores = (scores + bias.to(scores.dtype)).masked_fill(bias == -torch.inf, -torch.inf)
    if token_mask is not None:
        scores = scores.masked_fill(~token_mask, -torch.inf)
    # The gradient of the log-sum-exp of a row without keys is NaN, so such rows are masked before it.
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0)
    logits = scores
    if sinks is not None:
        logits = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)], -1)
    p = logits.softmax(-1)[..., : scores.shape[-1]]
    if dropout_p:
        if seed is None:
            raise ValueError(f"dropout_p={dropout_p} needs a seed")
        p = p * dropout_mask(tuple(p.shape), dropout_p, seed).to(p) * (dropout.ONE / dropout.threshold(dropout_p))
    out = (p @ v).masked_fill(dead, 0)
    if not return_lse:
        return out
    return out, scores.logsumexp(-1).masked_fill(dead.squeeze(-1), -torch.inf)


def dropout_mask(shape: tuple[int, ...], dropout_p: float, seed: int | torch.Tensor) -> torch.Tensor:
    """The pairs that dropout keeps for a seed, equal on every backend and at every block size.

    Args:
        shape: (B, Hq, N, M).
        dropout_p: in [0, 1). Each pair is kept with probability ``round((1 - p) * 2**24) / 2**24``, and attention
            divides by this probability.
        seed: int, or int64 tensor with no dims.

    Returns:
        bool [B, Hq, N, M]; see :mod:`sparseflash.kernels.dropout` for the hash.

    Example:
        >>> import sparseflash as sf
        >>> kept = sf.reference.dropout_mask((2, 4, 128, 128), 0.1, seed=7)
        >>> bool(abs(kept.float().mean() - 0.9) < 0.01)
        True
    """
    B, Hq, N, M = shape
    rows = dropout.row_keys(torch.as_tensor(seed), torch.arange(B * Hq)[:, None], torch.arange(N))
    kept = dropout.keep_mask(rows[..., None], torch.arange(M), dropout.threshold(dropout_p))
    return kept.view(B, Hq, N, M)
