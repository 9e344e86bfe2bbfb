"""Our block mask of a ``mask_mod``, exact to the token; one that is not recognised is evaluated on all pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparseflash.integrations.comparisons import compared
from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.grid import BLOCK_SIZES, Grid, Ints
from sparseflash.patterns.pattern import Bools
from sparseflash.patterns.set_operations import stacked
from sparseflash.patterns.where import where


def fitting_block(side: int) -> int:
    """Our block size for one of FlexAttention's: the largest that divides it, else the largest below it.

    Example:
        >>> [fitting_block(side) for side in (128, 384, 1 << 30, 200, 48, 5)]
        [128, 128, 256, 128, 16, 16]
    """
    dividing = [block for block in BLOCK_SIZES if side % block == 0]
    if not dividing:
        return max((block for block in BLOCK_SIZES if block <= side), default=BLOCK_SIZES[0])
    return dividing[-1]


def mask_of(
    mask_mod: MaskMod, recording: Recording, samples: int, heads: int, grid: Grid, device: torch.device
) -> BlockMask:
    """The mask of a mask_mod for all samples and heads, computed one by one.

    Raises:
        TypeError: a mask_mod that does not return booleans.
    """

    def found(sample: int, head: int) -> BlockMask:
        mask = compared(recording, sample, head, grid, device)
        return _scanned(mask_mod, sample, head, grid, device) if mask is None else mask

    rows = [stacked([found(sample, head) for head in range(heads)], axis=1) for sample in range(samples)]
    return BlockMask.of(stacked(rows, axis=0))


def _scanned(mask_mod: MaskMod, sample: int, head: int, grid: Grid, device: torch.device) -> BlockMask:
    b, h = (torch.tensor(number, device=device) for number in (sample, head))

    @functools.wraps(mask_mod)
    def allows(q: Ints, k: Ints) -> Bools:
        ask: Callable[..., Tensor] = functools.partial(mask_mod, b, h)
        sides = list(zip(np.shape(q), np.shape(k), strict=True))
        for many_q, many_k in reversed(sides):  # the outermost vmap is the first axis
            ask = torch.vmap(ask, in_dims=(None if many_q == 1 < many_k else 0, None if many_k == 1 < many_q else 0))
        once_q = tuple(axis for axis, (many_q, many_k) in enumerate(sides) if many_q == 1 < many_k)
        once_k = tuple(axis for axis, (many_q, many_k) in enumerate(sides) if many_k == 1 < many_q)
        positions = (np.ascontiguousarray(x) for x in (np.squeeze(q, once_q), np.squeeze(k, once_k)))
        with torch.no_grad():
            answer = ask(*(torch.from_numpy(x).to(device) for x in positions))
        if answer.dtype != torch.bool:
            raise TypeError(f"mask_mod must return booleans, got {answer.dtype}")
        return answer.cpu().numpy()

    # Bypasses the cache, which would keep captured tensors alive and not notice when they change.
    mask: BlockMask = compile_pattern.__wrapped__(where(allows), grid)
    return mask
