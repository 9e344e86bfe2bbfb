"""Masks of tables, torch's own and ours, as attention takes them: converted when what they hold has changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.functional.attention import BLOCK
from sparseflash.integrations.flex import from_flex
from sparseflash.integrations.mask_mods import Recording, equal
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.full import full

_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Conversion:
    """A mask of tables as it was when it was converted, and what it became."""

    mask_mod: Recording
    tables: tuple[Tensor, ...]
    sizes: tuple[object, ...]
    mask: BlockMask


def all_pairs(q_len: int, kv_len: int) -> BlockMask:
    """Queries counted from 0: without a mask attention would put the last query on the last key."""
    return full().compile((q_len, kv_len), block=BLOCK, q_offset=0)


def from_torch(block_mask: FlexMask, samples: int, heads: int, lengths: tuple[int, int]) -> BlockMask:
    """A mask of tables as ours. Torch reads it at every call; so what it holds is compared at every call."""
    mask_mod = Recording.of(block_mask.mask_mod, block_mask.kv_indices.device)
    listed = (
        *(block_mask.kv_num_blocks, block_mask.kv_indices),
        *(block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    tables = tuple(table for table in listed if table is not None)
    if any(side < _LARGE_SPARSE_BLOCK_SIZE for side in block_mask.BLOCK_SIZE):
        lengths = block_mask.seq_lengths  # blocks of that size stand for one of any length
    sizes = tuple(block_mask.BLOCK_SIZE), tuple(lengths), samples, heads
    known: _Conversion | None = _converted.get(block_mask)
    if known is None or not (sizes == known.sizes and equal(tables, known.tables) and mask_mod.same(known.mask_mod)):
        copies = tuple(table.clone() for table in tables)
        asked = block_mask
        if tuple(lengths) != tuple(block_mask.seq_lengths):
            asked = FlexMask.from_kv_blocks(
                *listed,
                BLOCK_SIZE=block_mask.BLOCK_SIZE, mask_mod=block_mask.mask_mod, seq_lengths=lengths,
                compute_q_blocks=False,
            )  # fmt: skip
        known = _Conversion(mask_mod, copies, sizes, from_flex(asked, B=samples, H=heads))
        _converted[block_mask] = known
    return known.mask
