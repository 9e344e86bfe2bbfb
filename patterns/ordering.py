"""Token orders of an image: which pixel stands at which position of the sequence.

A block of attention is a run of consecutive tokens, so the order decides what a block is in the picture: half a row of
a 256-wide image in raster order, a compact 16 x 8 patch in Morton order.
"""

import functools
from typing import Final

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

ORDERS: Final = ("raster", "tile", "morton", "hilbert")


def token_order(
    shape: tuple[int, int], order: str = "raster", *, tile: tuple[int, int] = (8, 8)
) -> tuple[Indices, Indices]:
    """The permutation of an image's pixels for a named order, and its inverse.

    Args:
        shape: height and width in pixels.
        order: ``"raster"`` goes row by row; ``"tile"`` goes through tiles row by row, and row by row inside each tile;
            ``"morton"`` interleaves the bits of x (lowest) and y, so that every aligned run of ``2**k`` tokens is a
            rectangle, if ``2**ceil(k / 2)`` divides both sides; ``"hilbert"`` also makes every step go to a neighbour.
        tile: height and width of a tile; used by ``"tile"`` alone, and must divide the image.

    Returns:
        ``(pixels, positions)``, both read-only int64 ``[height * width]``: the token at position ``i`` is the pixel
        ``divmod(pixels[i], width)``, and the pixel with raster index ``j`` stands at position ``positions[j]``.

    Raises:
        ValueError: an unknown order, a side below 1, tiles that do not divide the image, or a Hilbert curve on
            anything but a square whose side is a power of two.

    Example:
        >>> pixels, positions = token_order((2, 4), "tile", tile=(2, 2))
        >>> pixels.tolist()
        [0, 1, 4, 5, 2, 3, 6, 7]
        >>> pixels[positions].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    return _token_order(_pair("shape", shape), order, _pair("tile", tile) if order == "tile" else (1, 1))


def _pair(name: str, value: tuple[int, int]) -> tuple[int, int]:
    if len(value) != 2 or any(int(side) != side or side < 1 for side in value):
        raise ValueError(f"{name} must be (height, width), two whole numbers of at least 1; got {value!r}")
    return int(value[0]), int(value[1])


@functools.lru_cache(maxsize=64)
def _token_order(shape: tuple[int, int], order: str, tile: tuple[int, int]) -> tuple[Indices, Indices]:
    height, width = shape
    y, x = (axis.ravel() for axis in np.indices(shape, dtype=np.int64))
    if order == "raster":
        keys = y * width + x
    elif order == "tile":
        tile_height, tile_width = tile
        if height % tile_height or width % tile_width:
            raise ValueError(
                f"order 'tile' needs tiles that divide the image; got {tile_height} x {tile_width} tiles on a "
                f"{height} x {width} image"
            )
        tile_index = (y // tile_height) * (width // tile_width) + x // tile_width
        keys = tile_index * (tile_height * tile_width) + (y % tile_height) * tile_width + x % tile_width
    elif order == "morton":
        keys = _spread(x) | _spread(y) << 1
    else:
        if height != width or height & (height - 1):
            raise ValueError(
                f"order 'hilbert' needs a square image whose side is a power of two; got {height} x {width}"
            )
        keys = _hilbert(y, x, height)
    pixels = np.argsort(keys, kind="stable").astype(np.int64)
    positions = np.empty_like(pixels)
    positions[pixels] = np.arange(pixels.size)
    pixels.setflags(write=False)
    positions.setflags(write=False)
    return pixels, positions


def _spread(values: Indices) -> Indices:
    """Bit i moves to bit 2i."""
    spread = np.zeros_like(values)
    for bit in range(int(values.max()).bit_length()):
        spread |= (values >> bit & 1) << (2 * bit)
    return spread


def _hilbert(y: Indices, x: Indices, side: int) -> Indices:
    """Distance along the Hilbert curve of a square, from the coarsest quadrant to the finest."""
    y, x = y.copy(), x.copy()
    distance = np.zeros_like(x)
    half = side // 2
    while half:
        right, lower = (x & half) > 0, (y & half) > 0
        distance += half * half * ((3 * right) ^ lower)
        # Turn the quadrant so that the curve inside it enters and leaves where its neighbours meet it.
        mirror = right & ~lower
        x[mirror], y[mirror] = side - 1 - x[mirror], side - 1 - y[mirror]
        swap = ~lower
        x[swap], y[swap] = y[swap], x[swap]
        half //= 2
    return distance
