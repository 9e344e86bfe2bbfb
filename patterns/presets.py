"""Masks of published models, by their names and in their terms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.causal import causal
from sparseflash.patterns.cells import CellPattern
from sparseflash.patterns.composed import Composed, star
from sparseflash.patterns.fixed import fixed
from sparseflash.patterns.global_tokens import global_tokens
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.local import local
from sparseflash.patterns.pattern import Bools, Pattern, checked_int
from sparseflash.patterns.random_blocks import random_blocks
from sparseflash.patterns.strided import strided


@dataclass(frozen=True, repr=False)
class NearCells(CellPattern):
    """``abs(a - b) <= reach`` cells. Not public: BigBird's window is counted in blocks."""

    reach: int
    unit: int
    name = "near_cells"

    def cells(self, a: Ints, b: Ints) -> Bools:
        return np.asarray(np.abs(a - b) <= self.reach)

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        first, last = self.row_cells(grid, grid.all_rows())
        return self.expand_cells(grid, grid.all_rows(), first - self.reach, last + self.reach)


@dataclass(frozen=True, repr=False)
class BigBird(Composed):
    """See :func:`bigbird`."""

    unit: int = 64
    window: int = 3
    global_cells: int = 2
    random: int = 3
    seed: int = 0
    name = "bigbird"

    def expression(self) -> Pattern:
        near = NearCells(self.window // 2, self.unit)
        return near | global_tokens(self.global_cells * self.unit) | random_blocks(self.random, self.unit, self.seed)


def bigbird(unit: int = 64, window: int = 3, global_cells: int = 2, random: int = 3, seed: int = 0) -> Pattern:
    """Window, global and random cells: Zaheer et al., "Big Bird" (2020), section 2, internal construction.

    Args:
        unit: tokens per cell, the paper's block size.
        window: cells in the window, an odd number, with the query's own cell in the middle.
        global_cells: leading cells that see all and are seen by all.
        random: random cells for each query cell.
        seed: seed of the random cells.

    Raises:
        TypeError: an argument is not an int.
        ValueError: an argument is out of range, or window is even.

    Example:
        >>> from sparseflash import patterns as P
        >>> round(P.bigbird().compile(4096, block=64).density, 3)
        0.148
    """
    window = checked_int("bigbird", "window", window, 1)
    if window % 2 == 0:
        raise ValueError(f"bigbird: window must be odd, the query's own cell in the middle, got window={window}")
    return BigBird(
        checked_int("bigbird", "unit", unit, 1),
        window,
        checked_int("bigbird", "global_cells", global_cells, 0),
        checked_int("bigbird", "random", random, 0),
        checked_int("bigbird", "seed", seed, 0),
    )


def longformer(window: int = 512, global_count: int = 1) -> Pattern:
    """Sliding window with global tokens: Beltagy et al., "Longformer" (2020), section 3.1.

    Args:
        window: tokens in the window, half on either side, as the paper counts it.
        global_count: leading tokens that see all and are seen by all, e.g. the classification token.

    Raises:
        TypeError: an argument is not an int.
        ValueError: window below 2, or global_count negative.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.longformer(512)
        local(256) | global_tokens(1)
    """
    window = checked_int("longformer", "window", window, 2)
    return local(window // 2) | global_tokens(checked_int("longformer", "global_count", global_count, 0))


def sparse_transformer_strided(stride: int) -> Pattern:
    """The strided mask of Child et al., "Sparse Transformers" (2019), section 4.2, both heads' parts in one.

    Raises:
        TypeError: stride is not an int.
        ValueError: stride is below 1.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.sparse_transformer_strided(128)
        causal() & (local(128) | strided(128))
    """
    return causal() & (local(checked_int("sparse_transformer_strided", "stride", stride, 1)) | strided(stride))


def sparse_transformer_fixed(stride: int, summary: int) -> Pattern:
    """The fixed mask of Child et al., "Sparse Transformers" (2019), section 4.2, both heads' parts in one.

    Raises:
        TypeError: an argument is not an int.
        ValueError: stride below 1, or summary not in 0..stride.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.sparse_transformer_fixed(128, 8)
        causal() & fixed(128, 8)
    """
    return causal() & fixed(stride, summary)


def star_transformer() -> Pattern:
    """Guo et al., "Star-Transformer" (2019), with the relay node as token 0: another name of ``star()``.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.star_transformer()
        star()
    """
    return star()
