"""Windows around the positions of a line, an image or a video."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from sparseflash.patterns.image import ImagePattern, Layout, Term, checked_grid
from sparseflash.patterns.ordering import TILES
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.per_axis import bools_per_axis, ints_per_axis, shortest, spread
from sparseflash.patterns.span import Span

BORDERS = ("clip", "shift")


@dataclass(frozen=True, repr=False)
class Neighborhood(ImagePattern):
    """See :func:`neighborhood`, with a radius."""

    shape: tuple[int, ...]
    radius: int | tuple[int, ...]
    order: str = "raster"
    tile: tuple[int, ...] | None = None
    name = "neighborhood"

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.order, self.tile)

    def terms(self) -> tuple[Term, ...]:
        radii = spread(self.radius, len(self.shape))
        return (tuple(Span.offsets(n, -r, r) for n, r in zip(self.shape, radii, strict=True)),)


@dataclass(frozen=True, repr=False)
class Windows(ImagePattern):
    """See :func:`neighborhood`, with a kernel size."""

    shape: tuple[int, ...]
    kernel_size: int | tuple[int, ...] = 0  # always given; a field with a default is written by name in text
    order: str = "raster"
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    border: str = "shift"
    tile: tuple[int, ...] | None = None
    name = "neighborhood"

    @property
    def layout(self) -> Layout:
        return Layout(self.shape, self.order, self.tile)

    def coarser(self, tokens: int) -> Pattern:
        # One window for all queries of a tile, in tile order, so that a block is a tile.
        axes = len(self.shape)
        sizes = spread(self.kernel_size, axes)
        if self.dilation != 1 or self.is_causal is not False:
            return super().coarser(tokens)
        if self.order == "tile" and spread(self.stride, axes) == (self.tile or TILES[axes]):
            return self
        tile = compact_tile(self.shape, sizes, tokens)
        whole = tuple(_whole_tiles(n, w, t) for n, w, t in zip(self.shape, sizes, tile, strict=True))
        return neighborhood(self.shape, None, "tile", kernel_size=whole, stride=tile, border=self.border, tile=tile)

    def terms(self) -> tuple[Term, ...]:
        axes = len(self.shape)
        sizes, strides, dilations = (spread(x, axes) for x in (self.kernel_size, self.stride, self.dilation))
        each = zip(self.shape, sizes, strides, dilations, spread(self.is_causal, axes), strict=True)
        return (tuple(_window(n, w, s, d, causal, self.border == "shift") for n, w, s, d, causal in each),)


def compact_tile(shape: tuple[int, ...], window: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Sides of a tile of at most ``tokens`` tokens: if possible at most half the window, and divisors of the shape."""
    tile = [1] * len(shape)

    def cost(axis: int) -> tuple[bool, bool, float]:
        side = 2 * tile[axis]
        return 2 * side > window[axis], shape[axis] % side > 0, side / window[axis]

    while True:
        room = [axis for axis, w in enumerate(window) if 2 * tile[axis] <= w]
        if not room or 2 * prod(tile) > tokens:
            return tuple(tile)
        tile[min(room, key=cost)] *= 2


def _whole_tiles(n: int, window: int, side: int) -> int:
    """The size of a window, in positions, of an odd number of tiles, with the query's own tile in the middle."""
    tiles = 2 * round((window / side - 1) / 2) + 1
    return side * (tiles if side * tiles <= n else tiles - 2)


def _window(n: int, size: int, stride: int, dilation: int, causal: bool, shift: bool) -> Span:
    """NATTEN's window along one axis."""
    q = np.arange(n, dtype=np.int64)
    at, residue = q // dilation, q % dilation  # coordinates count the positions of one residue class
    last = (n - 1 - residue) // dilation
    if causal:
        leader = np.minimum(stride * (at // stride) + stride - 1, last)
        first, end = leader - size + 1, at
    else:
        leader = np.minimum(stride * (at // stride) + stride // 2, last)
        before, after = size // 2, size // 2 - 1 + size % 2
        centre = np.minimum(np.maximum(leader, before), last - after) if shift else leader
        first, end = centre - before, centre + after
    return Span.of(first * dilation + residue, end * dilation + residue + 1, dilation)


def _check_windows(
    shape: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    causal: tuple[bool, ...],
    border: str,
) -> None:
    """Raise ValueError for the first axis with an invalid dilation, window or stride."""
    for axis, (n, w, s, d) in enumerate(zip(shape, sizes, strides, dilations, strict=True)):
        if d > n:
            raise ValueError(
                f"neighborhood: dilation must be at most the {n} places of axis {axis}, got {d}; nearest is "
                f"dilation={_nearest(dilations, shape)}"
            )
        room = n // d  # positions of the smallest residue class
        if border == "shift" and not causal[axis] and w > room:
            among = f", {room} of them a dilation of {d} apart" if d > 1 else ""
            fitting = tuple(
                w if later else n // d for n, w, d, later in zip(shape, sizes, dilations, causal, strict=True)
            )
            raise ValueError(
                f"neighborhood: a window of {w} does not fit axis {axis} of {n} places{among}; nearest is "
                f"kernel_size={_nearest(sizes, fitting)}, or border='clip' to cut windows at the border"
            )
        if s > w:
            raise ValueError(
                f"neighborhood: stride must be at most the window of {w} along axis {axis}, got {s}: some queries "
                f"would not see themselves; nearest is stride={_nearest(strides, sizes)}"
            )


def _nearest(values: tuple[int, ...], most: tuple[int, ...]) -> str:
    """The text of an argument with every entry that is too large replaced by the largest that fits."""
    return repr(shortest(tuple(min(value, largest) for value, largest in zip(values, most, strict=True))))


def neighborhood(
    shape: tuple[int, ...],
    radius: int | tuple[int, ...] | None = None,
    order: str = "raster",
    *,
    kernel_size: int | tuple[int, ...] | None = None,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    is_causal: bool | tuple[bool, ...] = False,
    border: str | None = None,
    tile: tuple[int, ...] | None = None,
) -> Pattern:
    """A window around each position of a line, an image or a video, the product of one window along each axis.

    With ``radius``, ``abs(d) <= r`` along each axis: stand-alone self-attention of Ramachandran et al. (2019), section
    3, without shifting the window at the border.

    With ``kernel_size``, neighborhood attention as NATTEN defines it: Hassani et al.,
    https://arxiv.org/abs/2204.07143, with the strides of https://arxiv.org/abs/2504.16922. Along an axis of n
    positions, coordinates count the L positions with the same residue modulo the dilation; a query sees only its own
    residue class. For a window of w and a stride of s, its *leader* is ``min(s * (q // s) + s // 2, L - 1)``, and it
    sees the w coordinates from ``c - w // 2`` on, where c is the leader (border ``"clip"``), or the nearest centre at
    which the whole window fits (``"shift"``). Along a causal axis the leader is ``min(s * (q // s) + s - 1, L - 1)``,
    and the query sees those of the w coordinates up to the leader that do not come after the query itself.

    Args:
        shape: positions along 1 to 3 axes, such as (height, width) or (frames, height, width); their product is the
            number of tokens.
        radius: positions seen on either side, one number or one for each axis.
        order: the order of positions as tokens, see :func:`sparseflash.ordering.token_order`. In tile, Morton or
            Hilbert order a block is compact and touches few others; in raster order it is part of a line and touches
            many.
        kernel_size: positions seen along each axis, odd or even; an alternative to ``radius``.
        stride: number of neighbouring queries that share one window. A stride equal to the tile stores the fewest
            blocks.
        dilation: distance between the positions seen.
        is_causal: whether to hide later positions along the axis, such as later frames.
        border: for windows that reach over the border, ``"shift"`` keeps their size, as NATTEN does, and is the default
            with a kernel size; ``"clip"`` cuts them off.
        tile: sides of a tile for order ``"tile"``; default ``(64,)``, ``(8, 8)`` or ``(4, 4, 4)``.

    Raises:
        TypeError: shape, radius or another argument per axis does not consist of ints.
        ValueError: neither radius nor kernel_size, or both; an unknown order or border; a negative radius; a window
            with ``"shift"`` that is larger than its axis, a stride larger than its window; when compiling, a sequence
            longer than the grid.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.neighborhood((5,), kernel_size=3).compile(5, block=16).to_dense().astype(int)
        array([[1, 1, 1, 0, 0],
               [1, 1, 1, 0, 0],
               [0, 1, 1, 1, 0],
               [0, 0, 1, 1, 1],
               [0, 0, 1, 1, 1]])
        >>> for order in ("raster", "morton"):
        ...     mask = P.neighborhood((128, 128), 8, order).compile(128 * 128)
        ...     print(order, f"{mask.density:.1%} of the blocks for {mask.token_density:.1%} of the pairs")
        raster 12.8% of the blocks for 1.6% of the pairs
        morton 6.2% of the blocks for 1.6% of the pairs
        >>> for stride in (1, 4):  # with a stride of the tile, windows are made of whole tiles
        ...     video = P.neighborhood((8, 16, 16), kernel_size=(4, 12, 12), stride=stride, order="tile")
        ...     mask = video.compile(8 * 16 * 16, block=64)
        ...     print(stride, f"{mask.density / mask.token_density:.1f} stored for each allowed pair")
        1 2.7 stored for each allowed pair
        4 1.0 stored for each allowed pair
    """
    owner = "neighborhood"
    shape, tile = checked_grid(owner, shape, order, tile)
    axes = len(shape)
    if (radius is None) == (kernel_size is None):
        raise ValueError(f"{owner}: give a radius or a kernel_size, got radius={radius!r}, kernel_size={kernel_size!r}")
    if border is not None and border not in BORDERS:
        raise ValueError(f"{owner}: border must be one of {', '.join(BORDERS)}; got {border!r}")
    if radius is not None:
        radii = ints_per_axis(owner, "radius", radius, axes, 0)
        if border == "shift" or (stride, dilation, is_causal) != (1, 1, False):
            size = shortest(tuple(2 * r + 1 for r in radii))
            raise ValueError(
                f"{owner}: stride, dilation, is_causal and border='shift' are for windows of a kernel size: write "
                f"kernel_size={size!r} instead of radius={radius!r}"
            )
        return Neighborhood(shape, radii if isinstance(radius, tuple | list) else radii[0], order, tile)
    assert kernel_size is not None
    sizes = ints_per_axis(owner, "kernel_size", kernel_size, axes, 1)
    strides = ints_per_axis(owner, "stride", stride, axes, 1)
    dilations = ints_per_axis(owner, "dilation", dilation, axes, 1)
    causal = bools_per_axis(owner, "is_causal", is_causal, axes)
    border = border or "shift"
    _check_windows(shape, sizes, strides, dilations, causal, border)
    return Windows(
        shape, shortest(sizes), order, shortest(strides), shortest(dilations), shortest(causal), border, tile
    )
