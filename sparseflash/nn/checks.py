"""Checks of the arguments of modules. An error says what was expected, what came and what to write instead."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparseflash.functional.arguments import refuse_mask
from sparseflash.functional.attention import Mask
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.described import described
from sparseflash.patterns.grid import make_grid
from sparseflash.patterns.misuse import makes_patterns
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables.table import LookupTable

Router: TypeAlias = Callable[[Tensor, Tensor], Mask]

PREDICATE = "a predicate of positions is sparseflash.patterns.where(lambda q, k: ...)"


def checked_mask(mask: Any) -> Pattern | BlockMask | Router | None:
    """The mask of a module: parses text, and refuses callables that are not routers."""
    if isinstance(mask, str):
        return parse(mask)
    if mask is None or isinstance(mask, Pattern | BlockMask):
        return mask
    uncalled = makes_patterns(mask) or (isinstance(mask, type) and issubclass(mask, Pattern))
    if not callable(mask) or uncalled:
        refuse_mask(mask, takes="a Pattern, its text, a BlockMask, a router or None")
    if not _takes(mask, None, None):
        name = getattr(mask, "__name__", type(mask).__name__)
        raise TypeError(
            f"mask is callable and so a router, which is called as mask(q, k), but {name} takes "
            f"{inspect.signature(mask)}; {PREDICATE}"
        )
    router: Router = mask
    return router


def checked_answer(mask: Any) -> Mask:
    """The mask that a router returned."""
    if mask is None or isinstance(mask, Pattern | BlockMask | LookupTable):
        return mask
    raise TypeError(
        "the module's mask is a router, called with q and k, and must return a Pattern, BlockMask, LookupTable or "
        f"None; it returned {described(mask)}. To route, return sparseflash.routing.topk_table(q, k, ...); {PREDICATE}"
    )


def _takes(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function accepts these arguments; True if its signature is unknown."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def check_input(x: Tensor, width: int, projection: nn.Module) -> None:
    """Raise unless x is [B, N, width], floating, and of the weights' dtype where autocast does not choose it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor [batch, tokens, width={width}], got {type(x).__name__}")
    if x.dim() == 3 and x.shape[2] == width:
        if not x.is_floating_point():
            raise TypeError(f"x must be floating, got {x.dtype}; token ids go through nn.Embedding(symbols, {width})")
        weight = getattr(projection, "weight", None)
        differs = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype != x.dtype
        if differs and not torch.is_autocast_enabled(x.device.type):
            assert isinstance(weight, Tensor)
            raise TypeError(
                f"x is {x.dtype}, the module's weights are {weight.dtype}: x.to({weight.dtype}), or "
                f"module.to({x.dtype}), or call it under torch.autocast"
            )
        return
    hint = ""
    if x.dim() == 2:
        ids = not x.is_floating_point()
        hint = f"; token ids go through nn.Embedding(symbols, {width})" if ids else "; for one sample: x.unsqueeze(0)"
    raise ValueError(f"x must be [batch, tokens, width={width}], got {tuple(x.shape)}{hint}")


def checked_block(block: Any) -> tuple[int, int]:
    grid = make_grid(1, block, None)
    return grid.bq, grid.bk
