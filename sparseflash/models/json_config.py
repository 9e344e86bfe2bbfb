"""The common base of model configs: JSON and bounds."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Protocol, Self

from sparseflash.patterns.shown import shown
from sparseflash.utils.untrusted import check_field_types, parse_json

# Limits for configs, which may be untrusted, checked before anything is allocated.
MOST = {"width": 1 << 16, "heads": 1 << 12, "layers": 1 << 10, "mlp_width": 1 << 18, "classes": 1 << 20}


class LayerShape(Protocol):
    """The fields of a config that a transformer layer needs."""

    @property
    def width(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def mlp_width(self) -> int: ...


class JsonConfig:
    """A dataclass of plain fields that is written to JSON and read back, checked."""

    def to_json(self) -> str:
        """The config as indented JSON."""
        assert dataclasses.is_dataclass(self)
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that `to_json` wrote.

        Raises:
            ValueError: not JSON, not an object, or fields that are missing, unknown or out of range.
        """
        try:
            fields = parse_json(text)
        except ValueError as error:
            raise ValueError(f"a model config must be JSON; {shown(error)}") from None
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """The config with these fields, and defaults for the others."""
        assert dataclasses.is_dataclass(cls)
        if not isinstance(fields, dict):
            raise ValueError(f"a model config must be a JSON object; got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"a model config has no field {', '.join(map(repr, unknown))}; known: {sorted(known)}")
        try:
            return cls(**check_field_types(cls, fields))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"a model config field is missing or has the wrong type: {shown(error)}") from None
