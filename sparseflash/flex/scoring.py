"""Translate ``score_mod`` functions to arguments of the kernels: a scale, a cap, slopes, a bias and a mask.

Source of the forms: Dong et al. (2024), "Flex Attention", https://arxiv.org/abs/2412.05496, section 3; ALiBi: Press et
al. (2022), https://arxiv.org/abs/2108.12409; caps: Gemma 2, https://arxiv.org/abs/2408.00118.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.flex.biases import bias_of
from sparseflash.flex.converting import host_mask
from sparseflash.flex.score_mods import Bias, Change, Condition, Distance, Sizes, change_of, value_of, values_of
from sparseflash.functional.arguments import checked_scale
from sparseflash.functional.attention import Mask
from sparseflash.integrations.mask_mods import Recording
from sparseflash.integrations.scanning import mask_of
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.causal import causal

MOST_MASKS = 16  # cached for one score_mod
IN_TORCH = (
    "It runs in torch, over the same mask: from torch.nn.attention.flex_attention import flex_attention; "
    "flex_attention(query, key, value, score_mod, sparseflash.integrations.flex.to_flex(block_mask, query.device))"
)


class Scored(NamedTuple):
    """The arguments of attention that are equivalent to a score_mod."""

    query: Tensor
    mask: Mask | FlexMask
    scale: float
    softcap: float | None
    slopes: Tensor | None
    shift: Tensor | float  # added to all scores of a row, [B or 1, H or 1, N or 1]: changes lse, not the output
    bias: Tensor | None


@dataclass(frozen=True, eq=False)
class _Masked:
    """A mask, and the same without the pairs for which a condition fails, with queries counted from 0."""

    base: BlockMask
    mask: BlockMask

    @cached_property
    def side(self) -> int:
        """1 where no query sees a later key, -1 where none sees an earlier one, else 0."""
        return 1 if _none_later(self.mask) else -1 if _none_later(self.mask.transposed()) else 0


@dataclass(frozen=True, eq=False)
class _Known:
    """A score_mod as it was when it was read, what it does, and the masks built from it."""

    recording: Recording
    change: Change | str
    masks: dict[tuple[int, int, int], _Masked] = field(default_factory=dict)


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def refuse(what: str) -> NoReturn:
    """Raise NotImplementedError for a score_mod that does ``what``."""
    raise NotImplementedError(
        f"score_mod {what}. The kernels support factors, a cap c * tanh(score / c), terms that do not depend on the "
        f"score, -inf masks, and compositions of these in this order. {IN_TORCH}"
    )


def scored(
    score_mod: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    mask: Mask | FlexMask,
    scale: float | None,
    sinks: bool = False,
) -> Scored:
    """The arguments of attention in place of a score_mod; with ``sinks``, no shift is taken out of the scores.

    Raises:
        NotImplementedError: a score_mod of another form, a cap that requires a gradient, a mask whose blocks are on
            the device.
        TypeError: score_mod is not callable.
    """
    if not callable(score_mod):
        raise TypeError(f"score_mod must be callable as fn(score, b, h, q_idx, kv_idx), got {score_mod!r}")
    score = torch.zeros((), dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
    known, recording = _read(score_mod, score)
    change = known.change
    if isinstance(change, str):
        refuse(change)
    sizes = Sizes(*map(int, (*query.shape[:3], key.shape[2])))
    factor, cap = change.factor, change.cap
    scale = checked_scale(scale, query.shape[-1]) * factor.number
    softcap = None
    if cap is not None:
        if cap.terms or not cap.number:
            refuse("caps scores by a value per sample or head, by a tensor that requires a gradient, or by 0")
        softcap = abs(cap.number)
        scale *= cap.number
    numbers = value_of(factor, recording, sizes, score)
    if scale < 0:
        scale, numbers = -scale, -(score + 1 if numbers is None else numbers)
    if numbers is not None:
        query = (query.to(score.dtype) * numbers[..., None]).to(query.dtype)
    shift, terms = _shift(change, recording, sizes, score, sinks)
    slopes = None
    if change.distances or change.conditions or any(term.relative for term in terms):
        masked = _masked(known, change.conditions, mask, query, key)
        mask = masked.mask
        for distance in change.distances:
            slope = _slopes(distance, masked, value_of(distance.factor, recording, sizes, score), query.dtype)
            if slope is None:
                assert distance.bias is not None
                terms.append(distance.bias)
            else:
                slopes = slope if slopes is None else slopes + slope
        if slopes is not None:
            slopes = slopes.float().to(query.device).expand(sizes.samples, sizes.heads, 1).squeeze(-1)
    return Scored(query, mask, scale, softcap, slopes, shift, bias_of(terms, recording, sizes, score))


def _read(score_mod: Callable[..., Tensor], score: Tensor) -> tuple[_Known, Recording]:
    """What a score_mod does now. The tensors that this depends on are compared at every call, as torch reads them."""
    recording = Recording.of(score_mod, score.device, score.dtype)
    known: _Known | None = _known.get(score_mod)
    if known is None or not recording.same(known.recording):
        change, decisive = change_of(recording)
        known = _Known(recording.kept(decisive), change)
        _known[score_mod] = known
    return known, recording


def _shift(
    change: Change, recording: Recording, sizes: Sizes, score: Tensor, sinks: bool
) -> tuple[Tensor | float, list[Bias]]:
    """The sum of terms that are equal for all scores of a row, which kernels need not add; and all other terms.

    Not such shifts are terms beside sinks, which would not shift with the row, and tensors that require a gradient,
    which must get one, even though it is 0.
    """
    total: Tensor | float = 0.0
    others = []
    for term in change.biases:
        value = torch.ones_like(score)
        if term.of_row and term.origin is not None:
            queries = sizes.queries if "query" in term.depends else 1
            value = values_of(term.origin, recording, Sizes(sizes.samples, sizes.heads, queries, 1), score)[..., 0]
        if sinks or not term.of_row or value.requires_grad or not value.isfinite().all():
            others.append(term)
        else:
            total = total + value * term.number
    return total, others


def _masked(
    known: _Known, conditions: tuple[Condition, ...], mask: Mask | FlexMask, query: Tensor, key: Tensor
) -> _Masked:
    base = host_mask(mask, query, key, "a score_mod that masks or looks at distances")
    sizes = int(query.shape[0]), int(query.shape[1])
    place = id(base), *sizes
    found = known.masks.get(place)
    if found is None:
        if len(known.masks) >= MOST_MASKS:
            known.masks.clear()
        counted = replace(base, grid=replace(base.grid, q_offset=0), expression="") if base.q_offset else base
        if conditions:
            counted = counted & _of_conditions(known.recording, conditions, counted, sizes, query.device)
        found = known.masks[place] = _Masked(base, counted)
    return found


def _of_conditions(
    recording: Recording, conditions: tuple[Condition, ...], mask: BlockMask, sizes: tuple[int, int], device: Any
) -> BlockMask:
    truths = [(recording.function(condition.origin), condition.seen) for condition in conditions]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = [truth(b, h, q, k) if as_told else ~truth(b, h, q, k) for truth, as_told in truths]
        result = seen[0]
        for one in seen[1:]:
            result = result & one
        return result

    found = Recording.of(mask_mod, device)
    looks = found.looks_at_sample, found.looks_at_head
    samples, heads = (size if looked else 1 for size, looked in zip(sizes, looks, strict=True))
    return mask_of(mask_mod, found, samples, heads, mask.grid, device)


def _slopes(distance: Distance, masked: _Masked, numbers: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Slopes of ``- slope * |q - k|``; a signed distance has this form if all keys are on one side of their queries.

    None if it does not, and for slopes that kernels cannot take: theirs are float32, without gradients.
    """
    slopes = (torch.ones(1, 1, 1) if numbers is None else numbers) * distance.factor.number
    exact = dtype != torch.float64 or torch.equal(slopes.float().to(slopes.dtype), slopes)
    side = -1 if distance.absolute else masked.side
    return side * slopes if side and exact and not slopes.requires_grad else None


def _none_later(mask: BlockMask) -> bool:
    return (mask - causal().compile(mask.shape, block=mask.block, q_offset=mask.q_offset)).nnz == 0
