"""What a pixel transformer is made of, as data: round-trips through JSON, with the pattern expressions in it."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sparseflash.ordering import ORDERS
from sparseflash.patterns import Pattern, parse


@dataclasses.dataclass(frozen=True)
class PixelTransformerConfig:
    """The shape of a `PixelTransformer`. It names no image size: positions are relative, patterns are size-free.

    Attributes:
        pattern: the textual form of the attention pattern, one for all layers or one for each of them.
        block: (BQ, BK) at which patterns are compiled.
        order: the order in which pixels become tokens, see `sparseflash.ordering.token_order`.
        tile: height and width of a tile in pixels; used by order ``"tile"`` alone.
        width: size of the residual stream.
        heads: attention heads; the head dim ``width / heads`` must be a multiple of 4 (two axes, pairs of numbers).
        layers: how many layers, each with its own weights.
        mlp_width: hidden size of the MLP.
        classes: outputs of the classification head.
        dense_classes: outputs of the dense head, for each lit pixel; 0 leaves the head out.
        wavelengths: shortest and longest wavelength of the rotary positions, in pixels.
        grey_levels: anchors of the grey-value embedding; values between two anchors are interpolated.
        lit_above: a pixel is lit if its grey value (0..255) is above this one.

    Raises:
        ValueError: a field out of range, or a pattern that does not parse.

    Example:
        >>> config = PixelTransformerConfig(pattern="local(64) | butterfly(unit=64)", width=32, heads=2)
        >>> PixelTransformerConfig.from_json(config.to_json()) == config
        True
    """

    pattern: str | tuple[str, ...] = "full()"
    block: tuple[int, int] = (128, 128)
    order: str = "morton"
    tile: tuple[int, int] = (8, 8)
    width: int = 64
    heads: int = 2
    layers: int = 4
    mlp_width: int = 256
    classes: int = 2
    dense_classes: int = 0
    wavelengths: tuple[float, float] = (4.0, 80.0)
    grey_levels: int = 9
    lit_above: int = 31

    def __post_init__(self) -> None:
        if isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("block", "tile", "wavelengths"):
            value = getattr(self, name)
            if len(value) != 2:
                raise ValueError(f"{name} must have two entries; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("width", "heads", "layers", "mlp_width", "classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)!r}")
        if self.dense_classes < 0:
            raise ValueError(f"dense_classes must be 0 or more; got {self.dense_classes!r}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width / heads must be a multiple of 4; got width={self.width!r} and heads={self.heads!r}"
            )
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {self.order!r}")
        shortest, longest = self.wavelengths
        if not 0 < shortest <= longest:
            raise ValueError(f"wavelengths must be 0 < shortest <= longest; got {self.wavelengths!r}")
        if not 2 <= self.grey_levels <= 255:
            raise ValueError(f"grey_levels must be in 2..255; got {self.grey_levels!r}")
        if not 0 <= self.lit_above <= 254:
            raise ValueError(f"lit_above must be in 0..254; got {self.lit_above!r}")
        if isinstance(self.pattern, tuple) and len(self.pattern) != self.layers:
            raise ValueError(
                f"pattern must be one expression or one for each of the {self.layers} layers; got {len(self.pattern)}"
            )
        self.patterns()

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.width // self.heads

    def patterns(self) -> tuple[Pattern, ...]:
        """The parsed pattern of each layer."""
        texts = (self.pattern,) * self.layers if isinstance(self.pattern, str) else self.pattern
        return tuple(parse(text) for text in texts)

    def to_json(self) -> str:
        """The config as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "PixelTransformerConfig":
        """The config that `to_json` wrote.

        Raises:
            ValueError: not JSON, not an object, or fields that are unknown or out of range.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a model config must be JSON; {error}") from None
        return cls.from_dict(fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "PixelTransformerConfig":
        """The config with these fields; those left out keep their defaults."""
        if not isinstance(fields, dict):
            raise ValueError(f"a model config must be a JSON object; got {type(fields).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise ValueError(f"a model config has no field {', '.join(map(repr, unknown))}; known: {sorted(known)}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"a model config field has the wrong type: {error}") from None
