"""Checks whole models: patterns that no layer reads, misspelt keys, models that never call the attention interface.

Transformers calls an attention function from a model's layers, if at all. A model that computes attention itself, or
whose pattern is in a config that no layer reads, would silently run dense, and the function that could complain is
never called. ``register`` therefore wraps two public methods of ``PreTrainedModel``: ``__init__`` and
``set_attn_implementation``. Models of other implementations are checked once, for a pattern that would be ignored. Ours
are examined before their first forward pass, when all of their parts exist.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any

import torch
from torch import nn

from sparseflash.integrations.transformers.alibi import is_served, serve
from sparseflash.integrations.transformers.attention import (
    CALLS,
    CROSSES,
    NAME,
    SERVED,
    attending,
    crosses,
    has_cross,
    has_two_sides,
    may_cross,
    side_of,
)
from sparseflash.integrations.transformers.falcon import is_falcon
from sparseflash.integrations.transformers.patches import mark_patches

KEYS = ("block_sparse_pattern", "block_sparse_block")
MARK = "_block_sparse_watched"
SWITCH = "set_attn_implementation"
EXAMINED = "_block_sparse_examined"
INSTEAD = 'use attn_implementation="eager" or "sdpa"'
# How a module of Transformers calls its attention and makes its mask; how it defines its own attention.
_ASKS = re.compile(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface|\.get_interface\(")
_ASKS_FOR_MASKS = re.compile(r"\bcreate_\w*mask\w*\(")
_ATTENDS = re.compile(r"^class \w*Attention\w*\(.*Module\):", re.MULTILINE)
# Parts of an attention module that select keys for its queries, or replace them.
_SELECTS = re.compile(r"Indexer|Compressor")
_SELECTED = re.compile(r"\b(\w*indices)=(?!=)")
_CROSSING = re.compile(r"cross_?att|enc_?dec_?att|encoder_att", re.IGNORECASE)
_CHOOSES_BY_NAME = re.compile(r"ATTENTION_CLASSES\[")


def watch() -> None:
    """Check models that are made or switched from now on. Calling it again changes nothing."""
    from transformers import PreTrainedModel

    if hasattr(PreTrainedModel.__init__, MARK):
        return
    switch = _preceded(PreTrainedModel.set_attn_implementation, _serve)
    for name, method, after in (("__init__", PreTrainedModel.__init__, _made), (SWITCH, switch, _switched)):
        setattr(PreTrainedModel, name, _followed(method, after))


def _followed(method: Callable[..., Any], after: Callable[..., None]) -> Callable[..., Any]:
    @wraps(method)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        after(self, *args, **kwargs)
        return result

    setattr(watched, MARK, True)
    return watched


def _preceded(method: Callable[..., Any], before: Callable[..., None]) -> Callable[..., Any]:
    @wraps(method)
    def preceded(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self, *args, **kwargs)
        return method(self, *args, **kwargs)

    return preceded


class _Warned(threading.local):
    """The config that was last warned about: a model and its base model are made from the same one."""

    last: weakref.ref[Any] | None = None

    def of(self, config: Any) -> bool:
        before = self.last is not None and self.last() is config
        self.last = weakref.ref(config)
        return before


_warned = _Warned()


def _made(model: Any, *args: Any, **kwargs: Any) -> None:
    config = model.config
    if config._attn_implementation == NAME:
        refuse_misspelt(config)
        served, source = serve(model), _source_around(type(model))
        if not served and _CHOOSES_BY_NAME.search(source) and not _ASKS.search(source):
            raise ValueError(_foreign(model))
        _look_before_forward(model)
    elif (pattern := getattr(config, KEYS[0], None)) is not None and not _warned.of(config):
        warnings.warn(
            f"the config of {type(model).__name__} has block_sparse_pattern={pattern!r}, but its attention is "
            f"{config._attn_implementation!r}, which does not support patterns: load it with "
            'attn_implementation="block_sparse", or with sparseflash.integrations.transformers.from_pretrained',
            stacklevel=_outside(),
        )


def _serve(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    exchanged = attn_implementation in (NAME, "eager", *(["sdpa"] if is_falcon(model.config) else []))
    if exchanged and serve(model):  # Transformers would not switch it, and would warn
        for _, part in _configs(model.config):  # no model has MPT's attn_config, which is a sub-config
            part._attn_implementation_internal = attn_implementation


def _switched(model: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    if attn_implementation == NAME and model.config._attn_implementation != NAME:
        raise ValueError(_foreign(model))
    if model.config._attn_implementation == NAME:
        refuse_misspelt(model.config)
        _look_before_forward(model)


def _foreign(model: Any, more: str = "") -> str:
    return (
        f"{type(model).__name__} mixes its tokens on its own and never asks for block_sparse attention{more}: {INSTEAD}"
    )


def _outside() -> int:
    """The number of frames up to the caller of Transformers, so that a warning points at their line."""
    depth, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("transformers", "sparseflash"):
        depth, frame = depth + 1, frame.f_back
    return depth - 1


def refuse_misspelt(config: Any) -> None:
    """Raise for entries of a config, or of its sub-configs, that look like misspelt ones of ours.

    Raises:
        ValueError: an entry that begins like ours, or is spelt nearly so.
    """
    for where, part in _configs(config):
        for key in vars(part):
            if key in KEYS or key.startswith("_"):
                continue
            meant = get_close_matches(key.lower(), KEYS, n=1, cutoff=0.8)
            if meant or key.lower().startswith(("block_sparse_", "blocksparse_")):
                options = f"did you mean {meant[0]}?" if meant else f"the entries are {' and '.join(KEYS)}"
                raise ValueError(f"{where}.{key} is not an entry that block_sparse reads: {options}")


def _configs(config: Any, where: str = "config") -> Iterator[tuple[str, Any]]:
    yield where, config
    for name in getattr(config, "sub_configs", None) or ():
        if (part := getattr(config, name, None)) is not None:
            yield from _configs(part, f"{where}.{name}")


def copies(model: Any) -> list[Any]:
    """Configs of a model's parts that are copies of its own, such as those of T5's stacks; users do not edit these."""
    listed, kind = {id(part) for _, part in _configs(model.config)}, type(model.config.get_text_config())
    held = {id(part.config): part.config for part in model.modules() if isinstance(getattr(part, "config", None), kind)}
    return [config for key, config in held.items() if key not in listed]


def _look_before_forward(model: Any) -> None:
    if MARK not in vars(model):
        setattr(model, MARK, True)
        model.register_forward_pre_hook(_before_forward, with_kwargs=True)
        model.register_forward_hook(_after_forward, always_call=True)


def _before_forward(model: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():  # sources cannot be read while tracing
        return
    CALLS.begin(kwargs.get("position_ids"))
    if vars(model).get(EXAMINED) != _state(model):
        examine(model)
        for part in model.modules():
            if MARK in vars(part):
                setattr(part, EXAMINED, _state(part))


def _after_forward(model: Any, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        CALLS.end()


def _state(model: Any) -> tuple[Any, ...]:
    """What an examination depends on and users may change."""
    return tuple(
        (part._attn_implementation, repr(getattr(part, KEYS[0], None)), len(vars(part)))
        for _, part in _configs(model.config)
    )


def examine(model: Any) -> None:
    """Raise for a model with which block_sparse would not do what its config says.

    Raises:
        ValueError: a misspelt entry; a part that takes our masks but not our attention; a part that selects keys
            itself; a pattern that no attention module reads.
    """
    if model.config._attn_implementation != NAME:
        return
    refuse_misspelt(model.config)
    mark_crossing(model)
    for part in model.modules():
        around = _source_around(type(part)) if MARK in vars(part) and not is_served(type(part)) else ""
        if _ATTENDS.search(around) and _ASKS_FOR_MASKS.search(around) and not _ASKS.search(around):
            raise ValueError(_foreign(part))
    readers = [part for part in model.modules() if _asks(type(part)) and hasattr(part, "config")]
    for reader in readers:
        for name, child in reader.named_children():
            if _SELECTS.search(type(child).__name__):
                handed = "".join(
                    f", as {keyword}=" for keyword in sorted(set(_SELECTED.findall(_source(type(reader)))))
                )
                raise ValueError(
                    f"{type(reader).__name__} selects keys itself (its {name}{handed}), which block_sparse would not "
                    f"read: {INSTEAD}"
                )
    patterns = [(where, part) for where, part in _configs(model.config) if _pattern(part) is not None]
    mark_patches(model, readers)
    if not patterns:
        return
    if not readers:
        if all(map(_known, {type(part) for part in model.modules()})):
            raise ValueError(_foreign(model, "; its block_sparse_pattern would have no effect"))
        return
    for module in attending(model):
        if _pattern(module.config) is not None and not any(_asks(type(part)) for part in module.modules()):
            raise ValueError(_foreign(module, "; its block_sparse_pattern would have no effect"))
    for where, part in patterns:
        if all(_pattern(reader.config) != _pattern(part) for reader in readers):
            read = {id(reader.config) for reader in readers}
            places = [place for place, other in _configs(model.config) if id(other) in read] or ["another config"]
            raise ValueError(
                f"{type(model).__name__} does not read {where}.block_sparse_pattern: its attention reads "
                f"{' and '.join(places)}; set it there, or call use_pattern(model, ...)"
            )
    decodes = any(side_of(reader) == "decoder" for reader in readers)  # an encoder alone never has cross-attention
    if decodes and not any(map(crosses, readers)) and any(has_cross(part) for _, part in patterns):
        raise ValueError(
            f"{type(model).__name__} never asks for block_sparse cross-attention, so its pattern for "
            f'"cross" would have no effect: leave it out, or {INSTEAD}'
        )
    if (alone := _computing(model, model.config)) is not None:
        half = (
            'give the decoder alone one, {"decoder": ...}, or '
            if has_two_sides(model.config) and attending(model)
            else ""
        )
        raise ValueError(
            f"{type(alone).__name__} of {type(model).__name__} computes its attention itself and would not read its "
            f"pattern: {half}{INSTEAD}"
        )


def _computing(module: nn.Module, config: Any) -> nn.Module | None:
    """A module that computes attention itself although the config has a pattern for it."""
    config = getattr(module, "config", config)
    pattern = _pattern(config)
    if isinstance(pattern, Mapping):
        pattern = pattern.get(side_of(module))
    kind = type(module)
    if pattern is not None and "Attention" in kind.__name__ and "softmax(" in _source(kind) and not _asks(kind):
        return module
    return next((found for child in module.children() if (found := _computing(child, config)) is not None), None)


def mark_crossing(model: Any) -> None:
    """Mark every attention module as cross-attention or not.

    Models declare their cross-attention for recording attention weights, by class or by part of the path. For models
    that do not, the path contains a word for cross-attention, or for the encoder inside a layer.
    """
    named: list[Any] = []
    for part in model.modules():
        kinds = (getattr(part, "_can_record_outputs", None) or {}).get("cross_attentions")
        named += kinds if isinstance(kinds, list | tuple) else [kinds]
    told = [
        (getattr(kind, "target_class", kind), (getattr(kind, "layer_name", None) or "").strip("."))
        for kind in named
        if kind is not None
    ]
    for path, module in model.named_modules():
        if not _asks(type(module)):
            continue
        found = any(isinstance(kind, type) and isinstance(module, kind) and where in path for kind, where in told)
        # Once found, it stays so, also when only a part of the model is examined.
        found = found or bool(_CROSSING.search(path)) or crosses(module)
        # Compiled graphs guard on this attribute, so it is not set on modules that cannot be cross-attention.
        if found or may_cross(module):
            setattr(module, CROSSES, found)


def _pattern(config: Any) -> Any:
    return getattr(config, KEYS[0], None)


def _asks(kind: type[nn.Module]) -> bool:
    """Whether modules of a class get the attention that the config names from Transformers."""
    # The base classes of all models mention the interface without calling it.
    general = ("torch", "transformers.modeling_utils")
    asks = (_ASKS.search(_source(base)) for base in kind.__mro__ if not base.__module__.startswith(general))
    return hasattr(kind, SERVED) or any(asks)


def _known(kind: type[nn.Module]) -> bool:
    return kind.__module__.split(".")[0] == "torch" or bool(_source(kind))


_texts: dict[object, str] = {}  # source texts by class or module name; getting one takes milliseconds


def _source(kind: type) -> str:
    """The source of a class; empty if there is none."""
    if kind.__module__ == "builtins":
        return ""
    return _text(kind, kind)


def _source_around(kind: type) -> str:
    """The source of the Python module of a class; empty if there is none."""
    return _text(kind.__module__, sys.modules.get(kind.__module__))


def _text(key: object, of: Any) -> str:
    if key not in _texts:
        try:
            _texts[key] = inspect.getsource(of)
        except (OSError, TypeError):
            _texts[key] = ""
    return _texts[key]
