"""A recipe as the text of a preset: the inverse of `load_preset`."""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from sparseflash.patterns.shown import UNSEEN
from sparseflash.train.config import TrainConfig

_ESCAPED = re.compile(f"[{UNSEEN}]")


def preset_text(config: TrainConfig, summary: str) -> str:
    """TOML that `load_preset` reads back as the same recipe.

    Args:
        config: the recipe.
        summary: a one-line description.

    Example:
        >>> from sparseflash.train import recipe
        >>> print(preset_text(recipe("listops", imports=("mine",)), "ours")[:33])
        task = "listops"
        summary = "ours"
    """
    fields = _plain(config)
    model, stages = fields.pop("model"), fields.pop("stages")
    imports = fields.pop("imports")
    lines = [f"task = {_value(fields.pop('task'))}", f"summary = {_value(summary)}", *_lines(fields)]
    if imports:
        lines += ["", "[patterns]", f"import = {_value(imports)}"]
    lines += ["", "[model]", *_lines(model)]
    for stage in stages:
        # All stages of a sequence task have the same task.
        stage.pop("task", None)
        geometry = stage.pop("geometry", None)
        lines += ["", "[[stages]]", *_lines(stage)]
        if geometry is not None:
            lines += ["", "[stages.geometry]", *_lines(geometry)]
    return "\n".join(lines) + "\n"


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The fields as plain data, without those that are None, which is their default and which TOML cannot write."""

    def without_none(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: without_none(one) for name, one in value.items() if one is not None}
        return [without_none(one) for one in value] if isinstance(value, list | tuple) else value

    plain: dict[str, Any] = without_none(dataclasses.asdict(config))
    return plain


def _lines(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_value(value)}" for name, value in fields.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are valid in TOML; control characters are escaped too.
        return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_lines(value)) + " }"
    return "[" + ", ".join(map(_value, value)) + "]"
