"""Lines through each place of an image or a video."""

from __future__ import annotations

from dataclasses import dataclass

from sparseflash.patterns.image import ImagePattern, Layout, Term, checked_grid
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.span import Span


@dataclass(frozen=True, repr=False)
class Axial(ImagePattern):
    """See :func:`axial`."""

    shape: tuple[int, ...]
    order: str = "raster"
    tile: tuple[int, ...] | None = None
    name = "axial"

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.order, self.tile)

    def terms(self) -> tuple[Term, ...]:
        along = [Span.everything(n) for n in self.shape]
        same = [Span.offsets(n, 0, 0) for n in self.shape]
        axes = range(len(self.shape))
        return tuple(tuple(along[a] if a == line else same[a] for a in axes) for line in axes)


def axial(shape: tuple[int, ...], order: str = "raster", *, tile: tuple[int, ...] | None = None) -> Pattern:
    """Query and key share a line along an axis: Ho et al., "Axial Attention" (2019).

    In an image: in the same row or the same column. In a video: at the same place of another frame, or in the same row
    or the same column of one frame.

    Args:
        shape: places along 1 to 3 axes, such as (height, width) or (frames, height, width); their product is the
            number of tokens.
        order: how places become tokens, see :func:`sparseflash.ordering.token_order`.
        tile: places of a tile of order ``"tile"``; default ``(64,)``, ``(8, 8)`` or ``(4, 4, 4)``.

    Raises:
        TypeError: shape is not made of ints.
        ValueError: an unknown order or a tile of other axes; when compiling, a sequence longer than the grid.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.axial((2, 3)).compile(6, block=16).to_dense()[0].astype(int)
        array([1, 1, 1, 1, 0, 0])
        >>> P.axial((2, 2, 2)).compile(8, block=16).to_dense()[0].astype(int)
        array([1, 1, 1, 0, 1, 0, 0, 0])
    """
    shape, tile = checked_grid("axial", shape, order, tile)
    return Axial(shape, order, tile)
