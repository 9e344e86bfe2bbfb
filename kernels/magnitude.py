"""Numbers at the ends of floating point: which operands kernels may take as they come, and what others need.

Everything is told from the Euclidean norms of whole operands, one cheap pass each: no element exceeds such a norm, nor
any product of two rows that of two norms. A comparison with NaN is false, so a NaN asks for all there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

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


class Needs(NamedTuple):
    """What a call of the CPU backend cannot go without."""

    cleaning: bool  # keys that no query sees become 0: some key or value may not be finite
    writing: bool  # hidden scores are written, since adding -inf to inf or NaN is no way to hide
    own_products: bool  # likewise, but for rows that are NaN anyway: torch's operator only adds
    shifting: bool  # scores are shifted before the exponential: unshifted sums of values could leave the range
    clearing: bool  # hidden probabilities and gradients of scores are written too: their factors may not be finite


def needs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cotangents: tuple[torch.Tensor, torch.Tensor] | None,  # of out, and of lse
    largest: Callable[[float], float],  # a bound of scores from one of products of queries and keys
    factor: float,  # unshifted probabilities that are taken as they are lie between this and its inverse
) -> Needs:
    """What these operands need, in the forward pass or, with cotangents, in the backward pass."""
    numbers = torch.finfo(torch.promote_types(q.dtype, torch.float32))
    most, least = numbers.max / (16 * factor), numbers.tiny / numbers.eps * factor
    queries, keys, values = _size(q), _size(k), _size(v)
    writing = not largest(queries * keys) < most
    terms = [values]
    shifting = not least < _finite_size(v, values) < most
    if cotangents is not None:
        dout, dlse = map(_size, cotangents)
        terms += [dout, dlse, dout * values]
        finite = _finite_size(cotangents[0], dout)
        sums = finite, finite * _finite_size(v, values)
        shifting = not (all(least < x < most for x in sums) and _finite_size(cotangents[1], dlse) < most)
    return Needs(
        cleaning=not keys + values < math.inf,
        writing=writing,
        own_products=writing and not may_be_added_to(q, k, largest),
        shifting=shifting,
        clearing=writing or not all(x < most for x in terms),
    )


def may_be_added_to(q: torch.Tensor, k: torch.Tensor, largest: Callable[[float], float]) -> bool:
    """Whether scores of queries and keys are finite in rows that are not NaN anyway: -inf added to them hides them."""
    most = torch.finfo(torch.promote_types(q.dtype, torch.float32)).max / 16
    return largest(_finite_size(q, _size(q)) * _size(k)) < most


def _size(x: torch.Tensor) -> float:
    """The norm of all of x: inf or NaN if some element is, and inf if it overflows."""
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _finite_size(x: torch.Tensor, size: float) -> float:
    """The norm of what is finite in x, from that of all."""
    return size if size < math.inf else _size(x.nan_to_num(0, 0, 0))
