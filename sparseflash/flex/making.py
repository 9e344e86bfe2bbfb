"""Build a block mask from a ``mask_mod``, on the host."""

from __future__ import annotations

import inspect

import torch
from torch.nn.attention.flex_attention import create_block_mask as _create_flex_mask

from sparseflash.flex.block_mask import BlockMask
from sparseflash.flex.block_tables import Recipe
from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.integrations.scanning import fitting_block, mask_of
from sparseflash.patterns.grid import is_int, make_grid

KEYWORDS = tuple(inspect.signature(_create_flex_mask).parameters)


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
    """Check the arguments of :func:`sparseflash.flex.create_block_mask`, and compute its result."""
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be callable as fn(b, h, q_idx, kv_idx), got {mask_mod!r}")
    for name, size in (("B", B), ("H", H)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be an int of at least 1 or None, got {size!r}")
    if dq_kv_order is not None and (not isinstance(dq_kv_order, bool) or "dq_kv_order" not in KEYWORDS):
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
                f"mask_mod reads {name.lower()}, the index of the {what}, but {name} is None: give the number of "
                f"{what}s, create_block_mask(mask_mod, ..., {name}=<{what}s>)"
            )
    samples, heads = (size if size is not None and looked else 1 for size, looked in zip((B, H), looks, strict=True))
    mask = mask_of(mask_mod, recording, samples, heads, grid, place)
    recipe = Recipe(mask, mask_mod, (B or 1, H or 1), side, place, separate_full_blocks, dq_kv_order)
    return BlockMask.made(recipe, (looks[0] and samples == 1, looks[1] and heads == 1))


def _side(given: object) -> tuple[int, int]:
    pair = tuple(given) if isinstance(given, tuple | list) else (given, given)
    if len(pair) != 2 or not all(is_int(side) for side in pair):
        raise TypeError(f"BLOCK_SIZE must be an int or a pair of ints (queries, keys), got {given!r}")
    if min(pair) < 1:
        raise ValueError(f"BLOCK_SIZE must be at least 1, got {given!r}")
    return int(pair[0]), int(pair[1])
