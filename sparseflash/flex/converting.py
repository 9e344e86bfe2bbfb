"""Convert masks built from FlexAttention tables, torch's own and ours; again whenever their contents change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention.flex_attention import _LARGE_SPARSE_BLOCK_SIZE
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.flex.block_mask import BlockMask as FlexBlockMask
from sparseflash.functional.attention import BLOCK, Mask
from sparseflash.integrations.flex import from_flex
from sparseflash.integrations.mask_mods import Recording, equal
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.full import full
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables.table import LookupTable, PackedTable

_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True, eq=False)
class _Conversion:
    """The contents of a mask of tables when it was converted, and the result."""

    mask_mod: Recording
    tables: tuple[Tensor, ...]
    sizes: tuple[object, ...]
    mask: BlockMask


def check_made_for(block_mask: object, query: Tensor) -> None:
    """Raise ValueError if query has several samples or heads, and the mask depends on them but was made for one."""
    if not isinstance(block_mask, FlexBlockMask) or block_mask.packed is None:
        return
    for name, what, one, size in zip(
        "BH", ("sample", "query head"), block_mask.made_for_one, query.shape[:2], strict=True
    ):
        if one and size > 1:
            raise ValueError(
                f"the mask was created with {name}=1 and its mask_mod reads {name.lower()}, but query has {size} "
                f"{what}s: create_block_mask(mask_mod, ..., {name}={size})"
            )


def host_mask(block_mask: Mask | FlexMask, query: Tensor, key: Tensor, what: str) -> BlockMask:
    """The mask of a call as a BlockMask, whose blocks can be listed on the host; ``what`` names the user in errors.

    Raises:
        NotImplementedError: a LookupTable, whose blocks are on the device.
    """
    lengths = int(query.shape[2]), int(key.shape[2])
    check_made_for(block_mask, query)
    if isinstance(block_mask, FlexBlockMask) and block_mask.recorded is not None:
        return block_mask.recorded
    if isinstance(block_mask, LookupTable | PackedTable) or getattr(block_mask, "packed", None) is not None:
        raise NotImplementedError(
            f"{what} cannot use a LookupTable, whose blocks are on the device: give flex_attention the mask that it "
            "was built from"
        )
    if isinstance(block_mask, FlexMask):
        return from_torch(block_mask, int(query.shape[0]), int(query.shape[1]), lengths)
    if block_mask is None:
        return all_pairs(*lengths)
    pattern = parse(block_mask) if isinstance(block_mask, str) else block_mask
    return pattern.compile(lengths, block=BLOCK) if isinstance(pattern, Pattern) else pattern


def all_pairs(q_len: int, kv_len: int) -> BlockMask:
    """All pairs, with queries counted from 0: otherwise attention aligns the last query with the last key."""
    return full().compile((q_len, kv_len), block=BLOCK, q_offset=0)


def from_torch(block_mask: FlexMask, samples: int, heads: int, lengths: tuple[int, int]) -> BlockMask:
    """Convert a mask of tables to ours. Torch reads its contents at every call, so they are compared at every call."""
    mask_mod = Recording.of(block_mask.mask_mod, block_mask.kv_indices.device)
    listed = (
        *(block_mask.kv_num_blocks, block_mask.kv_indices),
        *(block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    tables = tuple(table for table in listed if table is not None)
    if any(side < _LARGE_SPARSE_BLOCK_SIZE for side in block_mask.BLOCK_SIZE):
        lengths = block_mask.seq_lengths  # a block of at least that size stands for any length
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
