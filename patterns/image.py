"""Patterns of two-dimensional images whose pixels are tokens in some order."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.cells import joint_key
from sparseflash.patterns.grid import Grid, Ints, is_int
from sparseflash.patterns.intervals import split
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.misuse import too_long
from sparseflash.patterns.ordering import token_order
from sparseflash.patterns.pattern import Bools, Pattern, checked_int
from sparseflash.patterns.runs import frozen
from sparseflash.patterns.tiles import distinct_rows

MAX_PIXELS = 1 << 28  # the order of larger images would take gigabytes
PIXELS_AT_ONCE = 1 << 20

Coordinates: TypeAlias = NDArray[np.int32]
Box: TypeAlias = tuple[Ints, Ints, Ints, Ints]  # first and last row, first and last column, of many boxes


class ImagePattern(Pattern):
    """Base of patterns given by the displacement ``(dy, dx)`` between query and key pixel."""

    shape: tuple[int, int]
    order: str

    @property
    def orders_tokens(self) -> bool:
        return True

    @abstractmethod
    def near(self, dy: Coordinates, dx: Coordinates) -> Bools:
        """Truth for displacements key minus query."""

    @abstractmethod
    def reach(self, box: Box) -> list[Box]:
        """Boxes that cover whatever the pixels of a box see; they may go over the image's border."""

    @cached_property
    def _pixels(self) -> tuple[Coordinates, Coordinates]:
        """Row and column of the pixel at each position."""
        pixels, _ = token_order(self.shape, self.order)
        y, x = split(pixels, self.shape[1])
        return frozen(y.astype(np.int32)), frozen(x.astype(np.int32))

    def pixel_at(self, position: Ints) -> tuple[Coordinates, Coordinates, Bools]:
        """Pixel rows and columns; positions outside the image see nothing and are seen by nothing."""
        y, x = self._pixels
        inside = (position >= 0) & (position < y.size)
        index = np.where(inside, position, 0)
        return y[index], x[index], inside

    def allows(self, q: Ints, k: Ints) -> Bools:
        qy, qx, q_in = self.pixel_at(q)
        ky, kx, k_in = self.pixel_at(k)
        seen: Bools = self.near(ky - qy, kx - qx) & q_in & k_in
        return seen

    def coarser(self, tokens: int) -> Pattern:
        # Compact patches instead of pieces of lines.
        return dataclasses.replace(self, order="morton") if self.order == "raster" else self  # type: ignore[type-var]

    def _fit(self, grid: Grid) -> None:
        tokens = max(grid.kv_len, grid.q_offset + grid.q_len)
        if tokens > self.shape[0] * self.shape[1]:
            height, width = self.shape
            raise ValueError(f"{self}: an image of {height} x {width} {too_long(height * width, tokens)}")

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit(grid)
        (height, width), block_of = self._patches(grid.bk)
        rows, boxes = self._boxes(grid)
        found_rows, found_cols = [rows[:0]], [rows[:0]]
        for y0, y1, x0, x1 in self.reach(boxes):
            top, left = np.maximum(y0, 0) // height, np.maximum(x0, 0) // width
            bottom = np.minimum(y1, self.shape[0] - 1) // height
            right = np.minimum(x1, self.shape[1] - 1) // width
            # Rectangles of one size are looked up together; there are few sizes.
            sizes, which = np.unique(np.stack([bottom - top + 1, right - left + 1]), axis=1, return_inverse=True)
            for number, (tall, wide) in enumerate(sizes.T.tolist()):
                here = np.flatnonzero(which == number)
                reserve(here.size * tall * wide, 40)
                y = top[here][:, None, None] + np.arange(tall)[:, None]
                x = left[here][:, None, None] + np.arange(wide)
                cols = block_of[y, x].reshape(here.size, -1)
                found_rows.append(np.repeat(rows[here], cols.shape[1]))
                found_cols.append(cols.ravel())
        row_of, col_of = np.concatenate(found_rows), np.concatenate(found_cols)
        inside = np.flatnonzero(col_of < grid.cols)
        return grid.unique(row_of[inside], col_of[inside])

    def _patches(self, size: int) -> tuple[tuple[int, int], Ints]:
        """Rectangles of pixels that lie in one key block each: their height and width, and the block of each."""
        _, positions = token_order(self.shape, self.order)
        blocks: Ints = (positions // size).reshape(self.shape)
        height = width = 1
        while True:
            if blocks.shape[1] % 2 == 0 and np.array_equal(blocks[:, ::2], blocks[:, 1::2]):
                blocks, width = blocks[:, ::2], 2 * width
            elif blocks.shape[0] % 2 == 0 and np.array_equal(blocks[::2], blocks[1::2]):
                blocks, height = blocks[::2], 2 * height
            else:
                return (height, width), blocks

    def _boxes(self, grid: Grid) -> tuple[Ints, Box]:
        """Block rows that hold pixels, and the smallest box around the pixels of each."""
        y, x = self._pixels
        rows = grid.all_rows()
        first = np.clip(grid.q_start(rows), 0, y.size)
        stop = np.clip(grid.q_last(rows) + 1, 0, y.size)
        some = np.flatnonzero(first < stop)
        if not some.size:
            return some, (some, some, some, some)
        y, x = y[: stop[some[-1]]], x[: stop[some[-1]]]
        bounds = (f.reduceat(axis, first[some]) for axis in (y, x) for f in (np.minimum, np.maximum))
        y0, y1, x0, x1 = (b.astype(np.int64) for b in bounds)
        return rows[some], (y0, y1, x0, x1)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        """A tile is known from how the pixels lie inside the two blocks and from the step between the blocks."""
        kinds = Layouts(self, max(grid.bq, grid.bk))
        q_kind, qy, qx = kinds.of(grid.q_start(grid.all_rows()), grid.bq)
        k_kind, ky, kx = kinds.of(grid.k_start(np.arange(grid.cols, dtype=np.int64)), grid.bk)
        return joint_key(q_kind[rows], k_kind[cols], ky[cols] - qy[rows], kx[cols] - qx[rows])


class Layouts:
    """Numbers the ways in which the pixels of a block lie relative to its first pixel."""

    def __init__(self, image: ImagePattern, longest: int) -> None:
        self._image = image
        self._rows_at_once = max(1, PIXELS_AT_ONCE // longest)
        self._numbers: dict[bytes, int] = {}

    def of(self, starts: Ints, size: int) -> tuple[Ints, Ints, Ints]:
        """Per block that begins at a position: its layout, and the pixel it is counted from."""
        parts = [
            self._some(starts[begin : begin + self._rows_at_once], size)
            for begin in range(0, starts.size, self._rows_at_once)
        ]
        kind, y, x = (np.concatenate(part) for part in zip(*parts, strict=True))
        return kind, y, x

    def _some(self, starts: Ints, size: int) -> tuple[Ints, Ints, Ints]:
        y, x, inside = self._image.pixel_at(starts[:, None] + np.arange(size))
        first = inside.argmax(axis=1)[:, None]
        y0, x0 = np.take_along_axis(y, first, 1).astype(np.int64), np.take_along_axis(x, first, 1).astype(np.int64)
        # A position outside the image is a layout of its own.
        code = np.where(inside, (y - y0) * (4 * self._image.shape[1]) + (x - x0), np.iinfo(np.int64).max)
        once, index = distinct_rows(code.view(np.uint64))
        number = [self._numbers.setdefault(line.tobytes(), len(self._numbers)) for line in code[once]]
        return np.array(number, np.int64)[index], y0[:, 0], x0[:, 0]


@dataclass(frozen=True, repr=False)
class Neighborhood(ImagePattern):
    """See :func:`neighborhood`."""

    shape: tuple[int, int]
    radius: int | tuple[int, int]
    order: str = "raster"
    name = "neighborhood"

    @property
    def _reach(self) -> tuple[int, int]:
        return (self.radius, self.radius) if isinstance(self.radius, int) else self.radius

    def near(self, dy: Coordinates, dx: Coordinates) -> Bools:
        ry, rx = self._reach
        return np.asarray((np.abs(dy) <= ry) & (np.abs(dx) <= rx))

    def reach(self, box: Box) -> list[Box]:
        (ry, rx), (y0, y1, x0, x1) = self._reach, box
        return [(y0 - ry, y1 + ry, x0 - rx, x1 + rx)]


@dataclass(frozen=True, repr=False)
class Axial(ImagePattern):
    """See :func:`axial`."""

    shape: tuple[int, int]
    order: str = "raster"
    name = "axial"

    def near(self, dy: Coordinates, dx: Coordinates) -> Bools:
        return np.asarray((dy == 0) | (dx == 0))

    def reach(self, box: Box) -> list[Box]:
        y0, y1, x0, x1 = box
        zero = np.zeros_like(y0)
        return [(y0, y1, zero, zero + self.shape[1] - 1), (zero, zero + self.shape[0] - 1, x0, x1)]


def _checked_image(owner: str, shape: tuple[int, int], order: str) -> tuple[int, int]:
    if not isinstance(shape, tuple | list) or len(shape) != 2 or not all(is_int(n) for n in shape):
        raise TypeError(f"{owner}: shape must be (height, width), got {shape!r}")
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ValueError(f"{owner}: shape={shape} has more than 2**28 pixels")
    token_order(shape, order)
    return int(shape[0]), int(shape[1])


def neighborhood(shape: tuple[int, int], radius: int | tuple[int, int], order: str = "raster") -> Pattern:
    """``abs(dy) <= ry`` and ``abs(dx) <= rx`` between the pixels of query and key.

    Stand-alone self-attention of Ramachandran et al. (2019), section 3, without shifting the window at the border.

    Args:
        shape: height and width in pixels; together the number of tokens.
        radius: pixels seen on either side, one number or (ry, rx).
        order: how pixels become tokens, see :func:`sparseflash.ordering.token_order`. In Morton order a block is a
            compact patch and touches few others; in raster order it is a piece of a line and touches many.

    Raises:
        TypeError: shape or radius is not made of ints.
        ValueError: an unknown order, one that the shape does not allow, a negative radius; when compiling, a sequence
            longer than the image.

    Example:
        >>> from sparseflash import patterns as P
        >>> for order in ("raster", "morton"):
        ...     mask = P.neighborhood((128, 128), 8, order).compile(128 * 128)
        ...     print(order, f"{mask.density:.1%} of the blocks for {mask.token_density:.1%} of the pairs")
        raster 12.8% of the blocks for 1.6% of the pairs
        morton 6.2% of the blocks for 1.6% of the pairs
    """
    shape = _checked_image("neighborhood", shape, order)
    if isinstance(radius, tuple | list):
        if len(radius) != 2:
            raise TypeError(f"neighborhood: radius must be an int or (ry, rx), got {radius!r}")
        reach: int | tuple[int, int] = (
            checked_int("neighborhood", "radius", radius[0], 0),
            checked_int("neighborhood", "radius", radius[1], 0),
        )
    else:
        reach = checked_int("neighborhood", "radius", radius, 0)
    return Neighborhood(shape, reach, order)


def axial(shape: tuple[int, int], order: str = "raster") -> Pattern:
    """Query and key lie in the same row or the same column of the image: Ho et al., "Axial Attention" (2019).

    Args:
        shape: height and width in pixels; together the number of tokens.
        order: how pixels become tokens, see :func:`sparseflash.ordering.token_order`.

    Raises:
        TypeError: shape is not made of ints.
        ValueError: an unknown order or one that the shape does not allow; when compiling, a sequence longer than the
            image.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.axial((2, 3)).compile(6, block=16).to_dense()[0].astype(int)
        array([1, 1, 1, 1, 0, 0])
    """
    return Axial(_checked_image("axial", shape, order), order)
