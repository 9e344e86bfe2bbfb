"""``create_block_mask``, which evaluates a ``mask_mod`` once."""

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
    """Create the block mask of a ``mask_mod``; memory is proportional to its stored blocks, not to all pairs.

    A mask_mod that combines comparisons between integers of the query and integers of the key is recognised from the
    operations that it runs: ``q >= k``, ``q - k < window``, ``(q - k).abs() <= window[h]``, ``ids[q] == ids[k]``,
    ``k < lengths[b]``, ``q // 64 == k // 64``. Its mask is computed without evaluating pairs: for 262,144 tokens in
    0.04 to 0.2 s of one core (AMD EPYC, 2026-11-30). Any other mask_mod is evaluated on all pairs, in chunks. For long
    sequences a warning (``SlowScan``) then names the pattern that gives the same mask: patterns compile in time
    proportional to their stored blocks, and :func:`flex_attention` accepts them. Samples and heads are evaluated
    separately only if the result depends on them.

    Args:
        mask_mod: ``fn(b, h, q_idx, kv_idx)`` returns booleans; as for FlexAttention it is written for single indices,
            mapped over all of them, and may read tensors on ``device``. It is evaluated now: later changes to those
            tensors do not change the mask.
        B: samples, or None for one mask for all; required if mask_mod reads ``b``.
        H: query heads, or None for one mask for all; required if mask_mod reads ``h``.
        Q_LEN: number of queries; the first has index 0.
        KV_LEN: number of keys.
        device: of the indices passed to mask_mod, and of the tables; default the accelerator, or the CPU if there is
            none.
        BLOCK_SIZE: tokens per block side, or (queries, keys), of the tables that the mask shows. Attention itself works
            on the largest blocks of 16, 32, 64, 128, 256 that divide it, or on the largest below it; the mask is
            the same.
        _compile: no effect.
        separate_full_blocks: whether the tables list full blocks separately.
        compute_dq_write_order: whether the mask gets torch's ``dq_write_order`` (from torch 2.13 on); not used here,
            since gradients are always deterministic.
        dq_kv_order: the order that ``dq_write_order`` describes.
        **unknown: refused; the error names the argument that was probably meant.

    Returns:
        A :class:`BlockMask` of shape (B or 1, H or 1, Q_LEN, KV_LEN).

    Raises:
        TypeError: an argument that torch's function does not have either, a mask_mod that is not callable or does not
            return booleans, lengths or a BLOCK_SIZE that are not ints.
        ValueError: a length, block side, B or H below 1, or a mask_mod that reads ``b`` or ``h`` while B or H is None.

    Inside a compiled function it causes a graph break and runs eagerly; ``fullgraph=True`` refuses it.

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
    """A mask of one block of any length that hides nothing, as from torch's function of this name."""
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    return BlockMask.from_kv_blocks(
        one, torch.zeros_like(one)[..., None], BLOCK_SIZE=_LARGE_SPARSE_BLOCK_SIZE, seq_lengths=(1, 1)
    )
