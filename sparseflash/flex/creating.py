"""``create_block_mask``: evaluates a ``mask_mod`` once, when the mask is made."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE

from sparseflash.flex.block_mask import BlockMask
from sparseflash.flex.making import KEYWORDS, make
from sparseflash.integrations.mask_mods import MaskMod


def create_block_mask(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None = None,
    BLOCK_SIZE: int | tuple[int, int] = 128,
    _compile: bool = False,
    separate_full_blocks: bool = True,
    compute_dq_write_order: bool = False,
    dq_kv_order: bool = True,
    **unknown: Any,
) -> BlockMask:
    """The block mask of a ``mask_mod``; it takes memory for stored blocks instead of for all pairs.

    A mask_mod that compares integers of the query with integers of the key, and combines such comparisons, is
    recognised from the operations that it runs: ``q >= k``, ``q - k < window``, ``(q - k).abs() <= window[h]``,
    ``ids[q] == ids[k]``, ``k < lengths[b]``, ``q // 64 == k // 64``. Its mask is made without evaluating pairs: for
    262,144 tokens in 0.04 to 0.2 s of one core (AMD EPYC, 2026-11-30). Any other mask_mod is evaluated for all pairs,
    in chunks. For long sequences a warning (``SlowScan``) then names the pattern that the mask turned out to be:
    patterns compile in time proportional to their stored blocks, and :func:`flex_attention` takes them directly.
    Samples and heads are evaluated only if the result depends on them.

    Args:
        mask_mod: ``fn(b, h, q_idx, kv_idx)`` returns booleans. As in FlexAttention it is written for single indices,
            mapped over all of them, and may index tensors on ``device``. It is evaluated now: changing these tensors
            later does not change the mask.
        B: samples, or None for one mask for all; needed if mask_mod depends on ``b``.
        H: query heads, or None for one mask for all; needed if mask_mod depends on ``h``.
        Q_LEN: queries; the first has index 0.
        KV_LEN: keys.
        device: device of the indices that mask_mod gets and of the tables; default the accelerator, or the CPU if there
            is none.
        BLOCK_SIZE: tokens per block side, or (queries, keys), of the mask's tables. Attention itself uses the largest
            of 16, 32, 64, 128, 256 that divides it, or else the largest below it; the mask is the same.
        _compile: no effect.
        separate_full_blocks: whether the tables list FULL blocks separately.
        compute_dq_write_order: whether the mask has torch's ``dq_write_order`` (from torch 2.13 on). It has no effect
            here, since gradients are always deterministic.
        dq_kv_order: the requested order.
        **unknown: refused, with the name of the closest argument.

    Returns:
        A :class:`BlockMask` of shape (B or 1, H or 1, Q_LEN, KV_LEN).

    Raises:
        TypeError: an argument that torch's function does not have either; a mask_mod that is not callable or does not
            return booleans; lengths or a BLOCK_SIZE that are not ints.
        ValueError: a length, block side, B or H below 1; a mask_mod that depends on the sample or head while B or H is
            None.

    Inside a compiled function it runs eagerly between two graphs; ``fullgraph=True`` refuses it.

    Example:
        >>> from sparseflash.flex import create_block_mask
        >>> from sparseflash import patterns as P
        >>> from sparseflash.integrations.flex import from_flex
        >>> def sliding_window(b, h, q, k):
        ...     return (q >= k) & (q - k <= 256)
        >>> block_mask = create_block_mask(sliding_window, None, None, 4096, 4096, device="cpu")
        >>> from_flex(block_mask) == (P.causal() & P.local(256)).compile(4096)
        True
    """
    for keyword in unknown:
        close = get_close_matches(keyword.lower(), [known.lower() for known in KEYWORDS], n=1)
        meant = "".join(f"; did you mean {known}?" for known in KEYWORDS if [known.lower()] == close)
        raise TypeError(f"create_block_mask has no argument {keyword}{meant}")
    order = dq_kv_order if compute_dq_write_order else None
    arguments = mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, separate_full_blocks, order
    if torch.compiler.is_compiling():
        from sparseflash.integrations.untraced import made

        return made(*arguments)
    return make(*arguments)


def _create_empty_block_mask(query: Tensor, key: Tensor) -> BlockMask:
    """One block of any length, as torch's function of this name makes it: it masks nothing."""
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    return BlockMask.from_kv_blocks(
        one, torch.zeros_like(one)[..., None], BLOCK_SIZE=_LARGE_SPARSE_BLOCK_SIZE, seq_lengths=(1, 1)
    )
