"""Patterns of known size one after another in a row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from textwrap import shorten

import numpy as np

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.grid import LARGEST, Grid, Ints
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.pattern import LEAF, Bools, Group, Pattern, check_operands
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.placing import Stretch, placed
from sparseflash.patterns.set_operations import difference, full_mask, union


@dataclass(frozen=True, repr=False)
class Packed(Pattern):
    """See :func:`packed`."""

    parts: tuple[Pattern, ...]
    name = "packed"

    def __str__(self) -> str:
        return f"packed({', '.join(map(str, self.parts))})"

    __repr__ = __str__

    @cached_property
    def _stretches(self) -> list[tuple[Pattern, int, int]]:
        """Each part, with the positions of its first token and of the one past its last."""
        sizes = [part.known_size or 0 for part in self.parts]
        edges = np.cumsum([0, *sizes]).tolist()
        return [(part, start, stop) for part, (start, stop) in zip(self.parts, pairwise(edges), strict=True)]

    @property
    def known_size(self) -> int:
        return self._stretches[-1][2]

    def at(self, grid: Grid) -> Packed:
        # A part has its own length, even if the grid ends before it.
        whole = [(part, Grid(stop - start, stop - start, grid.bq, grid.bk, 0)) for part, start, stop in self._stretches]
        return Packed(tuple(part.at(grid) if grid.q_len else part for part, grid in whole))

    def placed_images(self, start: int = 0) -> set[PlacedImage]:
        return set().union(*(part.placed_images(start + first) for part, first, _ in self._stretches))

    def coarser(self, tokens: int) -> Pattern:
        return Packed(tuple(part.coarser(tokens) for part in self.parts))

    def allows(self, q: Ints, k: Ints) -> Bools:
        seen: Bools = np.zeros(np.broadcast_shapes(np.shape(q), np.shape(k)), bool)
        for part, start, stop in self._stretches:
            here = (q >= start) & (q < stop) & (k >= start) & (k < stop)
            if here.any():
                # Each part gets only its own positions.
                own = (np.clip(position, start, stop - 1) - start for position in (q, k))
                seen = seen | (here & part.allows(*own))
        return seen

    def compile_on(self, grid: Grid) -> BlockMask:
        masks: list[MaskData] = []
        for part, start, stop in self.at(grid)._stretches:
            stretch = Stretch.of(grid, start, stop)
            if stretch is not None:
                masks.append(placed(compile_pattern(part, stretch.grid), grid, stretch.query, stretch.key))
        while len(masks) > 1:  # in pairs, and these in pairs: each block is copied O(log n) times
            half = len(masks) // 2
            masks = [*map(union, masks[:half], masks[half:]), *masks[2 * half :]]
        return BlockMask.of(masks[0] if masks else difference(full_mask(grid), full_mask(grid)))


def packed(*patterns: Pattern) -> Pattern:
    """Patterns of known size one after another in a row; the tokens of each see only each other.

    For images of several sizes, or images with their own text, packed into one row of a batch. The rest of a longer row
    sees nothing and is seen by nothing, so a batch of rows of equal length is
    ``per_sample(packed(...), packed(...))``.

    Compiling places the masks of the patterns, in time linear in their stored blocks, wherever they begin. So
    ``packed(a | b, c | d)`` and ``packed(a, c) | packed(b, d)`` allow the same pairs if sizes agree, and likewise for
    ``&`` and ``-``; ``~packed(...)`` also allows the pairs between patterns.

    Args:
        *patterns: patterns whose number of tokens is known: of an image or a video (``shape``), ``documents``,
            ``beside`` such a pattern, ``packed``, and expressions that contain one of these. For another pattern, write
            ``documents([n]) & pattern`` for n tokens.

    Raises:
        TypeError: an operand is not a pattern.
        ValueError: no operand, or one whose number of tokens is unknown; when compiling, an error of a pattern.

    Example:
        >>> from sparseflash import patterns as P
        >>> row = P.packed(P.neighborhood((1, 3), (0, 1)), P.documents([2]) & P.causal())
        >>> row.known_size
        5
        >>> row.compile(6, block=16).to_dense().astype(int)
        array([[1, 1, 0, 0, 0, 0],
               [1, 1, 1, 0, 0, 0],
               [0, 1, 1, 0, 0, 0],
               [0, 0, 0, 1, 0, 0],
               [0, 0, 0, 1, 1, 0],
               [0, 0, 0, 0, 0, 0]])
    """
    check_operands("packed", patterns)
    for index, pattern in enumerate(patterns):
        if pattern.known_size is None:
            inner = str(pattern) if pattern.precedence == LEAF else str(Group(pattern))
            raise ValueError(
                f"packed: operand {index}, {shorten(str(pattern), 200)}, does not say, or not in one way, for how many "
                f"tokens it is; for n tokens write documents([n]) & {shorten(inner, 200)}"
            )
    row = Packed(patterns)
    if row.known_size > LARGEST:
        raise ValueError(f"packed: the patterns have {row.known_size:,} tokens together, at most 2**40 can be packed")
    return row
