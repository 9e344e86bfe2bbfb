"""Patterns of two-dimensional images whose pixels are tokens in some order."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparseflash.patterns.cells import joint_key
from sparseflash.patterns.grid import Grid, Ints, is_int
from sparseflash.patterns.ordering import token_order
from sparseflash.patterns.pattern import Bools, Pattern, checked_int

MAX_PIXELS = 1 << 28  # the order of larger images would take gigabytes


class ImagePattern(Pattern):
    """Base of patterns given by the displacement ``(dy, dx)`` between query and key pixel."""

    shape: tuple[int, int]
    order: str

    @abstractmethod
    def near(self, dy: Ints, dx: Ints) -> Bools:
        """Truth for displacements key minus query."""

    @abstractmethod
    def halo(self, y: Ints, x: Ints) -> tuple[Ints, Ints]:
        """Pixels (y, x) that cover whatever the pixels of a block see; y and x are sorted, distinct, one block's."""

    @cached_property
    def _pixels(self) -> tuple[Ints, Ints]:
        """Row and column of the pixel at each position."""
        pixels, _ = token_order(self.shape, self.order)
        return pixels // self.shape[1], pixels % self.shape[1]

    def _at(self, position: Ints) -> tuple[Ints, Ints, Bools]:
        """Pixel rows and columns; positions outside the image see nothing and are seen by nothing."""
        y, x = self._pixels
        inside = (position >= 0) & (position < y.size)
        index = np.where(inside, position, 0)
        return y[index], x[index], inside

    def allows(self, q: Ints, k: Ints) -> Bools:
        qy, qx, q_in = self._at(q)
        ky, kx, k_in = self._at(k)
        seen: Bools = self.near(ky - qy, kx - qx) & q_in & k_in
        return seen

    def coarser(self, tokens: int) -> Pattern:
        for order in ("morton", "tile"):  # compact patches instead of pieces of lines
            try:
                token_order(self.shape, order)
            except ValueError:
                continue
            return self if self.order != "raster" else dataclasses.replace(self, order=order)  # type: ignore[type-var]
        return self

    def _fit(self, grid: Grid) -> None:
        tokens = max(grid.kv_len, grid.q_offset + grid.q_len)
        if tokens > self.shape[0] * self.shape[1]:
            height, width = self.shape
            raise ValueError(
                f"{self}: an image of {height} x {width} has {height * width:,} tokens; the sequence has {tokens:,}"
            )

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit(grid)
        block_of = self._block_of_pixel(grid.bk)
        rows = []
        cols = []
        for row in range(grid.rows):
            begin = max(row * grid.bq + grid.q_offset, 0)
            end = min(row * grid.bq + grid.bq, grid.q_len) + grid.q_offset
            if begin >= end:
                continue
            y, x = (axis[begin:end] for axis in self._pixels)
            found = np.unique(block_of[self.halo(y, x)])
            rows.append(np.full(found.size, row, np.int64))
            cols.append(found)
        none = np.empty(0, np.int64)
        row_of, col_of = np.concatenate([none, *rows]), np.concatenate([none, *cols])
        inside = col_of < grid.cols
        return row_of[inside], col_of[inside]

    def _block_of_pixel(self, size: int) -> Ints:
        """Key block of each pixel, [H, W]."""
        _, positions = token_order(self.shape, self.order)
        blocks: Ints = (positions // size).reshape(self.shape)
        return blocks

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        """A tile is known from how the pixels lie inside the two blocks and from the step between the blocks."""
        q_kind, qy, qx = self._layouts(grid.q_start(np.arange(grid.rows, dtype=np.int64)), grid.bq)
        k_kind, ky, kx = self._layouts(grid.k_start(np.arange(grid.cols, dtype=np.int64)), grid.bk)
        return joint_key(q_kind[rows], k_kind[cols], ky[cols] - qy[rows], kx[cols] - qx[rows])

    def _layouts(self, starts: Ints, size: int) -> tuple[Ints, Ints, Ints]:
        """Per block: which of the distinct layouts its pixels have, and the pixel they are counted from."""
        y, x, inside = self._at(starts[:, None] + np.arange(size))
        first = inside.argmax(axis=1)[:, None]
        y0, x0 = np.take_along_axis(y, first, 1), np.take_along_axis(x, first, 1)
        # A position outside the image is a layout of its own.
        code = np.where(inside, (y - y0) * (4 * self.shape[1]) + (x - x0), np.iinfo(np.int64).max)
        kinds: dict[bytes, int] = {}
        kind = np.array([kinds.setdefault(line.tobytes(), len(kinds)) for line in code], np.int64)
        return kind, y0[:, 0], x0[:, 0]


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

    def near(self, dy: Ints, dx: Ints) -> Bools:
        ry, rx = self._reach
        return np.asarray((np.abs(dy) <= ry) & (np.abs(dx) <= rx))

    def halo(self, y: Ints, x: Ints) -> tuple[Ints, Ints]:
        (ry, rx), (height, width) = self._reach, self.shape
        rows = np.arange(max(int(y.min()) - ry, 0), min(int(y.max()) + ry + 1, height))
        cols = np.arange(max(int(x.min()) - rx, 0), min(int(x.max()) + rx + 1, width))
        return rows[:, None], cols[None, :]


@dataclass(frozen=True, repr=False)
class Axial(ImagePattern):
    """See :func:`axial`."""

    shape: tuple[int, int]
    order: str = "raster"
    name = "axial"

    def near(self, dy: Ints, dx: Ints) -> Bools:
        return np.asarray((dy == 0) | (dx == 0))

    def halo(self, y: Ints, x: Ints) -> tuple[Ints, Ints]:
        height, width = self.shape
        in_rows = np.stack(np.broadcast_arrays(np.unique(y)[:, None], np.arange(width)[None, :])).reshape(2, -1)
        in_cols = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.unique(x)[None, :])).reshape(2, -1)
        both = np.concatenate([in_rows, in_cols], axis=1)
        return both[0], both[1]


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
