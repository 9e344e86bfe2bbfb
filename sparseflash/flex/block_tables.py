"""Build FlexAttention's tables of block indices from a mask of ours, for programs that read them.

Shape legend: B samples, H heads, nQ x nK blocks of FlexAttention, each of S0 x S1 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import flex_attention as torchs
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from sparseflash.integrations.flex import LARGEST_TABLE
from sparseflash.integrations.mask_mods import MaskMod
from sparseflash.patterns.block_mask import BlockMask as SparseMask
from sparseflash.patterns.runs import FULL

EMPTY, PARTIAL, WHOLE = range(3)


@dataclass(frozen=True, eq=False)
class Recipe:
    """The arguments of ``create_block_mask``, and the mask that it computed."""

    mask: SparseMask
    mask_mod: MaskMod
    sizes: tuple[int, int]  # (B, H) as FlexAttention counts them, even if the mask does not depend on them
    side: tuple[int, int]  # BLOCK_SIZE, which need not be one of our block sizes
    device: torch.device
    separate_full_blocks: bool = True
    dq_kv_order: bool | None = None  # of the metadata of torch's deterministic backward; None: not requested


def torch_tables(recipe: Recipe) -> FlexMask:
    """The mask as torch's ``create_block_mask`` returns it.

    Raises:
        ValueError: more than 2**28 blocks over all samples and heads.
    """
    (samples, heads), (s0, s1), (q_len, kv_len) = recipe.sizes, recipe.side, recipe.mask.shape
    blocks = -(-q_len // s0), -(-kv_len // s1)
    if samples * heads * blocks[0] * blocks[1] > LARGEST_TABLE:
        raise ValueError(
            f"FlexAttention's tables would have {samples} x {heads} x {blocks[0]:,} x {blocks[1]:,} entries, more than "
            f"{LARGEST_TABLE:,}: use a larger BLOCK_SIZE, or the mask of "
            "sparseflash.integrations.flex.from_flex(block_mask)"
        )
    kinds = _kinds(recipe.mask, (s0, s1))
    if not recipe.separate_full_blocks:
        kinds = np.minimum(kinds, PARTIAL)
    kinds = np.broadcast_to(kinds, (samples, heads, *blocks))
    with torch.inference_mode(False):
        partial = _ordered(kinds == PARTIAL, recipe.device)
        full = _ordered(kinds == WHOLE, recipe.device) if recipe.separate_full_blocks else (None, None)
        tables = FlexMask.from_kv_blocks(
            partial[0],
            partial[1],
            full[0],
            full[1],
            BLOCK_SIZE=recipe.side,
            mask_mod=recipe.mask_mod,
            seq_lengths=recipe.mask.shape,
        )
        return tables if recipe.dq_kv_order is None else _with_write_order(tables, recipe.dq_kv_order)


def _with_write_order(tables: FlexMask, dq_kv_order: bool) -> FlexMask:
    asked: Any = torchs._compute_dq_write_order_from_block_mask
    tables.dq_write_order, tables.dq_write_order_full = asked(tables, dq_kv_order=dq_kv_order)
    tables.dq_kv_order_spt = dq_kv_order
    return tables


def _kinds(mask: SparseMask, side: tuple[int, int]) -> NDArray[np.uint8]:
    """The kind of each of FlexAttention's blocks, uint8 [B or 1, H or 1, nQ, nK].

    As in torch, a block that reaches past the last token is PARTIAL.
    """
    if side[0] % mask.block[0] == 0 == side[1] % mask.block[1]:
        rows, cols, codes = mask.runs.blocks()
        cells = np.zeros((mask.patterns * mask.grid_shape[0], mask.grid_shape[1]), np.uint8)
        cells[rows, cols] = np.where(codes == FULL, WHOLE, PARTIAL)
        cells = cells.reshape(mask.patterns, *mask.grid_shape)[mask.pattern_of]
        return _coarser(cells, (side[0] // mask.block[0], side[1] // mask.block[1]))
    dense = mask.to_dense().reshape(*mask.pattern_of.shape, *mask.shape)
    return _coarser(dense.astype(np.uint8) * WHOLE, side)


def _coarser(cells: NDArray[np.uint8], by: tuple[int, int]) -> NDArray[np.uint8]:
    """Kinds of blocks of ``by`` cells of [..., n, m]: WHOLE or EMPTY if all of its cells are, else PARTIAL."""
    n, m = cells.shape[-2:]
    by = min(by[0], n + 1), min(by[1], m + 1)  # one padding cell is enough to make a larger block PARTIAL
    rows, cols = -(-n // by[0]), -(-m // by[1])
    padded = np.zeros((*cells.shape[:2], rows * by[0], cols * by[1]), np.uint8)
    padded[..., :n, :m] = cells
    parts = padded.reshape(*cells.shape[:2], rows, by[0], cols, by[1])
    some, all_ = (parts != EMPTY).any((3, 5)), (parts == WHOLE).all((3, 5))
    kinds: NDArray[np.uint8] = some.astype(np.uint8) + all_
    return kinds


def _ordered(chosen: NDArray[np.bool_], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts [B, H, nQ] and indices [B, H, nQ, nK], int32: the chosen blocks first, each part in ascending order."""
    counts = chosen.sum(-1, dtype=np.int32)
    columns = np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32)
    return torch.from_numpy(counts).to(device), torch.from_numpy(columns).to(device)
