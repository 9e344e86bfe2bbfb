"""FlexAttention programs, by changing one import: ``from sparseflash.flex import create_block_mask, flex_attention``.

The same names and arguments as ``torch.nn.attention.flex_attention``, over the tables of this library: a ``mask_mod``
is asked once, when the block mask is made, and never compiled into a kernel; there is a backward pass on every device;
and a mask costs the memory of what it stores. What differs is refused with a word on what to do: ``score_mod`` is code
inside the kernel, of which :func:`flex_attention` takes the common cases as arguments.

Source of the interface: Dong et al. (2024), "Flex Attention", https://arxiv.org/abs/2412.05496, and the PyTorch
documentation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    and_masks,
    create_mask,
    noop_mask,
    or_masks,
)
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask as _create_flex_mask
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.functional import BLOCK, Mask, attention
from sparseflash.integrations.flex import from_flex, largest_block
from sparseflash.integrations.mask_mods import MaskMod, Recording, equal
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compiling import compile_pattern
from sparseflash.patterns.constant import constant
from sparseflash.patterns.full import full
from sparseflash.patterns.grid import Grid, Ints, make_grid
from sparseflash.patterns.pattern import Bools
from sparseflash.patterns.set_operations import stacked
from sparseflash.patterns.where import where

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "BlockMask",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

# Of torch's function: those that are none of ours say how its tables are laid out.
_KEYWORDS = tuple(inspect.signature(_create_flex_mask).parameters)
_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()
# Whether samples and heads have masks of their own, of masks made for one of them.
_looks: WeakIdKeyDictionary = WeakIdKeyDictionary()


@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, kernel_options: dict[str, Any] | None = None, *, return_aux: None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False, *,
    return_lse: Literal[True], kernel_options: dict[str, Any] | None = None, return_aux: None = None,
    softcap: float | None = None, alibi_slopes: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Callable[..., Tensor] | None = None,
    block_mask: Mask | FlexMask = None, scale: float | None = None, enable_gqa: bool = False,
    return_lse: Literal[False] = False, kernel_options: dict[str, Any] | None = None, *, return_aux: AuxRequest,
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
    kernel_options: dict[str, Any] | None = None,
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
        score_mod: must be None. The usual ones are arguments of their own: softcap, alibi_slopes, sinks.
        block_mask: from :func:`create_block_mask`, or None for all pairs: queries are counted from 0. From torch's own:
            what its mask_mod reads is compared at every call, and converted anew when it changed. Or a Pattern, which
            puts the last query on the last key.
        scale: factor on the scores, default ``D ** -0.5``.
        enable_gqa: whether Hkv may differ from Hq, of which it must be a divisor.
        return_lse: also return the log-sum-exp, fp32 [B, Hq, N].
        kernel_options: of generated kernels; there are none here, so nothing is done with them.
        return_aux: the newer way to ask for the log-sum-exp.
        softcap: in place of ``lambda score, *_: softcap * tanh(score / softcap)``.
        alibi_slopes: fp32 [Hq], in place of ``lambda score, b, h, q, k: score - slopes[h] * abs(q - k)``;
            queries are counted as for block_mask.
        sinks: [Hq], one more logit a head that takes its share of the softmax.

    Returns:
        The output [B, Hq, N, Dv]; with it lse, or an ``AuxOutput`` that holds it.

    Raises:
        NotImplementedError: a score_mod, or the largest scores in return_aux.
        ValueError: heads that differ without enable_gqa, both ways of asking for lse, a mask made for one sample or
            head of several that differ, and what attention refuses.

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
    if score_mod is not None:
        raise NotImplementedError(
            "score_mod is code inside the kernel, and kernels here read masks as data. Who sees whom belongs into the "
            "block mask; flex_attention(..., softcap=c) caps scores, alibi_slopes=[Hq] biases them by distance, "
            "sinks=[Hq] adds a logit to each row; torch's own flex_attention takes any other"
        )
    if return_lse and return_aux is not None:
        raise ValueError("return_lse and return_aux ask for the same: give one of them")
    if return_aux is not None and return_aux.max_scores:
        raise NotImplementedError("the largest scores are not kept; return_aux=AuxRequest(lse=True) gives log-sum-exps")
    if query.dim() == key.dim() == 4 and query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query has {query.shape[1]} heads, key {key.shape[1]}: set enable_gqa=True if groups of query heads share "
            "a key head"
        )
    if key.shape[0] == value.shape[0] == 1 < query.shape[0]:
        key, value = (x.expand(query.shape[0], *x.shape[1:]) for x in (key, value))
    out, lse = attention(
        *(query, key, value, _mask(block_mask, query, key, alibi_slopes is not None)),
        scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, return_lse=True,
    )  # fmt: skip
    if return_aux is not None:
        return out, AuxOutput(lse=lse if return_aux.lse else None)
    return (out, lse) if return_lse else out


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    **unused: Any,
) -> BlockMask:
    """The block mask of a ``mask_mod``, in memory for what it stores instead of for all pairs.

    All pairs are asked about, some at a time; samples and heads only as far as the answer depends on them. For long
    sequences a warning (``SlowScan``) names the pattern that the mask turned out to be: patterns compile in the size of
    their answer, and :func:`flex_attention` takes them as they are.

    Args:
        mask_mod: ``fn(b, h, q_idx, kv_idx)`` gives booleans; as for FlexAttention it is written for single indices,
            mapped over all of them, and may look into tensors on ``device``. It is asked now: what it looks into may
            change later without changing the mask.
        B: samples, or None for one mask for all; needed if mask_mod looks at ``b``.
        H: query heads, or None for one mask for all; needed if mask_mod looks at ``h``.
        Q_LEN: queries; the first has index 0.
        KV_LEN: keys.
        device: where the indices lie that mask_mod gets; default the accelerator, or the CPU if there is none.
        BLOCK_SIZE: tokens a block side, or (queries, keys). Other multiples of 16 are cut into the largest of 16, 32,
            64, 128, 256 that divides them.
        _compile: no effect.
        **unused: torch's further arguments, which say how its tables are laid out.

    Raises:
        TypeError: an argument that torch's function has not either, a mask_mod that is not callable or gives no
            booleans, lengths that are no ints.
        ValueError: a length, B or H below 1, a block side that is no multiple of 16, or a mask_mod that looks at
            samples or heads of which B or H does not say how many there are.

    Called inside of a compiled function it runs between two graphs, as it runs outside; ``fullgraph=True`` refuses it.

    Example:
        >>> from sparseflash.flex import create_block_mask
        >>> from sparseflash import patterns as P
        >>> def sliding_window(b, h, q, k):
        ...     return (q >= k) & (q - k <= 256)
        >>> mask = create_block_mask(sliding_window, None, None, 4096, 4096, device="cpu")
        >>> mask == (P.causal() & P.local(256)).compile(4096)
        True
    """
    for keyword in unused:
        if keyword not in _KEYWORDS:
            close = get_close_matches(keyword.lower(), [known.lower() for known in _KEYWORDS], n=1)
            meant = "".join(f"; did you mean {known}?" for known in _KEYWORDS if [known.lower()] == close)
            raise TypeError(f"create_block_mask has no argument {keyword}{meant}")
    if torch.compiler.is_compiling():
        from sparseflash.integrations.untraced import made

        return made(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE)
    return _made(mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE)


def _made(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None,
    BLOCK_SIZE: int | tuple[int, int],
) -> BlockMask:
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be callable as fn(b, h, q_idx, kv_idx), got {mask_mod!r}")
    for name, size in (("B", B), ("H", H)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be an int from 1 on or None, got {size!r}")
    bq, bk = BLOCK_SIZE if isinstance(BLOCK_SIZE, tuple | list) else (BLOCK_SIZE, BLOCK_SIZE)
    block = largest_block(bq, (bq, bk)), largest_block(bk, (bq, bk))
    grid = make_grid((Q_LEN, KV_LEN), block, 0)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place = torch.device(device if device is not None else found or "cpu")
    recording = Recording.of(mask_mod, place)
    looks = recording.looks_at_sample, recording.looks_at_head
    for name, what, size, looked in zip("BH", ("sample", "query head"), (B, H), looks, strict=True):
        if looked and size is None:
            raise ValueError(
                f"mask_mod looks at {name.lower()}, the number of its {what}, but {name} is None: the mask is made "
                f"now, so say how many there are: create_block_mask(mask_mod, ..., {name}=<{what}s>)"
            )
    samples, heads = (size if size is not None and looked else 1 for size, looked in zip((B, H), looks, strict=True))
    rows = [
        stacked([_scanned(mask_mod, sample, head, grid, place) for head in range(heads)], axis=1)
        for sample in range(samples)
    ]
    mask = stacked(rows, axis=0)
    _looks[mask] = looks[0] and samples == 1, looks[1] and heads == 1
    return mask


def _mask(block_mask: Mask | FlexMask, query: Tensor, key: Tensor, biased: bool) -> Mask:
    """The mask as attention takes it."""
    if query.dim() != 4 or key.dim() != 4:
        return None  # refused by attention, in its words
    if isinstance(block_mask, FlexMask):
        if torch.compiler.is_compiling():
            from sparseflash.integrations.untraced import converted

            return converted(block_mask, query.shape[0], query.shape[1])
        return _from_torch(block_mask, query.shape[0], query.shape[1])
    if isinstance(block_mask, BlockMask):
        for name, what, one, size in zip(
            "BH", ("sample", "query head"), constant(block_mask, _made_for_one), query.shape[:2], strict=True
        ):
            if one and size > 1:
                raise ValueError(
                    f"the mask was made with {name}=1 and its mask_mod looks at {name.lower()}, but query has {size} "
                    f"{what}s: create_block_mask(mask_mod, ..., {name}={size})"
                )
    if block_mask is None and biased and query.shape[2] != key.shape[2]:
        if torch.compiler.is_compiling():
            from sparseflash.integrations.untraced import all_pairs

            return all_pairs(query.shape[2], key.shape[2])
        return _all_pairs(query.shape[2], key.shape[2])
    return block_mask


def _all_pairs(q_len: int, kv_len: int) -> BlockMask:
    """Queries counted from 0: without a mask attention would put the last query on the last key."""
    return full().compile((q_len, kv_len), block=BLOCK, q_offset=0)


def _made_for_one(mask: BlockMask) -> tuple[bool, bool]:
    found: tuple[bool, bool] = _looks.get(mask, (False, False))
    return found


@dataclass(frozen=True, eq=False)
class _Conversion:
    """One of torch's masks as it was when it was converted, and what it became."""

    mask_mod: Recording
    tables: tuple[Tensor, ...]
    sizes: tuple[object, ...]
    mask: BlockMask


def _from_torch(block_mask: FlexMask, samples: int, heads: int) -> BlockMask:
    """One of torch's masks as ours. Torch reads it at every call; so what it holds is compared at every call."""
    mask_mod = Recording.of(block_mask.mask_mod, block_mask.kv_indices.device)
    listed = (
        *(block_mask.kv_num_blocks, block_mask.kv_indices),
        *(block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    tables = tuple(table for table in listed if table is not None)
    sizes = tuple(block_mask.BLOCK_SIZE), tuple(block_mask.seq_lengths), samples, heads
    known: _Conversion | None = _converted.get(block_mask)
    if known is None or not (sizes == known.sizes and equal(tables, known.tables) and mask_mod.same(known.mask_mod)):
        copies = tuple(table.clone() for table in tables)
        known = _Conversion(mask_mod, copies, sizes, from_flex(block_mask, B=samples, H=heads))
        _converted[block_mask] = known
    return known.mask


def _scanned(mask_mod: MaskMod, sample: int, head: int, grid: Grid, device: torch.device) -> BlockMask:
    b, h = (torch.tensor(number, device=device) for number in (sample, head))

    @functools.wraps(mask_mod)
    def allows(q: Ints, k: Ints) -> Bools:
        ask: Callable[..., Tensor] = functools.partial(mask_mod, b, h)
        sides = list(zip(np.shape(q), np.shape(k), strict=True))
        for many_q, many_k in reversed(sides):  # the last one wrapped around is the first axis
            ask = torch.vmap(ask, in_dims=(None if many_q == 1 < many_k else 0, None if many_k == 1 < many_q else 0))
        once_q = tuple(axis for axis, (many_q, many_k) in enumerate(sides) if many_q == 1 < many_k)
        once_k = tuple(axis for axis, (many_q, many_k) in enumerate(sides) if many_k == 1 < many_q)
        positions = (np.ascontiguousarray(x) for x in (np.squeeze(q, once_q), np.squeeze(k, once_k)))
        with torch.no_grad():
            answer = ask(*(torch.from_numpy(x).to(device) for x in positions))
        if answer.dtype != torch.bool:
            raise TypeError(f"mask_mod must give booleans, got {answer.dtype}")
        return answer.cpu().numpy()

    # Not through the cache: it would keep what mask_mod looks into, and miss when that changes.
    mask: BlockMask = compile_pattern.__wrapped__(where(allows), grid)
    return mask
