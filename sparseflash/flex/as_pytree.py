"""``BlockMask`` as a pytree, so that ``torch.export`` and other transforms that flatten arguments accept it.

A mask from ``create_block_mask`` has the two tensors of its packed table as leaves, so one program serves all masks. A
mask built from FlexAttention tables has those tables as leaves.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.utils._pytree import GetAttrKey, register_pytree_node

from sparseflash.flex.block_mask import FIELDS, BlockMask
from sparseflash.flex.block_tables import Recipe
from sparseflash.tables.table import PackedTable


class _Made:
    """The context of a mask from ``create_block_mask``. Masks with equal `made_for_one` compare equal."""

    def __init__(self, recipe: Recipe | None, made_for_one: tuple[bool, bool]) -> None:
        self.recipe, self.made_for_one = recipe, made_for_one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Made) and self.made_for_one == other.made_for_one

    def __hash__(self) -> int:
        return hash(self.made_for_one)


Context = _Made | tuple[tuple[str, Any], ...]


def flatten(mask: BlockMask) -> tuple[list[Any], Context]:
    """The tensors of a mask, and everything else that :func:`unflatten` needs."""
    recipe, packed = mask.recipe, mask.packed
    if packed is not None:
        return list(packed), _Made(recipe, mask.made_for_one)
    values = {name: getattr(mask, name) for name in FIELDS}
    leaves = [value for value in values.values() if isinstance(value, torch.Tensor)]
    return leaves, tuple((k, None if isinstance(v, torch.Tensor) else (v,)) for k, v in values.items())


def unflatten(leaves: Any, context: Context) -> BlockMask:
    """The mask of these leaves; the inverse of :func:`flatten`."""
    if isinstance(context, _Made):
        buffer, layout = leaves
        return BlockMask.made(context.recipe, context.made_for_one, PackedTable(buffer, layout))
    rest = iter(leaves)
    return BlockMask.of_torch(FlexMask(**{name: next(rest) if told is None else told[0] for name, told in context}))


def with_keys(mask: BlockMask) -> tuple[list[tuple[GetAttrKey, Any]], Context]:
    """As :func:`flatten`, with the attribute name of each leaf."""
    leaves, context = flatten(mask)
    names = PackedTable._fields if isinstance(context, _Made) else [name for name, told in context if told is None]
    return [(GetAttrKey(name), leaf) for name, leaf in zip(names, leaves, strict=True)], context


def dumped(context: Context) -> str:
    """The context as JSON, for a saved program.

    Raises:
        TypeError: a mask built from tables, which needs its mask_mod.
    """
    if not isinstance(context, _Made):
        raise TypeError(
            "a block mask built from tables holds its mask_mod, which cannot be saved to a file: "
            "export with one from sparseflash.flex.create_block_mask"
        )
    return json.dumps(context.made_for_one)


def loaded(text: str) -> Context:
    """The context of :func:`dumped` text."""
    sample, head = json.loads(text)
    return _Made(None, (bool(sample), bool(head)))


register_pytree_node(
    BlockMask,
    flatten,
    unflatten,
    serialized_type_name="sparseflash.flex.BlockMask",
    to_dumpable_context=dumped,
    from_dumpable_context=loaded,
    flatten_with_keys_fn=with_keys,  # type: ignore[arg-type]
)
