"""Windows of whole tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.image import ImagePattern, Layout, Term, checked_grid
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.per_axis import ints_per_axis, shortest, spread
from sparseflash.patterns.span import Span


@dataclass(frozen=True, repr=False)
class SlidingTile(ImagePattern):
    """See :func:`sliding_tile`."""

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    window: int | tuple[int, ...]
    order: str = "tile"
    name = "sliding_tile"

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.order, self.tile if self.order == "tile" else None)

    def terms(self) -> tuple[Term, ...]:
        windows = spread(self.window, len(self.shape))
        return (tuple(_tiles(n, t, w) for n, t, w in zip(self.shape, self.tile, windows, strict=True)),)


def _tiles(n: int, side: int, window: int) -> Span:
    own = np.arange(n, dtype=np.int64) // side
    tiles = -(-n // side)
    centre = np.minimum(np.maximum(own, window // 2), tiles - 1 - window // 2)
    first = np.maximum(centre - window // 2, 0)
    return Span.of(first * side, (first + window) * side)


def sliding_tile(
    shape: tuple[int, ...], tile: tuple[int, ...], window: int | tuple[int, ...], order: str = "tile"
) -> Pattern:
    """Each tile sees the tiles of a window around it, which is shifted inwards at the border.

    Sliding tile attention of Zhang et al., https://arxiv.org/abs/2502.04507, section 3: all tokens of a tile see the
    same whole tiles. If tokens are in the order of these tiles and a block holds one tile, no block is PARTIAL.

    Args:
        shape: places along 1 to 3 axes, such as (frames, height, width); their product is the number of tokens.
        tile: places of a tile along each axis, such as (6, 8, 8). The last tile of an axis is smaller if
            tiles do not divide it.
        window: tiles seen along each axis, including the query's own: an odd number, or the whole axis.
        order: how places become tokens, see :func:`sparseflash.ordering.token_order`; ``"tile"`` goes through these
            tiles.

    Raises:
        TypeError: shape, tile or window is not made of ints.
        ValueError: an unknown order; a window that is even or larger than the axis; when compiling, a sequence longer
            than the grid.

    Example:
        >>> from sparseflash import patterns as P
        >>> video = P.sliding_tile((12, 32, 32), (4, 4, 4), window=(3, 3, 5))
        >>> mask = video.compile(12 * 32 * 32, block=64)
        >>> mask.full_blocks == mask.nnz, f"{mask.density:.1%}"
        (True, '23.4%')
    """
    owner = "sliding_tile"
    shape, _ = checked_grid(owner, shape, "raster", None)
    sides = ints_per_axis(owner, "tile", tile, len(shape), 1)
    checked_grid(owner, shape, order, sides if order == "tile" else None)
    windows = ints_per_axis(owner, "window", window, len(shape), 1)
    tiles = tuple(-(-n // side) for n, side in zip(shape, sides, strict=True))
    # The odd number from an even one on, and no more than there are.
    nearest = shortest(tuple(min(seen + 1 - seen % 2, most) for seen, most in zip(windows, tiles, strict=True)))
    for axis, (seen, most) in enumerate(zip(windows, tiles, strict=True)):
        if seen > most:
            raise ValueError(
                f"{owner}: window must be at most the {most} tiles of {sides[axis]} along axis {axis}, got {seen}; "
                f"nearest is window={nearest!r}"
            )
        if seen % 2 == 0 and seen < most:
            raise ValueError(
                f"{owner}: window must be odd along axis {axis}, so that the query's tile is in its middle, or all "
                f"{most} tiles, got {seen}; nearest is window={nearest!r}"
            )
    return SlidingTile(shape, sides, shortest(windows), order)
