"""An image or a video among the tokens of a sequence: its start, its sides and the order of its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import numpy as np

from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.ordering import token_order


class PlacedImage(NamedTuple):
    """The positions of the tokens of an image in a sequence."""

    start: int  # position of its first token
    shape: tuple[int, ...]
    order: str = "raster"
    tile: tuple[int, ...] | None = None  # of order "tile"; None: of 64 tokens

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return prod(self.shape)

    @property
    def positions(self) -> Ints:
        """The token of each place, [frames, height, width]; a row or an image has one frame."""
        place = np.arange(self.tokens)
        if self.order != "raster":
            _, place = token_order(self.shape, self.order, tile=self.tile)
        *frames, height, width = (1, 1, *self.shape)
        return self.start + place.reshape(prod(frames), height, width)


def in_order(images: Iterable[PlacedImage]) -> tuple[PlacedImage, ...]:
    """Images sorted by start."""
    return tuple(sorted(images, key=lambda image: image._replace(tile=image.tile or ())))
