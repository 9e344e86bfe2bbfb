"""Gives a model its own copy of its config, so that a pattern is this model's alone.

Models that are made from one config object share it. Before a pattern is written, the config and its sub-configs are
therefore copied for the model, its parts, and the models that contain it (which save it, and make its masks). Modules
do not know what contains them, so these are looked for among Python's live objects.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn


def own(model: Any) -> Callable[[], None]:
    """Copy the configs of a model and of those that contain it; the returned function restores the old ones."""
    around = [model, *_around(model)]
    memo: dict[int, Any] = {}
    taken: dict[int, Any] = {}
    for part, name, config in _held(around):
        vars(part)[name] = copied = copy.deepcopy(config, memo)
        taken[id(copied)] = config

    def give_back() -> None:
        for part, name, config in _held(around):
            vars(part)[name] = taken.get(id(config), config)

    return give_back


def _around(model: Any) -> list[nn.Module]:
    """The modules with a config that contain a model."""
    inside = {id(part) for part in model.modules()}
    modules = [
        part
        for part in gc.get_objects()
        if issubclass(type(part), nn.Module) and "_modules" in vars(part) and id(part) not in inside
    ]
    return [
        part
        for part in modules
        if any(map(_is_config, vars(part).values())) and any(one is model for one in part.modules())
    ]


def _held(models: list[Any]) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module, attribute, config) for all configs that the modules of some models hold."""
    for part in {id(part): part for one in models for part in one.modules()}.values():
        for name, value in list(vars(part).items()):
            if _is_config(value):
                yield part, name, value


def _is_config(value: Any) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(value, PreTrainedConfig)
