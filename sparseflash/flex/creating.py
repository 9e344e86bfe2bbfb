"""``create_block_mask``: a ``mask_mod`` is asked once, when the mask is made."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE
from torch.nn.attention.flex_attention import create_block_mask as _create_flex_mask

from sparseflash.flex.block_mask import BlockMask
from sparseflash.flex.block_tables import Recipe
from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.integrations.scanning import fitting_block, scan
from sparseflash.patterns.grid import is_int, make_grid

_KEYWORDS = tuple(inspect.signature(_create_flex_mask).parameters)


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
        device: where the indices lie that mask_mod gets, and the tables; default the accelerator, or the CPU if there
            is none.
        BLOCK_SIZE: tokens a block side, or (queries, keys), of the tables that the mask shows. Attention itself works
            on the largest blocks of 16, 32, 64, 128, 256 that divide it, or on the largest below it; the mask is
            the same.
        _compile: no effect.
        separate_full_blocks: whether the tables list blocks without a masked pair apart.
        compute_dq_write_order: whether the mask has torch's ``dq_write_order`` (from torch 2.13 on); ours has no use
            for it, since gradients are deterministic.
        dq_kv_order: the order that is meant.
        **unknown: refused, with the argument that may be meant.

    Returns:
        A :class:`BlockMask` of shape (B or 1, H or 1, Q_LEN, KV_LEN).

    Raises:
        TypeError: an argument that torch's function has not either, a mask_mod that is not callable or gives no
            booleans, lengths or a BLOCK_SIZE that are no ints.
        ValueError: a length, block side, B or H below 1, or a mask_mod that looks at samples or heads of which B or H
            does not say how many there are.

    Called inside of a compiled function it runs between two graphs, as it runs outside; ``fullgraph=True`` refuses it.

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
        close = get_close_matches(keyword.lower(), [known.lower() for known in _KEYWORDS], n=1)
        meant = "".join(f"; did you mean {known}?" for known in _KEYWORDS if [known.lower()] == close)
        raise TypeError(f"create_block_mask has no argument {keyword}{meant}")
    order = dq_kv_order if compute_dq_write_order else None
    arguments = mask_mod, B, H, Q_LEN, KV_LEN, device, BLOCK_SIZE, separate_full_blocks, order
    if torch.compiler.is_compiling():
        from sparseflash.integrations.untraced import made

        return made(*arguments)
    return make(*arguments)


def make(
    mask_mod: MaskMod,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    device: torch.device | str | None,
    BLOCK_SIZE: int | tuple[int, int],
    separate_full_blocks: bool,
    dq_kv_order: bool | None,
) -> BlockMask:
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be callable as fn(b, h, q_idx, kv_idx), got {mask_mod!r}")
    for name, size in (("B", B), ("H", H)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be an int from 1 on or None, got {size!r}")
    if dq_kv_order is not None and (not isinstance(dq_kv_order, bool) or "dq_kv_order" not in _KEYWORDS):
        raise ValueError(f"dq_kv_order must be a bool, and needs torch 2.13, got {dq_kv_order!r}")
    side = _side(BLOCK_SIZE)
    grid = make_grid((Q_LEN, KV_LEN), (fitting_block(side[0]), fitting_block(side[1])), 0)
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
    mask = scan(mask_mod, samples, heads, grid, place)
    recipe = Recipe(mask, mask_mod, (B or 1, H or 1), side, place, separate_full_blocks, dq_kv_order)
    return BlockMask.made(recipe, (looks[0] and samples == 1, looks[1] and heads == 1))


def _side(given: object) -> tuple[int, int]:
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2 or not all(is_int(side) for side in pair):
        raise TypeError(f"BLOCK_SIZE must be an int or a pair of ints (queries, keys), got {given!r}")
    if min(pair) < 1:
        raise ValueError(f"BLOCK_SIZE must be at least 1, got {given!r}")
    return int(pair[0]), int(pair[1])


def _create_empty_block_mask(query: Tensor, key: Tensor) -> BlockMask:
    """The mask of one block of any length, as torch's function of this name makes it: no mask at all."""
    one = torch.ones(1, 1, 1, dtype=torch.int32, device=query.device)
    return BlockMask.from_kv_blocks(
        one, torch.zeros_like(one)[..., None], BLOCK_SIZE=_LARGE_SPARSE_BLOCK_SIZE, seq_lengths=(1, 1)
    )
