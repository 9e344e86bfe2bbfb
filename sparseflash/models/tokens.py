"""The tokens of images, their positions and masks: all pixels, or lit pixels with or without their tiles.

Shape legend: B images of height x width pixels, P = height * width, S sequences of N tokens, D head dim, G tiles of t
pixels an image, T blocks (tiles, or t lit pixels) that are kept in the whole batch, M most blocks of an image, K blocks
that a block may see at most.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseflash.functional.attention import Mask
from sparseflash.models.config import PixelTransformerConfig, seen_cells
from sparseflash.models.token_tables import packed, table_of_pairs
from sparseflash.ordering import token_order
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.full import Full
from sparseflash.patterns.neighborhood import Neighborhood
from sparseflash.patterns.per_axis import spread
from sparseflash.rotary import rotary_table_2d
from sparseflash.tables.table import LookupTable


class Tokens(NamedTuple):
    """The tokens of a batch of images.

    Attributes:
        place: int64 [S, N], the pixel of each token: a flat index into the images [B, height, width].
        cos: [N, D / 2], cosines of the rotary positions.
        sin: [N, D / 2], sines.
        masks: the mask of each layer.
    """

    place: Tensor
    cos: Tensor
    sin: Tensor
    masks: Sequence[Mask]


class Canvas:
    """The tokens of one image size on one device.

    Args:
        config: the config, for order, tile, unit and patterns.
        shape: height and width in pixels.
        device: device of the images.

    Raises:
        ValueError: an image size that does not suit the order, the tiles or a pattern.
    """

    def __init__(self, config: PixelTransformerConfig, shape: tuple[int, int], device: torch.device) -> None:
        self._config, self._shape, self._device = config, shape, device
        pixels, _ = token_order(shape, config.order, tile=config.tile)
        self.pixels = torch.from_numpy(np.array(pixels)).to(device)  # [P] raster index of each token
        cos, sin = rotary_table_2d(pixels, shape[1], config.head_dim, config.wavelengths)
        self.cos, self.sin = cos.to(device), sin.to(device)  # [P, D / 2]
        self._neighbours: dict[Pattern, Tensor] = {}

    def all_pixels(self, images: int) -> Tokens:
        """The tokens if every pixel is one: every image is a sequence, with the masks of the patterns."""
        starts = torch.arange(images, device=self._device)[:, None] * len(self.pixels)
        return Tokens(starts + self.pixels, self.cos, self.sin, compiled(self._config, self._shape))

    def lit_tiles(self, lit: Tensor) -> Tokens:
        """The pixels of tiles with a lit pixel, of all images in one sequence. Waits for the device to count N.

        Args:
            lit: bool [B, P] in raster order.

        Raises:
            ValueError: the config's patterns are not over tiles.
        """
        if self._config.unit != "tile":
            raise ValueError(f'lit tokens are seen by whole tiles: they need unit "tile"; got {self._config.unit!r}')
        size = self._config.tile_tokens
        holds = lit[:, self.pixels].unflatten(1, (-1, size)).any(-1)  # [B, G]
        # An image without lit pixels keeps its first tile, because a sequence must not be empty.
        holds[:, 0] |= ~holds.any(1)
        image, tile = holds.nonzero(as_tuple=True)  # [T], image by image
        place = image[:, None] * len(self.pixels) + self.pixels.view(-1, size)[tile]  # [T, t]
        number = torch.full(holds.shape, -1, device=lit.device)
        number[image, tile] = torch.arange(len(tile), device=lit.device)
        tables: dict[Pattern, LookupTable] = {}
        patterns = self._config.patterns(self._shape)
        for pattern in set(patterns):
            near = self._near(pattern)[tile]  # [T, K]
            seen = torch.where(near >= 0, number[image[:, None], near.clamp(min=0)], -1)
            tables[pattern] = LookupTable.from_indices(seen[None, None], shape=place.numel(), block=size)
        cos, sin = (table.unflatten(0, (-1, size))[tile].flatten(0, 1) for table in (self.cos, self.sin))
        return Tokens(place.view(1, -1), cos, sin, [tables[pattern] for pattern in patterns])

    def lit_pixels(self, lit: Tensor) -> Tokens:
        """Lit pixels of all images in one sequence, in blocks along the token order. Waits for the device to count N.

        The table is exact for every pair of tokens. The last block of an image is padded with dark pixels, which see
        nothing and are not seen.

        Args:
            lit: bool [B, P] in raster order.

        Raises:
            ValueError: unsupported patterns, or a number of pixels that is not a multiple of the block.
        """
        size, pixels = self._config.block[0], len(self.pixels)
        if pixels % size:
            raise ValueError(f"{pixels} pixels are not a whole number of blocks of {size} tokens")
        lit = lit[:, self.pixels]
        blocks = (lit.sum(1).clamp(min=1) + size - 1) // size  # [B]
        dark_after = (~lit).flip(1).cumsum(1).flip(1)
        chosen = lit | (dark_after <= (blocks * size - lit.sum(1))[:, None])
        image, position = chosen.nonzero(as_tuple=True)
        place = image * pixels + self.pixels[position]  # [T * t]
        y, x = (axis.view(-1, size) for axis in _divided(self.pixels[position], self._shape[1]))
        bright = lit[image, position].view(-1, size)  # [T, t]
        image = image[::size]  # [T]
        boxes = torch.stack([-_least(y, bright), _most(y, bright), -_least(x, bright), _most(x, bright)])

        # Blocks are compared only within their own image: [4, B, M].
        first = blocks.cumsum(0) - blocks
        rank = torch.arange(len(image), device=lit.device) - first[image]
        by_image = boxes.new_full((4, len(blocks), int(blocks.max())), -_FAR)
        by_image[:, image, rank] = boxes
        others = by_image[:, image]  # [4, T, M]; a box is -first and last row, -first and last column
        lit_keys = packed(bright)  # [T, W]
        # Distances between pixels are far below 2^15, and int16 takes a quarter of the time.
        near_y, near_x = y.short(), x.short()
        tables: dict[Pattern, LookupTable] = {}
        patterns = self._config.patterns(self._shape)
        for pattern in set(patterns):
            reach = [min(r, max(self._shape)) for r in _reach(pattern, self._config.order)]
            slack = torch.tensor(reach, device=lit.device).repeat_interleave(2)[:, None, None]
            near = (others[[1, 0, 3, 2]] + boxes[:, :, None] + slack >= 0).all(0)
            row, key = near.nonzero(as_tuple=True)  # [E]
            key = key + first[image[row]]
            seen = _within(near_y, row, key, reach[0]) & _within(near_x, row, key, reach[1])
            words = packed(seen) & lit_keys[key][:, None]
            words &= bright[row][..., None].int().neg()  # all ones where the query is lit
            some = words.flatten(1).any(1)
            tables[pattern] = table_of_pairs(row[some], key[some], words[some], len(image))
        tokens = self.cos[position], self.sin[position]
        return Tokens(place[None], *tokens, [tables[pattern] for pattern in patterns])

    def _near(self, pattern: Pattern) -> Tensor:
        """Tiles that each tile may see, int64 [G, K]; -1 where there are fewer than K."""
        if pattern not in self._neighbours:
            allowed = seen_cells(pattern, self._config.grid(self._shape))
            count = allowed.sum(1)
            rows, cols = allowed.nonzero()
            near = np.full((len(allowed), count.max(initial=1)), -1, np.int64)
            near[rows, np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)] = cols
            self._neighbours[pattern] = torch.from_numpy(near).to(self._device)
        return self._neighbours[pattern]


_FAR = 1 << 20


def _divided(pixels: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of raster indices."""
    return pixels // width, pixels % width


def _least(axis: Tensor, counted: Tensor) -> Tensor:
    """The minimum of the counted entries in each row; of all entries if none is counted."""
    none = ~counted.any(1, keepdim=True)
    return axis.masked_fill(~(counted | none), _FAR).amin(1)


def _most(axis: Tensor, counted: Tensor) -> Tensor:
    return -_least(-axis, counted)


def _within(axis: Tensor, row: Tensor, key: Tensor, reach: int) -> Tensor:
    """Which pixels of blocks `row` and `key` [E] are within a distance along an axis [T, t]: bool [E, t, t]."""
    return (axis[row][:, :, None] - axis[key][:, None]).abs_() <= reach


def _reach(pattern: Pattern, order: str) -> tuple[int, int]:
    """The reach of a pattern over pixels in y and in x."""
    if isinstance(pattern, Full):
        return _FAR // 4, _FAR // 4
    if isinstance(pattern, Neighborhood) and pattern.order == order and len(pattern.shape) == 2:
        y, x = spread(pattern.radius, 2)
        return y, x
    raise ValueError(f'lit pixels see what a neighborhood(..., {order!r}) or full() reaches; got "{pattern}"')


def compiled(config: PixelTransformerConfig, shape: tuple[int, int]) -> tuple[BlockMask, ...]:
    """The mask of each layer over all pixels of an image; layers with equal patterns share one."""
    return config.masks(shape)
