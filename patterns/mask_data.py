"""The data of a block mask: which blocks are empty, full or partial, and the token bits of the partial ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.canonical import canonical
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.patterns.runs import FULL, Runs, frozen
from sparseflash.patterns.tiles import Words
from sparseflash.patterns.traced_constant import Constant


@dataclass(frozen=True, eq=False, repr=False)
class MaskData(Constant):
    """Runs of blocks on a grid, the tiles of the partial ones, and the figures that follow from them. Immutable.

    Set operations, conversions, files, checks and pictures work on this class. Users get a
    :class:`~sparseflash.BlockMask`, which adds methods. Masks that allow the same pairs compare and hash equal, because
    they are canonical: no empty, full or duplicate tile is stored, and blocks are sorted.

    Shape legend: P distinct patterns (heads or samples with the same pattern share it), nQ x nK blocks, T tiles.
    """

    grid: Grid  # lengths, block size, and the position of the first query
    runs: Runs  # codes of the P matrices [nQ, nK], one below the other
    tiles: Words  # uint32 [T, BQ, ceil(BK / 32)]
    pattern_of: NDArray[np.int32]  # [B or 1, H or 1] -> pattern
    # From the pattern that was compiled; ignored when masks are compared:
    expression: str = ""  # its text
    images: tuple[PlacedImage, ...] = ()  # the images among the keys, sorted; files do not keep them

    @classmethod
    def canonical(cls, grid: Grid, runs: Runs, tiles: Words, pattern_of: NDArray[np.int32] | None = None) -> Self:
        """Bring codes, tiles and patterns into the canonical form, in which equal masks have equal bytes."""
        runs, kept, pattern_of = canonical(grid, runs, tiles, pattern_of)
        for array in (runs.start, runs.stop, runs.code, kept, pattern_of):
            frozen(array)  # masks are cached and shared
        return cls(grid, runs, kept, pattern_of)

    @property
    def shape(self) -> tuple[int, int]:
        """(q_len, kv_len)."""
        return self.grid.q_len, self.grid.kv_len

    @property
    def block(self) -> tuple[int, int]:
        """(BQ, BK): tokens per block side."""
        return self.grid.bq, self.grid.bk

    @property
    def q_offset(self) -> int:
        """Position of the first query; the first key stands at 0."""
        return self.grid.q_offset

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(nQ, nK): block rows and block columns."""
        return self.grid.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(a.nbytes for a in (self.runs.start, self.runs.stop, self.runs.code, self.tiles, self.pattern_of))

    @cached_property
    def patterns(self) -> int:
        """P, the number of distinct patterns."""
        return int(self.pattern_of.max()) + 1

    @cached_property
    def row_counts(self) -> NDArray[np.int64]:
        """Stored blocks of each block row, int64 [P, nQ]."""
        until = np.append(0, np.cumsum(self.runs.length))[self.runs.begin]
        return frozen(np.diff(until).reshape(self.patterns, -1))

    @cached_property
    def nnz(self) -> int:
        """Stored blocks, summed over the heads and samples of ``pattern_of``."""
        return int(self.row_counts.sum(axis=1)[self.pattern_of].sum())

    @cached_property
    def full_blocks(self) -> int:
        """Stored blocks that need no masking, summed like :attr:`nnz`."""
        counts = np.bincount(self.runs.row, weights=self.runs.length * (self.runs.code == FULL))
        counts = np.pad(counts, (0, self.runs.shape[0] - counts.size)).reshape(self.patterns, -1)
        return int(counts.sum(axis=1)[self.pattern_of].sum())

    @cached_property
    def tokens(self) -> int:
        """Allowed (query, key) pairs, summed like :attr:`nnz`."""
        in_tiles = np.bitwise_count(self.tiles).sum(axis=(1, 2), dtype=np.int64)
        per_code = [0, self.block[0] * self.block[1], *in_tiles.tolist()]
        codes = len(per_code)
        which = self.runs.code
        if self.patterns > 1:
            which = which + self.runs.row // self.grid_shape[0] * codes
        blocks = np.zeros((self.patterns, codes), np.int64)
        np.add.at(blocks.reshape(-1), which, self.runs.length)
        # Sums of Python ints, because long sequences have more pairs than int64 can count.
        totals = [sum(n * t for n, t in zip(line, per_code, strict=True)) for line in blocks.tolist()]
        return sum(totals[p] for p in self.pattern_of.flat)

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        return self.nnz / (self.pattern_of.size * self.grid_shape[0] * self.grid_shape[1])

    @property
    def token_density(self) -> float:
        """Allowed pairs / all pairs."""
        return self.tokens / (self.pattern_of.size * self.shape[0] * self.shape[1])

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the content, in files and between processes."""
        state = blake2b(repr((self.grid, self.pattern_of.shape)).encode(), digest_size=16)
        for array in self._content:
            state.update(np.ascontiguousarray(array).tobytes())
        return state.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MaskData) and (
            self is other or (self.grid == other.grid and all(map(np.array_equal, self._content, other._content)))
        )

    @cached_property
    def _hash(self) -> int:
        # Sums suffice for a dict, which compares the content of masks with equal hashes.
        return hash((self.grid, self.pattern_of.shape, *(int(array.sum()) for array in self._content)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def _content(self) -> tuple[NDArray[Any], ...]:
        return self.pattern_of, self.runs.start, self.runs.stop, self.runs.code, self.tiles

    def __repr__(self) -> str:
        (q, k), (bq, bk), (nq, nk) = self.shape, self.block, self.grid_shape
        heads = f", {'x'.join(map(str, leading(self.pattern_of)))} masks" if leading(self.pattern_of) else ""
        return (
            f"{type(self).__name__}({q:,} x {k:,} tokens, block {bq} x {bk}{heads}, {self.nnz:,} of "
            f"{self.pattern_of.size * nq * nk:,} blocks ({self.density:.2%}; tokens {self.token_density:.2%}), "
            f"{len(self.tiles)} tile{'s' * (len(self.tiles) != 1)})"
        )


def leading(pattern_of: NDArray[np.int32]) -> tuple[int, ...]:
    """The leading shape before [q_len, kv_len]: (), (H,) or (B, H)."""
    samples, heads = pattern_of.shape
    if samples == 1:
        return () if heads == 1 else (heads,)
    return samples, heads
