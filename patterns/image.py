"""Patterns of tokens that are the places of a grid: a line, an image, a video or a volume, in some order.

Such a pattern is a union of products: along each axis, a place sees a stretch of places. It is compiled axis by axis.
Blocks whose boxes do not meet are never looked at, and a tile is the intersection of one tile an axis, of which there
are few: that along the frames is known once for all rows and columns.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple, TypeAlias

import numpy as np

from sparseflash.patterns.axis_tiles import NOWHERE, AxisTiles
from sparseflash.patterns.cache_budget import MASKS
from sparseflash.patterns.descent import Boxes, pairs_that_meet
from sparseflash.patterns.grid import Grid, Ints, is_int
from sparseflash.patterns.misuse import too_long
from sparseflash.patterns.ordering import TILES, token_order
from sparseflash.patterns.pattern import Bools, Pattern
from sparseflash.patterns.per_axis import ints_per_axis
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.runs import frozen
from sparseflash.patterns.span import Places, Span
from sparseflash.patterns.tiles import Words

MAX_PLACES = 1 << 28  # the order of larger grids would take gigabytes

Term: TypeAlias = tuple[Span, ...]  # an axis each


class Layout(NamedTuple):
    """A grid of places, and how they become tokens: see :func:`sparseflash.ordering.token_order`."""

    shape: tuple[int, ...]
    order: str = "raster"
    tile: tuple[int, ...] | None = None


class ImagePattern(Pattern):
    """Base of patterns that are unions of products of spans."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The grid, and how its places become tokens."""

    @property
    def orders_tokens(self) -> bool:
        return self.layout.order != "raster"

    @property
    def known_size(self) -> int:
        return prod(self.layout.shape)

    def placed_images(self, start: int = 0) -> set[PlacedImage]:
        return {PlacedImage(start, *self.layout)}

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """Products of what is seen along each axis; a query sees what any of them allows."""

    @cached_property
    def spans(self) -> tuple[Term, ...]:
        return self.terms()

    @cached_property
    def _places(self) -> Places:
        """Coordinates of the place at each position, [axes, places]."""
        shape, order, tile = self.layout
        places, _ = token_order(shape, order, tile=tile)
        return frozen(np.stack(np.unravel_index(places, shape)).astype(np.int32))

    def allows(self, q: Ints, k: Ints) -> Bools:
        (at_q, q_in), (at_k, k_in) = self._at(q), self._at(k)
        seen = np.zeros(np.broadcast_shapes(np.shape(q), np.shape(k)), bool)
        for term in self.spans:
            holds = np.broadcast_to(q_in & k_in, seen.shape).copy()
            for span, of_q, of_k in zip(term, at_q, at_k, strict=True):
                if not span.unbounded:
                    holds &= span.allows(of_q, of_k)
            seen |= holds
        return seen

    def _at(self, position: Ints) -> tuple[Places, Bools]:
        """Coordinates; positions outside the grid see nothing and are seen by nothing."""
        inside = np.asarray((position >= 0) & (position < self._places.shape[1]))
        return self._places[:, np.where(inside, position, 0)], inside

    def coarser(self, tokens: int) -> Pattern:
        # Compact patches instead of pieces of lines.
        if self.layout.order != "raster" or "order" not in self.__dataclass_fields__:  # type: ignore[attr-defined]
            return self
        return dataclasses.replace(self, order="morton")  # type: ignore[type-var]

    def _fit(self, grid: Grid) -> None:
        tokens, places = max(grid.kv_len, grid.q_offset + grid.q_len), self._places.shape[1]
        if tokens > places:
            raise ValueError(f"{self}: a grid of {' x '.join(map(str, self.layout.shape))} {too_long(places, tokens)}")

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit(grid)
        first_row, q = self._boxes(grid.q_start(grid.all_rows()), grid.q_last(grid.all_rows()) + 1)
        cols = np.arange(grid.cols, dtype=np.int64)
        first_col, k = self._boxes(grid.k_start(cols), np.minimum(grid.k_start(cols) + grid.bk, grid.kv_len))
        if not q.number or not k.number:
            return cols[:0], cols[:0]
        rows, cols = pairs_that_meet(q, k, self._meets)
        return grid.unique(rows + first_row, cols + first_col)

    def _boxes(self, starts: Ints, stops: Ints) -> tuple[int, Boxes]:
        """The first block with tokens of the grid, and the boxes around those of this and all later blocks."""
        number = self._places.shape[1]
        starts, stops = np.clip(starts, 0, number), np.clip(stops, 0, number)
        some = np.flatnonzero(starts < stops)
        if not some.size:
            return 0, Boxes(self._places[:, :0], self._places[:, :0])
        here = self._places[:, : stops[some[-1]]]
        first, last = (f.reduceat(here, starts[some], axis=1) for f in (np.minimum, np.maximum))
        return int(some[0]), Boxes(first, last)

    def _meets(self, q: Boxes, i: Ints, k: Boxes, j: Ints) -> Bools:
        seen, left = np.zeros(i.size, bool), np.arange(i.size)
        for term in self.spans:
            here = left
            for axis, span in enumerate(term):
                if not span.unbounded and here.size:
                    at_q, at_k = i[here], j[here]
                    boxes = q.first[axis][at_q], q.last[axis][at_q], k.first[axis][at_k], k.last[axis][at_k]
                    here = here[span.meets(*boxes)]
            seen[here] = True
            left = left[~seen[left]]
        return seen

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return tiles_on_axes(self, grid).kinds(rows, cols) if rows.size else rows

    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Words:
        return tiles_on_axes(self, grid).tiles(rows, cols)

    def places_of(self, begin: int, stop: int, size: int) -> Places:
        """Coordinates of the tokens from ``begin`` to before ``stop`` in blocks of a size, [axes, blocks, size]."""
        axes, number = self._places.shape
        places = np.full((axes, -(-(stop - begin) // size) * size), NOWHERE)
        first, last = max(begin, 0), min(stop, number)
        if first < last:
            places[:, first - begin : last - begin] = self._places[:, first:last]
        return places.reshape(axes, -1, size)


@MASKS.bounds
@lru_cache(maxsize=1)  # asked for while one mask is compiled, a few blocks at a time
def tiles_on_axes(pattern: ImagePattern, grid: Grid) -> AxisTiles:
    q = pattern.places_of(grid.q_offset, grid.q_offset + grid.q_len, grid.bq)
    tiles = AxisTiles(pattern.spans, q, pattern.places_of(0, grid.kv_len, grid.bk))
    MASKS.spend(tiles.nbytes)
    return tiles


def checked_grid(
    owner: str, shape: tuple[int, ...], order: str, tile: tuple[int, ...] | None
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """A shape and a tile for which the order can be made; no tile where it is the one of 64 tokens."""
    if not isinstance(shape, tuple | list) or not 1 <= len(shape) <= 3 or not all(is_int(n) for n in shape):
        raise TypeError(
            f"{owner}: shape must be 1 to 3 ints, such as (height, width) or (frames, height, width), got {shape!r}"
        )
    sides = tuple(int(n) for n in shape)
    if prod(sides) > MAX_PLACES:
        raise ValueError(f"{owner}: shape={shape} has more than 2**28 places")
    if tile is not None:
        if order != "tile":
            raise ValueError(f"{owner}: tile={tile!r} is for order='tile', got order={order!r}")
        tile = ints_per_axis(owner, "tile", tile, len(sides), 1)
    token_order(sides, order, tile=tile)
    return sides, None if tile == TILES[len(sides)] else tile
