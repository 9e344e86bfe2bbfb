"""The config of a pixel transformer, as data that round-trips through JSON, including the patterns.

A config is independent of image size. Image patterns are not (``neighborhood((64, 64), 12)``), so the text of a pattern
may contain ``{shape}`` and ``{order}``, which the model replaces for its images.
"""

import dataclasses
from functools import lru_cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from sparseflash.models.json_config import MOST, JsonConfig
from sparseflash.ordering import ORDERS
from sparseflash.patterns import BlockMask, Pattern, from_blocks, parse
from sparseflash.patterns.grid import BLOCK_SIZES

UNITS = ("pixel", "tile")
TOKENS = ("all", "lit_tiles", "lit_pixels")


@dataclasses.dataclass(frozen=True)
class PixelTransformerConfig(JsonConfig):
    """The shape of a `PixelTransformer`, independent of image size: positions are relative, patterns have no size.

    Attributes:
        pattern: the text of the attention pattern: one for all layers, or one per layer.
        unit: unit of the positions of a pattern: ``"pixel"``, or ``"tile"`` if whole tiles see each other.
            ``{shape}`` in a pattern is the image's (height, width) in this unit.
        tokens: ``"all"`` pixels, or content-based attention through tables that are built from the images:
            ``"lit_tiles"``, the pixels of tiles with a lit pixel, with a pattern between tiles; or ``"lit_pixels"``,
            lit pixels only, with a ``neighborhood`` or ``full()`` as the pattern.
        block: (BQ, BK) at which patterns over all pixels are compiled; with lit tiles a block is a tile.
        order: the order in which pixels become tokens, see `sparseflash.ordering.token_order`; ``"tile"`` keeps the
            pixels of a tile together.
        tile: height and width of a tile in pixels.
        width: size of the residual stream.
        heads: attention heads; the head dim ``width / heads`` must be a multiple of 4 (two axes, pairs of entries).
        layers: number of layers.
        tied: all layers share one set of weights.
        mlp_width: hidden size of the MLP.
        classes: outputs of the classification head.
        dense_classes: outputs of the dense head for each lit pixel; 0 for no dense head.
        wavelengths: shortest and longest wavelength of the rotary positions, in pixels.
        grey_levels: anchors of the grey-value embedding; values between two anchors are interpolated.
        lit_above: a pixel is lit if its grey value (0..255) is above this value.
        readout_reach: the readout is the mean over lit pixels. With r > 0 it is the mean over lit pixels whose whole
            square of side 2 r + 1 is lit: on Pathfinder images the insides of the two discs, since dashes are thinner.
        key_gate: every layer learns a number for each grey value and head that is added to the scores of a key, see
            `sparseflash.models.key_gate`; initially 0.

    Raises:
        ValueError: a field out of range, or a pattern that does not parse.

    Example:
        >>> config = PixelTransformerConfig(pattern="local(64) | butterfly(unit=64)", width=32, heads=2)
        >>> PixelTransformerConfig.from_json(config.to_json()) == config
        True
    """

    pattern: str | tuple[str, ...] = "full()"
    unit: str = "pixel"
    tokens: str = "all"
    block: tuple[int, int] = (128, 128)
    order: str = "morton"
    tile: tuple[int, int] = (8, 8)
    width: int = 64
    heads: int = 2
    layers: int = 4
    tied: bool = False
    mlp_width: int = 256
    classes: int = 2
    dense_classes: int = 0
    wavelengths: tuple[float, float] = (4.0, 80.0)
    grey_levels: int = 9
    lit_above: int = 31
    readout_reach: int = 0
    key_gate: bool = False

    # An example is one image, without a vocabulary.
    symbols: ClassVar[int] = 0
    documents: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.pattern, list):
            object.__setattr__(self, "pattern", tuple(self.pattern))
        texts = self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"pattern must be one expression or several, got {self.pattern!r}")
        for name in ("block", "tile", "wavelengths"):
            value = getattr(self, name)
            if len(value) != 2:
                raise ValueError(f"{name} must have two entries; got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name, most in MOST.items():
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} must be an int; got {getattr(self, name)!r}")
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)!r}")
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}; got {getattr(self, name)!r}")
        for name, most in (("dense_classes", MOST["classes"]), ("readout_reach", 1 << 12)):
            if not 0 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be 0 or more, and at most {most:,}; got {getattr(self, name)!r}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"width / heads must be a multiple of 4; got width={self.width!r} and heads={self.heads!r}"
            )
        if type(self.key_gate) is not bool:
            raise ValueError(f"key_gate must be true or false; got {self.key_gate!r}")
        for name, known in (("order", ORDERS), ("unit", UNITS), ("tokens", TOKENS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        self._check_tiles()
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
        # Any size shows whether they parse.
        self.patterns((64, 64) if self.unit == "pixel" else (4 * self.tile[0], 4 * self.tile[1]))

    def _check_tiles(self) -> None:
        if self.tokens == "lit_tiles" and self.unit != "tile":
            raise ValueError(f'tokens "lit_tiles" need unit "tile": whole tiles see each other; got {self.unit!r}')
        if self.tokens == "lit_pixels" and (self.unit != "pixel" or self.block[0] != self.block[1]):
            raise ValueError(
                f'tokens "lit_pixels" need unit "pixel" and a square block; got {self.unit!r} and {self.block!r}'
            )
        if self.unit == "pixel":
            return
        if self.order != "tile":
            raise ValueError(f'unit "tile" needs order "tile"; got {self.order!r}')
        if self.tile_tokens not in BLOCK_SIZES:
            raise ValueError(
                f"a tile that is a block must have {', '.join(map(str, BLOCK_SIZES))} pixels; got a tile of "
                f"{self.tile[0]} x {self.tile[1]}"
            )

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.width // self.heads

    @property
    def tile_tokens(self) -> int:
        """Pixels of a tile."""
        return self.tile[0] * self.tile[1]

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Height and width of an image in the unit of the patterns.

        Raises:
            ValueError: tiles do not cover the image.
        """
        if self.unit == "pixel":
            return shape
        if shape[0] % self.tile[0] or shape[1] % self.tile[1]:
            raise ValueError(
                f"an image of {shape[0]} x {shape[1]} pixels is not made of tiles of {self.tile[0]} x {self.tile[1]}"
            )
        return shape[0] // self.tile[0], shape[1] // self.tile[1]

    def patterns(self, shape: tuple[int, int]) -> tuple[Pattern, ...]:
        """The parsed pattern of each layer for images of (height, width) pixels."""
        order = "raster" if self.unit == "tile" else self.order
        texts = (self.pattern,) * self.layers if isinstance(self.pattern, str) else self.pattern
        parsed = {text: parse(_filled(text, self.grid(shape), order)) for text in set(texts)}
        return tuple(parsed[text] for text in texts)

    def masks(self, shape: tuple[int, int]) -> tuple[BlockMask, ...]:
        """The compiled mask of each layer over all pixels of an image; layers with equal patterns share one."""
        return _masks(self, shape)

    def patterns_at(self, size: int) -> tuple[Pattern, ...]:
        """The parsed pattern of each layer for square images of this side."""
        return self.patterns((size, size))

    def masks_at(self, size: int) -> tuple[BlockMask, ...]:
        """The compiled mask of each layer over all pixels of square images of this side."""
        return self.masks((size, size))


@lru_cache(maxsize=64)
def _masks(config: PixelTransformerConfig, shape: tuple[int, int]) -> tuple[BlockMask, ...]:
    patterns = config.patterns(shape)
    if config.unit == "tile":
        over_tiles = {pattern: seen_cells(pattern, config.grid(shape)) for pattern in set(patterns)}
        found = {pattern: from_blocks(cells, unit=config.tile_tokens) for pattern, cells in over_tiles.items()}
    else:
        found = {pattern: pattern for pattern in set(patterns)}
    masks = {pattern: found[pattern].compile(shape[0] * shape[1], block=config.block) for pattern in found}
    return tuple(masks[pattern] for pattern in patterns)


def seen_cells(pattern: Pattern, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """Which tile sees which, bool [G, G]."""
    return pattern.compile(grid[0] * grid[1], block=64).to_dense()


def _filled(text: str, shape: tuple[int, int], order: str) -> str:
    return text.replace("{shape}", f"({shape[0]}, {shape[1]})").replace("{order}", repr(order))
