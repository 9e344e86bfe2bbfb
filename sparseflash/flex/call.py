"""``flex_attention``, with FlexAttention's arguments, over the tables of this library.

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
        score_mod: ``fn(score, b, h, q_idx, kv_idx)``. Recognised from the operations that it runs are factors
            (constants, or per sample, head and query), ``c * tanh(score / c)``, terms that do not depend on the score,
            -inf masks, and compositions of these in this order. Terms that depend on the head and on ``kv_idx - q_idx``
            alone (tables of distances, T5's buckets) are computed once per distance; ``bias[b, h, q_idx, kv_idx]`` is
            read in place; other terms are computed for all pairs on which they depend. Captured tensors are read at
            every call and get gradients.
        block_mask: from :func:`create_block_mask`, or None for all pairs: queries are counted from 0. Torch's own masks
            and masks built from tables are compared at every call with what they held, and converted again after a
            change. Or any mask that :func:`sparseflash.attention` takes; a Pattern aligns the last query with the last
            key.
        scale: factor on the scores, default ``D ** -0.5``.
        enable_gqa: whether Hkv may differ from Hq; it must divide Hq.
        return_lse: also return the log-sum-exp, fp32 [B, Hq, N].
        kernel_options: options of torch's generated kernels; ignored here.
        return_aux: the newer way to request the log-sum-exp, and the largest score of each query, fp32 [B, Hq, N]
            without a gradient. The latter is computed separately, by torch's matrix products over the stored blocks,
            and costs about one more forward pass.
        softcap: the same as ``lambda score, *_: softcap * tanh(score / softcap)``.
        alibi_slopes: fp32 [Hq], the same as ``lambda score, b, h, q, k: score - slopes[h] * abs(q - k)``;
            queries are counted as for block_mask.
        sinks: [Hq], one more logit a head that takes its share of the softmax.

    Returns:
        The output [B, Hq, N, Dv], its dimensions in the order in which those of query lie in memory; with it lse, or
        an ``AuxOutput`` that holds what return_aux asks for.

    Raises:
        NotImplementedError: a score_mod of another form; one that masks or looks at distances, or the largest scores,
            over a LookupTable.
        TypeError: a score_mod that is not callable, and what attention refuses.
        ValueError: a score_mod beside softcap or alibi_slopes, heads that differ without enable_gqa, both ways of
            asking for lse, a mask made for one sample or head of several that differ, and what attention refuses.

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
        raise ValueError("return_lse and return_aux request the same output: give one of them")
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
            raise ValueError("score_mod changes scores itself: leave out softcap= and alibi_slopes=, or score_mod=")
        change = scored
        if torch.compiler.is_compiling():
            from sparseflash.integrations.untraced import scored as change
        changed = change(score_mod, query, key, block_mask, scale, sinks is not None)
        queries, block_mask, scale, softcap, alibi_slopes, shift, bias = changed
    mask = _mask(block_mask, query, key, alibi_slopes is not None)
    out, lse = attention(
        *(queries, key, value, cast(Mask, mask)),  # a packed table is for compiled graphs alone
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
    """The output [B, Hq, N, Dv] with its dimensions ordered in memory as those of query; the last one is innermost."""
    strides = query.stride()
    order: list[int] = []  # outermost first; an insertion sort, because torch.compile cannot sort symbols
    for dim in range(3):
        order.insert(sum(strides[other] > strides[dim] for other in order), dim)
    if order == [0, 1, 2] or out.numel() == 0:
        return out
    back = [order.index(dim) for dim in range(3)]
    return out.permute(*order, 3).contiguous().permute(*back, 3)


def _mask(block_mask: Mask | FlexMask, query: Tensor, key: Tensor, biased: bool) -> Mask | PackedTable:
    """The mask as attention takes it."""
    if query.dim() != 4 or key.dim() != 4:
        return None  # attention raises its own error
    compiling = torch.compiler.is_compiling()
    if isinstance(block_mask, BlockMask) and block_mask.packed is not None:
        check_made_for(block_mask, query)
        if compiling:
            return block_mask.packed
        if block_mask.recorded is not None:
            return block_mask.recorded
    if isinstance(block_mask, BlockMask) and block_mask.packed is not None:  # unchanged: it has no tables to write to
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
