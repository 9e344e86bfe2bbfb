"""FlexAttention's ``BlockMask``, backed by a mask of this library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from sparseflash.flex.block_tables import Recipe, torch_tables
from sparseflash.patterns.block_mask import BlockMask as SparseMask
from sparseflash.tables.lookup import lookup
from sparseflash.tables.table import PackedTable

# The fields of torch's class in the installed version: tables, lengths, BLOCK_SIZE, mask_mod.
FIELDS = tuple(FlexMask.__annotations__)


class BlockMask(FlexMask):
    """A ``torch.nn.attention.flex_attention.BlockMask``, usable wherever torch's is, except inside torch's graphs.

    One from :func:`sparseflash.flex.create_block_mask` holds a mask of this library, with the values that ``mask_mod``
    had at that time. FlexAttention's tables (``kv_num_blocks``, ``kv_indices``, ``q_indices``, ...) are built from it
    on first access. One built from tables (the constructor, :meth:`from_kv_blocks`, indexing), or with an attribute set
    later, is read at every call, as in torch.

    Shapes: ``kv_num_blocks`` int32 [B, H, nQ], ``kv_indices`` int32 [B, H, nQ, nK]: partial blocks, in which
    ``mask_mod`` decides; ``full_kv_...``: full blocks; ``q_...``: the same by key block. ``to_dense()`` is int32
    [B, H, nQ, nK], ``shape`` is (B, H, Q_LEN, KV_LEN).

    Treat the tables of a created mask as read-only. To change them, build another mask with :meth:`from_kv_blocks`:
    eager calls notice in-place writes, but compiled functions keep using the mask as it was created.

    Raises:
        ValueError: reading tables of more than 2**28 blocks.

    Example:
        >>> import torch
        >>> from sparseflash.flex import BlockMask, create_block_mask
        >>> mask = create_block_mask(lambda b, h, q, k: q >= k, 4, 2, 512, 512, device="cpu")
        >>> mask.shape, mask.BLOCK_SIZE, mask.sparsity()
        ((4, 2, 512, 512), (128, 128), 37.5)
        >>> mask.kv_num_blocks[0, 0].tolist(), mask[0, 1].full_kv_num_blocks.flatten().tolist()
        ([1, 1, 1, 1], [0, 1, 2, 3])
        >>> from sparseflash.integrations.flex import from_flex
        >>> from_flex(mask)
        BlockMask(512 x 512 tokens, block 128 x 128, 10 of 16 blocks (62.50%; tokens 50.10%), 1 tile)
    """

    _recipe: Recipe | None
    _tables: FlexMask | None
    _versions: tuple[int, ...]
    packed: PackedTable | None  # for compiled graphs
    made_for_one: tuple[bool, bool]  # for samples and heads: made for one of them by a mask_mod that depends on it

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self._hold(FlexMask(*arguments, **named))

    def _hold(self, tables: FlexMask) -> None:
        self._recipe, self._tables, self._versions, self.packed = None, tables, (), None
        self.made_for_one = False, False

    @classmethod
    def of_torch(cls, tables: FlexMask) -> BlockMask:
        """Wrap one of torch's block masks; the tensors are shared."""
        mask = cls.__new__(cls)
        mask._hold(tables)
        return mask

    @classmethod
    def made(
        cls, recipe: Recipe | None, made_for_one: tuple[bool, bool], packed: PackedTable | None = None
    ) -> BlockMask:
        """The result of ``create_block_mask``."""
        mask = cls.__new__(cls)
        mask._recipe, mask._tables, mask._versions, mask.made_for_one = recipe, None, (), made_for_one
        if packed is None and recipe is not None:
            packed = PackedTable.of(lookup(recipe.mask, recipe.device))
            # As torch._dynamo.maybe_mark_dynamic does, without importing the compiler: tables differ in size, and a
            # graph specialised on the first one's size would be recompiled for the second.
            packed.buffer._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]
        mask.packed = packed
        return mask

    @property
    def recorded(self) -> SparseMask | None:
        """The mask of this library, if it was created from a ``mask_mod`` and not written to since."""
        recipe = self.recipe
        return None if recipe is None else recipe.mask

    @property
    def recipe(self) -> Recipe | None:
        """How the mask was created; None for a mask of tables, and once its tables were written to."""
        if self._recipe is not None and self._tables is not None and _versions(self._tables) != self._versions:
            self._hold(self._tables)
        return self._recipe

    def as_torch(self) -> FlexMask:
        """An instance of torch's own class with the same tables.

        Raises:
            ValueError: a mask from an exported program or a file, or one of more than 2**28 blocks.
        """
        if self._tables is None:
            if self._recipe is None:
                raise ValueError(
                    "this block mask came out of an exported program or a file, which do not hold FlexAttention's "
                    "tables: create it again, sparseflash.flex.create_block_mask(mask_mod, ...)"
                )
            self._tables = torch_tables(self._recipe)
            self._versions = _versions(self._tables)
        return self._tables

    def __getstate__(self) -> dict[str, Any]:
        state = dict(vars(self))
        if self.recipe is not None:  # copies build their own tables
            state["_tables"], state["_versions"] = None, ()
        return state

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, Q_LEN, KV_LEN), with 1 for a B or H that was None."""
        recipe = self.recipe
        return self.as_torch().shape if recipe is None else (*recipe.sizes, *recipe.mask.shape)

    def __getitem__(self, index: Any) -> BlockMask:
        """The mask of some samples, heads and query blocks, as torch gives it: set its ``mask_mod`` before use.

        Raises:
            IndexError: more than three indices.
        """
        if isinstance(index, tuple) and len(index) > 3:
            raise IndexError(
                f"a block mask is indexed by samples, heads and query blocks, got {len(index)} indices: "
                "to leave out keys, mask them in mask_mod"
            )
        return self.of_torch(self.as_torch()[index])

    def _adjust(self, new_q_len: int, new_kv_len: int) -> BlockMask:
        return self.of_torch(self.as_torch()._adjust(new_q_len, new_kv_len))

    def to(self, device: torch.device | str) -> BlockMask:
        """The mask on another device."""
        recipe = self.recipe
        if recipe is None:
            return self.of_torch(self.as_torch().to(device))
        return self.made(replace(recipe, device=torch.empty(0, device=device).device), self.made_for_one)


def _versions(tables: FlexMask) -> tuple[int, ...]:
    """The versions of a mask's tensors, which in-place writes increment."""
    return tuple(value._version for value in vars(tables).values() if isinstance(value, torch.Tensor))


class _Field:
    """An attribute of torch's class. Those that the recipe holds need no tables; setting one makes a mask of tables."""

    def __init__(self, name: str, told: Callable[[Recipe], Any] | None) -> None:
        self.name, self.told = name, told

    def __get__(self, mask: BlockMask | None, owner: type) -> Any:
        if mask is None:
            return self
        recipe = mask.recipe
        if recipe is not None and self.told is not None:
            return self.told(recipe)
        return getattr(mask.as_torch(), self.name)

    def __set__(self, mask: BlockMask, value: Any) -> None:
        tables = mask.as_torch()
        setattr(tables, self.name, value)
        mask._hold(tables)


_TOLD: dict[str, Callable[[Recipe], Any]] = {
    "seq_lengths": lambda recipe: recipe.mask.shape,
    "BLOCK_SIZE": lambda recipe: recipe.side,
    "mask_mod": lambda recipe: recipe.mask_mod,
}
for _name in FIELDS:
    setattr(BlockMask, _name, _Field(_name, _TOLD.get(_name)))
