"""A scale at the end of floating point: what Triton's kernels take instead."""

from __future__ import annotations

import torch

from sparseflash.kernels.layout import Score

TINY = torch.finfo(torch.float32).tiny  # the smallest normal number


def with_normal_scale(q: torch.Tensor, score: Score) -> tuple[torch.Tensor, Score, float]:
    """(q, score, share): the same attention with a scale of at least TINY; dq is `share` times that of the q here.

    Kernels multiply the -inf of a hidden score by the scale in float32, and 0 * -inf is NaN.
    """
    if score.scale >= TINY:
        return q, score, 1.0
    share = score.scale / TINY
    return q * share, score._replace(scale=TINY), share
