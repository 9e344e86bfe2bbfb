"""Tokens of another kind, such as text, before and after those of a pattern."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from textwrap import shorten

import numpy as np

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.documents import documents
from sparseflash.patterns.grid import LARGEST, Grid, Ints
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.packed import packed
from sparseflash.patterns.pattern import Bools, Pattern, checked_int, instead
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.placing import Stretch, placed
from sparseflash.patterns.rasterize import evaluated
from sparseflash.patterns.runs import Runs
from sparseflash.patterns.set_operations import union
from sparseflash.patterns.tiles import TileSet

ENDLESS = 1 << 60  # no position is as large, and sums of a few stay inside int64


@dataclass(frozen=True, repr=False)
class Margins(Pattern):
    """What tokens before ``start`` and from ``stop`` to ``tokens`` see, and who sees them."""

    start: int
    stop: int
    tokens: int
    sees: bool
    seen: bool
    name = "margins"

    def _kinds(self, position: Ints) -> tuple[Bools, Bools]:
        """Whether positions are in the margins, and whether between them."""
        inside = (position >= self.start) & (position < self.stop)
        return (position >= 0) & (position < self.tokens) & ~inside, inside

    def allows(self, q: Ints, k: Ints) -> Bools:
        (q_margin, q_inside), (k_margin, k_inside) = self._kinds(q), self._kinds(k)
        allowed: Bools = q_margin & (k_margin | (k_inside & self.sees)) | (q_inside & self.seen & k_margin)
        return allowed

    def compile_on(self, grid: Grid) -> BlockMask:
        """A matrix of rectangles: one block is evaluated of each."""
        edges = np.array([0, self.start, self.stop, self.tokens])
        rows, cols = _cuts(edges - grid.q_offset, grid.bq, grid.rows), _cuts(edges, grid.bk, grid.cols)
        tiles = TileSet(grid.bq, grid.bk)
        kinds = evaluated(self, grid, np.repeat(rows, cols.size), np.tile(cols, rows.size), tiles)
        reserve(grid.rows * cols.size, 80)
        line = grid.all_rows()
        kind = np.searchsorted(rows, line, side="right") - 1
        start, stop = (line[:, None] * grid.cols + at for at in (cols, np.append(cols[1:], grid.cols)))
        runs = Runs(grid.shape, start.ravel(), stop.ravel(), kinds.reshape(rows.size, cols.size)[kind].ravel())
        return BlockMask.of(MaskData.canonical(grid, runs, tiles.tiles()))


def _cuts(edges: Ints, size: int, blocks: int) -> Ints:
    """Where lines of blocks begin that are alike: those that hold an edge, and the last one, are by themselves."""
    near = np.concatenate([edges // size, -(-edges // size), [0, blocks - 1]])
    return np.unique(np.clip(near, 0, blocks - 1))


@dataclass(frozen=True, repr=False)
class Beside(Pattern):
    """See :func:`beside`."""

    pattern: Pattern
    before: int = 0
    after: int = 0
    sees: bool = True
    seen: bool = True
    name = "beside"

    @property
    def known_size(self) -> int | None:
        size = self.pattern.known_size
        return None if size is None else self.before + size + self.after

    def _inside(self, tokens: int) -> int:
        """Tokens of the pattern in a row of so many."""
        size = self.pattern.known_size
        return max(tokens - self.before - self.after, 0) if size is None else size

    def _margins(self, inside: int) -> Margins:
        stop = self.before + inside
        return Margins(self.before, stop, stop + self.after, self.sees, self.seen)

    def at(self, grid: Grid) -> Pattern:
        inside = self._inside(_tokens(grid))
        pattern = self.pattern.at(Grid(inside, inside, grid.bq, grid.bk, 0)) if inside else self.pattern
        if self.known_size is None and self.after:  # where the last tokens stand, other rows are not to change
            return packed(dataclasses.replace(self, pattern=documents([inside]) & pattern))
        return dataclasses.replace(self, pattern=pattern)

    def placed_images(self, start: int = 0) -> set[PlacedImage]:
        return self.pattern.placed_images(start + self.before)

    def coarser(self, tokens: int) -> Pattern:
        return dataclasses.replace(self, pattern=self.pattern.coarser(tokens))

    def allows(self, q: Ints, k: Ints) -> Bools:
        size = self.pattern.known_size
        if size is None and self.after:
            raise ValueError(
                f"{self}: which tokens are the last {self.after:,} depends on how many there are; compile it"
            )
        inside = ENDLESS if size is None else size
        (_, q_inside), (_, k_inside) = (self._margins(inside)._kinds(position) for position in (q, k))
        allowed, here = self._margins(inside).allows(q, k), q_inside & k_inside
        if here.any():
            # The pattern is asked about positions of its own alone.
            own = (np.clip(position - self.before, 0, inside - 1) for position in (q, k))
            allowed = allowed | (here & self.pattern.allows(*own))
        return allowed

    def _fit(self, grid: Grid) -> None:
        tokens, size = _tokens(grid), self.known_size
        least = self.before + self.after if size is None else size
        kinds = f"{self.before:,} + {'n' if size is None else f'{size - self.before - self.after:,}'} + {self.after:,}"
        if size is not None and tokens > size:
            over = tokens - size
            raise ValueError(
                f"{self._shortened()} is for {kinds} = {size:,} tokens; the sequence has {tokens:,}, {over:,} over. "
                f"If they stand after the others, give after={self.after + over}; if they are padding, write "
                f"packed({self._shortened()})"
            )
        if self.after and tokens < least:
            raise ValueError(
                f"{self._shortened()} is for {kinds} tokens; the sequence has {tokens:,}, {least - tokens:,} too few "
                "for the last ones to be there"
            )

    def _shortened(self) -> str:
        return shorten(str(self), 200)

    def compile_on(self, grid: Grid) -> BlockMask:
        self._fit(grid)
        inside = self._inside(_tokens(grid))
        mask = compile_pattern(self._margins(inside), grid)
        stretch = Stretch.of(grid, self.before, self.before + inside)
        if stretch is None:
            return mask
        whole = Grid(inside, inside, grid.bq, grid.bk, 0)
        inner = compile_pattern(self.pattern.at(whole), stretch.grid)
        return BlockMask.of(union(mask, placed(inner, grid, stretch.query, stretch.key)))


def _tokens(grid: Grid) -> int:
    """Of the row that queries and keys are taken from."""
    return max(grid.kv_len, grid.q_offset + grid.q_len)


def beside(pattern: Pattern, before: int = 0, after: int = 0, sees: bool = True, seen: bool = True) -> Pattern:
    """A pattern with tokens of another kind before and after its own, which see all and are seen by all.

    For example text beside an image or a video in joint attention, a class token, or registers. The pattern's positions
    count from the first of its own tokens: ``beside(pattern, before=b)`` lets q see k if ``pattern`` lets q - b see
    k - b. Compiling moves the pattern's own mask, in time linear in its stored blocks, for any number of tokens before.

    In what they allow, ``beside(p | r, ...) == beside(p, ...) | beside(r, ...)``, and likewise for ``&``. For ``-`` and
    ``~`` this holds among the pattern's own tokens: ``~beside(p, 5)`` hides the text, ``beside(~p, 5)`` does not.

    Args:
        pattern: the pattern of the tokens in the middle. If its number of tokens is known (``shape`` of an image,
            lengths of ``documents``), the sequence must have exactly as many tokens as the three parts; otherwise the
            pattern gets the rest of the sequence.
        before: number of other tokens in front.
        after: number of other tokens at the end.
        sees: whether the other tokens see the pattern's tokens. False: they see only each other, like text that does
            not depend on the image.
        seen: whether the pattern's tokens see the other tokens. False suits a class token. For two kinds of
            tokens nest: ``beside(beside(pattern, before=77, sees=False), after=1, seen=False)``.

    Raises:
        TypeError: pattern is not a pattern, before or after not an int, sees or seen not a bool.
        ValueError: a negative number of tokens; when compiling, a sequence that is longer than the three parts, or too
            short to have the tokens after.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.beside(P.neighborhood((1, 4), (0, 1)), before=1, seen=False).compile(5, block=16).to_dense().astype(int)
        array([[1, 1, 1, 1, 1],
               [0, 1, 1, 0, 0],
               [0, 1, 1, 1, 0],
               [0, 0, 1, 1, 1],
               [0, 0, 0, 1, 1]])
        >>> P.beside(P.local(0), after=2).compile(4, block=16).to_dense().astype(int)
        array([[1, 0, 1, 1],
               [0, 1, 1, 1],
               [1, 1, 1, 1],
               [1, 1, 1, 1]])
    """
    if not isinstance(pattern, Pattern):
        words = instead(pattern)
        raise TypeError(f"beside takes a pattern, got {pattern!r}{f': {words}' * bool(words)}")
    for name, value in (("sees", sees), ("seen", seen)):
        if not isinstance(value, bool):
            raise TypeError(f"beside: {name} must be True or False, got {value!r}")
    tokens = checked_int("beside", "before", before, 0), checked_int("beside", "after", after, 0)
    found = Beside(pattern, *tokens, sees, seen)
    if (found.known_size or 0) > LARGEST:
        raise ValueError(f"beside: {found.known_size:,} tokens together, at most 2**40 are possible")
    return found
