"""Token orders of a grid: which place of a line, an image or a video stands at which position of the sequence.

A block of attention is a run of consecutive tokens, so the order decides what a block is in the picture: half a row of
a 256-wide image in raster order, a compact 16 x 8 patch in Morton order.
"""

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

from sparseflash.patterns.curves import hilbert, morton

Indices = npt.NDArray[np.int64]

ORDERS: Final = ("raster", "tile", "morton", "hilbert")
TILES: Final = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}  # of 64 tokens, by the number of axes


def token_order(
    shape: tuple[int, ...], order: str = "raster", *, tile: tuple[int, ...] | None = None
) -> tuple[Indices, Indices]:
    """The permutation of the places of a grid for a named order, and its inverse.

    Args:
        shape: places along each of 1 to 3 axes: height and width of an image; frames, height and width of a video.
        order: ``"raster"`` goes row by row; ``"tile"`` goes through tiles row by row, and row by row inside each tile;
            ``"morton"`` interleaves the bits of x (lowest), y and frame, so that every aligned run of ``2**k`` tokens
            is a box, if ``2**ceil(k / axes)`` divides all sides; ``"hilbert"`` also makes every step go to a neighbour,
            of a shape whose sides are even, and otherwise to a place that touches this one at least by a corner.
        tile: places of a tile along each axis; used by ``"tile"`` alone. The last tiles of an axis are smaller where
            tiles do not divide it. Default ``(64,)``, ``(8, 8)`` or ``(4, 4, 4)``.

    Returns:
        ``(places, positions)``, both read-only int64 ``[number of places]``: the token at position ``i`` stands at
        ``np.unravel_index(places[i], shape)``, and the place with raster index ``j`` at position ``positions[j]``.

    Raises:
        ValueError: an unknown order, a shape of other than 1 to 3 axes, a side below 1, or a tile of other axes.

    Example:
        >>> places, positions = token_order((2, 4), "tile", tile=(2, 2))
        >>> places.tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
        >>> places[positions].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
        >>> token_order((2, 2, 3), "hilbert")[0].tolist()
        [0, 1, 3, 4, 10, 9, 6, 7, 8, 11, 5, 2]
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    shape = _sides("shape", shape)
    if order != "tile":
        return _token_order(shape, order, shape)
    sides = TILES[len(shape)] if tile is None else _sides("tile", tile)
    if len(sides) != len(shape):
        raise ValueError(f"tile must have an entry for each of the {len(shape)} axes of shape={shape}; got {tile!r}")
    return _token_order(shape, order, sides)


def _sides(name: str, value: tuple[int, ...]) -> tuple[int, ...]:
    listed = isinstance(value, tuple | list) and 1 <= len(value) <= 3
    if not listed or any(int(side) != side or side < 1 for side in value):
        raise ValueError(f"{name} must be 1 to 3 whole numbers of at least 1, such as (height, width); got {value!r}")
    return tuple(int(side) for side in value)


@functools.lru_cache(maxsize=64)
def _token_order(shape: tuple[int, ...], order: str, tile: tuple[int, ...]) -> tuple[Indices, Indices]:
    if order == "hilbert":
        places = np.ravel_multi_index(hilbert(shape), shape).astype(np.int64)
    elif order == "raster":
        places = np.arange(int(np.prod(shape)), dtype=np.int64)
    else:
        axes = tuple(axis.ravel() for axis in np.indices(shape, dtype=np.int64))
        if order == "morton":
            keys = morton(axes)
        else:
            # The places of a smaller tile at the border follow each other all the same: keys may have gaps.
            across = tuple(-(-side // width) for side, width in zip(shape, tile, strict=True))
            outer = tuple(axis // width for axis, width in zip(axes, tile, strict=True))
            inner = tuple(axis % width for axis, width in zip(axes, tile, strict=True))
            keys = np.ravel_multi_index(outer, across) * int(np.prod(tile)) + np.ravel_multi_index(inner, tile)
        places = np.argsort(keys, kind="stable").astype(np.int64)
    positions = np.empty_like(places)
    positions[places] = np.arange(places.size)
    places.setflags(write=False)
    positions.setflags(write=False)
    return places, positions
