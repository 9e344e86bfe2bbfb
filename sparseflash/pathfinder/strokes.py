"""Drawings of one dash and of one disc: supersampled, then reduced by 8-bit Lanczos-3.

The specification, as implemented here (K = L + ceil(w) + m, A = antialias, o = centre cell of a square of side
2KA + 1): a dash at angle t is the line from o to ``shift(o, t, L * A)`` of width ``round(w * A)``, drawn as Pillow's
``ImageDraw.line`` draws it. Its *stroke* is that square reduced to side 2K + 1; its *footprint* is the square dilated
by the disc of radius m * A and then reduced. Both stay uint8. Note that the reduction factor is (2KA + 1) / (2K + 1),
not A.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Pillow resamples 8-bit images with coefficients in units of 2 ** -22. Sums of integer products stay far below 2 ** 53,
# so float64 matrix products of these integers are exact in any order of summation.
_UNIT = 1 << 22


def flip(theta: float) -> float:
    """The opposite direction, kept in the range of atan2."""
    return theta + math.pi if theta < 0 else theta - math.pi


@lru_cache(maxsize=256)
def _lanczos(n: int, k: int) -> Floats:
    """Integer coefficients that reduce n cells to k, float64 [k, n]."""
    factor = n / k
    matrix = np.zeros((k, n))
    for i in range(k):
        centre = (i + 0.5) * factor
        low = max(int(centre - 3 * factor + 0.5), 0)
        high = min(int(centre + 3 * factor + 0.5), n)
        t = (np.arange(low, high) + 0.5 - centre) / factor
        weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0.0)
        weights = weights / weights.sum() * _UNIT
        matrix[i, low:high] = np.trunc(weights + np.copysign(0.5, weights))
    matrix.flags.writeable = False
    return matrix


def lanczos_reduce(images: Bytes, shape: tuple[int, int]) -> Bytes:
    """Reduce uint8 [..., n_y, n_x] to uint8 [..., *shape] exactly as Pillow's ``LANCZOS`` does in mode L.

    First along x, then along y, each pass rounded half up and clipped to 0..255.
    """
    across = _lanczos(images.shape[-1], shape[1])
    down = _lanczos(images.shape[-2], shape[0])
    passed = np.clip(np.floor((images.astype(np.float64) @ across.T + _UNIT / 2) / _UNIT), 0, 255)
    result: Bytes = np.clip(np.floor((down @ passed + _UNIT / 2) / _UNIT), 0, 255).astype(np.uint8)
    return result


def disc(radius: float) -> list[tuple[int, int]]:
    """Offsets (dy, dx) with dy^2 + dx^2 <= radius^2."""
    reach = math.floor(radius)
    span = range(-reach, reach + 1)
    return [(dy, dx) for dy in span for dx in span if dy * dy + dx * dx <= radius * radius]


def dilate(images: Bytes, radius: float) -> Bytes:
    """Running maximum over a disc, uint8 [..., n, n]; cells outside the square count as 0."""
    reach = math.floor(radius)
    n_y, n_x = images.shape[-2:]
    widths = [(0, 0)] * (images.ndim - 2) + [(reach, reach)] * 2
    padded = np.pad(images, widths)
    result = images.copy()
    for dy, dx in disc(radius):
        window = padded[..., reach + dy : reach + dy + n_y, reach + dx : reach + dx + n_x]
        np.maximum(result, window, out=result)
    return result


def draw_dashes(angles: Floats, *, length: int, line_width: int, half: int, antialias: int) -> Bytes:
    """Supersampled dashes, uint8 [len(angles), n, n] with n = 2 * half * antialias + 1, values 0 and 255."""
    from PIL import Image, ImageDraw

    centre = half * antialias
    side = 2 * centre + 1
    squares = np.zeros((len(angles), side, side), np.uint8)
    for square, theta in zip(squares, angles, strict=True):
        end_y = math.ceil(centre + length * antialias * math.sin(theta))
        end_x = math.ceil(centre + length * antialias * math.cos(theta))
        picture = Image.new("L", (side, side))
        ImageDraw.Draw(picture).line([(centre, centre), (end_x, end_y)], fill=255, width=line_width)
        square[:] = np.asarray(picture)
    return squares


def kernels(
    angles: Floats, *, length: int, line_width: int, margin: int, half: int, antialias: int
) -> tuple[Bytes, Bytes]:
    """Strokes and footprints, each uint8 [len(angles), 2 * half + 1, 2 * half + 1], the dash starting at the centre."""
    squares = draw_dashes(angles, length=length, line_width=line_width, half=half, antialias=antialias)
    shape = (2 * half + 1, 2 * half + 1)
    return lanczos_reduce(squares, shape), lanczos_reduce(dilate(squares, margin * antialias), shape)


def marker(
    y: int, x: int, *, size: int, radius: float, antialias: int, full: bool = False
) -> tuple[Bytes, tuple[int, int]]:
    """A disc of ``radius`` on the pixel (y, x): the uint8 patch and the canvas position (top, left) of its corner.

    Cells (i, j) of the ``antialias`` times larger canvas with (i - y A)^2 + (j - x A)^2 <= (radius A)^2 are 255, then
    reduced. Quirk: the centre of the disc is therefore a quarter of a pixel up and left of the pixel's centre (at
    A = 2). Only a crop of half width ceil(radius) + 6, clipped to the canvas, is reduced. Lanczos reaches 3 pixels, so
    this equals the reduction of the whole canvas (``full=True``) bit for bit.
    """
    half = size if full else math.ceil(radius) + 6
    top, left = max(y - half, 0), max(x - half, 0)
    bottom, right = min(y + half + 1, size), min(x + half + 1, size)
    return _marker_patch(y - top, x - left, bottom - top, right - left, radius, antialias), (top, left)


@lru_cache(maxsize=512)
def _marker_patch(y: int, x: int, height: int, width: int, radius: float, antialias: int) -> Bytes:
    i = np.arange(height * antialias)[:, None] - y * antialias
    j = np.arange(width * antialias)[None, :] - x * antialias
    inside = i * i + j * j <= (radius * antialias) ** 2
    patch = lanczos_reduce(np.where(inside, 255, 0).astype(np.uint8), (height, width))
    patch.flags.writeable = False
    return patch
