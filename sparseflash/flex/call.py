"""``flex_attention``: FlexAttention's call, over the tables of this library.

Source of the interface: Dong et al. (2024), "Flex Attention", https://arxiv.org/abs/2412.05496, and the PyTorch
documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from sparseflash.flex.block_mask import BlockMask
from sparseflash.flex.converting import all_pairs, check_made_for, from_torch
from sparseflash.flex.max_scores import largest_scores
from sparseflash.flex.scoring import scored
from sparseflash.functional.attention import Mask, attention
from sparseflash.tables.table import PackedTable


@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, kernel_options: Mapping[str, Any] | None = None, *, return_aux: None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False, *,
    return_lse: Literal[True], kernel_options: Mapping[str, Any] | None = None, return_aux: None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, kernel_options: Mapping[str, Any] | None = None, *, return_aux: AuxRequest,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor] | tuple[Tensor, AuxOutput]:
    """Attention over a block mask, with FlexAttention's arguments; see :func:`sparseflash.attention`.

    Args:
        query: [B, Hq, N, D].
        key: [B or 1, Hkv, M, D].
        value: [B or 1, Hkv, M, Dv].
        score_mod: ``fn(score, b, h, q_idx, kv_idx)``. It is traced, and the operations that it runs must be, in this
            order: factors (numbers, or one for each sample, head and query), ``c * tanh(score / c)``, added terms that
            do not depend on the score, and -inf masks. A term that depends on the head and ``kv_idx - q_idx`` alone
            (tables of distances, T5's buckets) is computed once per distance; ``bias[b, h, q_idx, kv_idx]`` is read in
            place; any other term is computed for all pairs on which it depends. Captured tensors are read at every call
            and receive gradients.
        block_mask: from :func:`create_block_mask`, or None for all pairs; queries count from 0. The contents of torch's
            own masks, and of masks made of tables, are compared at every call, and converted again if they changed. Or
            any mask that :func:`sparseflash.attention` takes; a Pattern aligns the last query with the last key.
        scale: factor on the scores, default ``D ** -0.5``.
        enable_gqa: allow Hkv to differ from Hq; it must divide Hq.
        return_lse: also return the log-sum-exp, fp32 [B, Hq, N].
        kernel_options: ignored, since no kernels are generated here.
        return_aux: the newer way to request the log-sum-exp, and the largest score of each query, fp32 [B, Hq, N]
            without a gradient. The largest scores are computed separately, by torch's matrix products over the stored
            blocks, at the cost of about one more forward pass.
        softcap: the same as ``lambda score, *_: softcap * tanh(score / softcap)``.
        alibi_slopes: fp32 [Hq], the same as ``lambda score, b, h, q, k: score - slopes[h] * abs(q - k)``, with
            queries counted as for block_mask.
        sinks: [Hq], an additional logit per head that takes its share of the softmax.

    Returns:
        The output [B, Hq, N, Dv], in the same memory order of dimensions as query; with return_lse also lse, with
        return_aux an ``AuxOutput``.

    Raises:
        NotImplementedError: a score_mod of another form; a LookupTable together with a score_mod that masks or uses
            distances, or with max_scores.
        TypeError: a score_mod that is not callable; whatever attention raises.
        ValueError: a score_mod together with softcap or alibi_slopes; different numbers of heads without enable_gqa;
            return_lse together with return_aux; a mask made for one sample or head whose mask_mod depends on it;
            whatever attention raises.

    Example:
        >>> import torch
        >>> from sparseflash.flex import create_block_mask, flex_attention
        >>> document = torch.tensor([0] * 200 + [1] * 312)
        >>> def mask_mod(b, h, q, k):
        ...     return (q >= k) & (document[q] == document[k])
        >>> block_mask = create_block_mask(mask_mod, B=None, H=None, Q_LEN=512, KV_LEN=512, device="cpu")
        >>> q, k, v = torch.randn(3, 2, 4, 512, 32, requires_grad=True).unbind(0)
        >>> out = flex_attention(q, k, v, block_mask=block_mask)
        >>> out.sum().backward()  # on a CPU too
    """
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux request the same: pass one of them")
    if query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}: set enable_gqa=True if groups of query heads share "
            "a key head"
        )
    if key.shape[0] == value.shape[0] == 1 < query.shape[0]:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    queries, shift, bias = query, None, None
    if score_mod is not None:
        if softcap is not None or alibi_slopes is not None:
            raise ValueError("score_mod caps and biases the scores itself: leave out softcap and alibi_slopes")
        change = scored
        if torch.compiler.is_compiling():
            from sparseflash.integrations.untraced import scored as change
        changed = change(score_mod, query, key, block_mask, scale, sinks is not None)
        queries, block_mask, scale, softcap, alibi_slopes, shift, bias = changed
    mask = _mask(block_mask, query, key, alibi_slopes is not None)
    out, lse = attention(
        *(queries, key, value, cast(Mask, mask)),  # only compiled graphs get a packed table
        scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias, sinks=sinks, return_lse=True,
    )  # fmt: skip
    out = _strides_like(out, query)
    lse = lse if shift is None else lse + shift
    if return_aux is None:
        return (out, lse) if return_lse else out
    largest = None
    if return_aux.max_scores:
        find = largest_scores
        if torch.compiler.is_compiling():
            from sparseflash.integrations.untraced import largest_scores as find
        largest = find(queries, key, block_mask, scale, softcap, alibi_slopes, bias)
        largest = largest if shift is None else largest + shift
    return out, AuxOutput(lse=lse if return_aux.lse else None, max_scores=largest)


def _strides_like(out: Tensor, query: Tensor) -> Tensor:
    """The output [B, Hq, N, Dv] in the memory order of query's dimensions, the last one innermost."""
    strides = query.stride()
    order: list[int] = []  # outermost first; a loop, since torch.compile cannot sort symbols
    for dim in range(3):
        order.insert(sum(strides[other] > strides[dim] for other in order), dim)
    if order == [0, 1, 2] or out.numel() == 0:
        return out
    back = [order.index(dim) for dim in range(3)]
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def _mask(block_mask: Mask | FlexMask, query: Tensor, key: Tensor, biased: bool) -> Mask | PackedTable:
    """The mask as attention takes it."""
    if query.dim() != 4 or key.dim() != 4:
        return None  # attention will refuse it
    compiling = torch.compiler.is_compiling()
    if isinstance(block_mask, BlockMask) and block_mask.packed is not None:
        check_made_for(block_mask, query)
        if compiling:
            return block_mask.packed
        if block_mask.recorded is not None:
            return block_mask.recorded
    if isinstance(block_mask, BlockMask) and block_mask.packed is not None:  # it has no tables that could have changed
        return block_mask.packed.table()
    if isinstance(block_mask, FlexMask):
        convert = from_torch
        if compiling:
            from sparseflash.integrations.untraced import converted as convert
        return convert(block_mask, query.shape[0], query.shape[1], (query.shape[2], key.shape[2]))
    if block_mask is None and biased and query.shape[2] != key.shape[2]:
        every = all_pairs
        if compiling:
            from sparseflash.integrations.untraced import all_pairs as every
        return every(query.shape[2], key.shape[2])
    return block_mask
