"""Masks that the description of a batch cannot express: their bits for every pair are appended to it.

Transformers materialises every mask, O(N M); here that is done only for masks with no shorter description:
bidirectional blocks of image tokens, mask functions from users, and 4-D masks.

Shape legend: B samples, H heads or 1, N queries, M keys, W ints per row of a description, R rows of bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import MASKS
from sparseflash.patterns.set_operations import stacked

WORD = 32
# A user's mask is the same for every layer and, often, every batch: it is converted once.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def pair_by_pair(mask_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function for tensors of one shape, mapped over single pairs: some mask functions take nothing else."""

    def ask(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        one_each = torch.vmap(mask_function, in_dims=(0, None, 0, 0))
        answer: Tensor = one_each(sample.flatten(), head, query.flatten(), key.flatten())
        return answer.view(key.shape)

    return ask


def drawn(mask_function: Callable[..., Tensor], batch: int, queries: Tensor, keys: Tensor, one_by_one: bool) -> Tensor:
    """The mask, bool [B, 1, N, M], without padding."""
    sample, head = torch.arange(batch, device=keys.device), torch.zeros((), dtype=torch.long, device=keys.device)
    if not one_by_one:
        answer = mask_function(sample[:, None, None], head, queries[:, None], keys)
    else:
        for dims in ((None, None, None, 0), (None, None, 0, None), (0, None, None, None)):
            mask_function = torch.vmap(mask_function, in_dims=dims)
        answer = mask_function(sample, head, queries, keys)
    return answer.expand(batch, len(queries), len(keys))[:, None]


def with_bits(described: Tensor, allowed: Tensor) -> Tensor:
    """A description [B, 1, 1, W] followed by the bits of ``allowed`` [B, H, N, M]: int32 [B, H, 1 + R, W]."""
    (batch, heads), width = allowed.shape[:2], described.shape[-1]
    bits = allowed.cpu().flatten(2)
    bits = F.pad(bits, (0, -bits.shape[-1] % (WORD * width))).view(batch, heads, -1, width, WORD)
    words = (bits.int() << torch.arange(WORD, dtype=torch.int32)).sum(-1).int()
    return torch.cat([described.expand(-1, heads, -1, -1), words], 2)


def bits_of(rows: NDArray[np.int32], pairs: int) -> list[tuple[bytes, ...]]:
    """The bits after a description [B, H, 1 + R, W], for each sample and head; empty if there are none."""
    if rows.shape[2] == 1:
        return []
    size = -(-pairs // 8)
    return [tuple(head[1:].tobytes()[:size] for head in sample) for sample in rows]


@MASKS.bounds
@lru_cache(maxsize=64)
def mask_of(heads: tuple[bytes, ...], shape: tuple[int, int], block: int | tuple[int, int], q_offset: int) -> BlockMask:
    """The mask of one sample from its bits [N, M], one for all heads or one for each."""
    masks = []
    for bits in heads:
        flat = np.unpackbits(np.frombuffer(bits, np.uint8), count=shape[0] * shape[1], bitorder="little")
        masks.append(BlockMask.from_dense(flat.view(bool).reshape(shape), block, q_offset))
    mask = BlockMask.of(stacked(masks, axis=1))
    MASKS.spend(mask.nbytes)
    return mask


def known(mask: Tensor, made: Callable[[], Tensor], *shape: Any) -> Tensor:
    """The result of ``made`` for a user's mask, cached per tensor until it is written to."""
    if torch.compiler.is_compiling():
        return made()
    seen = (shape, -1 if mask.is_inference() else mask._version)
    if (found := _known.get(mask)) is None or found[0] != seen:
        _known[mask] = found = (seen, made())
    answer: Tensor = found[1]
    return answer
