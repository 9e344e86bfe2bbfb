"""BlockMask: which blocks are empty, full or partial, and the token bits of the partial ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from os import PathLike
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sparseflash.patterns.canonical import canonical
from sparseflash.patterns.constant import Constant
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.misuse import TRUTH
from sparseflash.patterns.refinement import transposed
from sparseflash.patterns.runs import FULL, Runs, frozen
from sparseflash.patterns.tiles import Words, pack, unpack


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(Constant):
    """A token mask compiled to blocks, for given lengths and block size. Immutable, on the host, without torch.

    Made by ``Pattern.compile``. Masks of equal shape and block combine with ``|``, ``&``, ``-`` and ``~``; the
    result is again canonical (no empty or full tile stored, none twice, blocks sorted), so masks that allow the
    same pairs compare and hash equal.

    Shape legend: P distinct patterns (heads or samples with the same pattern share it), nQ x nK blocks, T tiles.

    Example:
        >>> from sparseflash import patterns as P
        >>> mask = P.causal().compile(1000, block=128)
        >>> mask.shape, mask.block, mask.nnz, len(mask.tiles)
        ((1000, 1000), (128, 128), 36, 3)
        >>> mask & ~mask == P.full().compile(1000) - P.full().compile(1000)
        True
    """

    grid: Grid  # lengths, block size, and the position of the first query
    runs: Runs  # letters of the P matrices [nQ, nK], one below the other
    tiles: Words  # uint32 [T, BQ, ceil(BK / 32)]
    pattern_of: NDArray[np.int32]  # [B or 1, H or 1] -> pattern
    expression: str = ""  # text of the pattern it was compiled from; no part of what makes masks equal

    @classmethod
    def canonical(cls, grid: Grid, runs: Runs, tiles: Words, pattern_of: NDArray[np.int32] | None = None) -> BlockMask:
        """Bring letters, tiles and patterns into the one form in which equal masks have equal bytes."""
        runs, kept, pattern_of = canonical(grid, runs, tiles, pattern_of)
        for array in (runs.start, runs.stop, runs.letter, kept, pattern_of):
            frozen(array)  # masks are cached and shared
        return cls(grid, runs, kept, pattern_of)

    @property
    def shape(self) -> tuple[int, int]:
        """(q_len, kv_len)."""
        return self.grid.q_len, self.grid.kv_len

    @property
    def block(self) -> tuple[int, int]:
        """(BQ, BK): tokens a block side."""
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
        """Bytes of the arrays that hold it."""
        return sum(a.nbytes for a in (self.runs.start, self.runs.stop, self.runs.letter, self.tiles, self.pattern_of))

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
        counts = np.bincount(self.runs.row, weights=self.runs.length * (self.runs.letter == FULL))
        counts = np.pad(counts, (0, self.runs.shape[0] - counts.size)).reshape(self.patterns, -1)
        return int(counts.sum(axis=1)[self.pattern_of].sum())

    @cached_property
    def tokens(self) -> int:
        """Allowed (query, key) pairs, summed like :attr:`nnz`."""
        in_tiles = np.bitwise_count(self.tiles).sum(axis=(1, 2), dtype=np.int64)
        per_letter = [0, self.block[0] * self.block[1], *in_tiles.tolist()]
        letters = len(per_letter)
        which = self.runs.letter
        if self.patterns > 1:
            which = which + self.runs.row // self.grid_shape[0] * letters
        blocks = np.zeros((self.patterns, letters), np.int64)
        np.add.at(blocks.reshape(-1), which, self.runs.length)
        # Sums of Python ints: long sequences have more pairs than int64 counts.
        totals = [sum(n * t for n, t in zip(line, per_letter, strict=True)) for line in blocks.tolist()]
        return sum(totals[p] for p in self.pattern_of.flat)

    @property
    def density(self) -> float:
        """Stored blocks / all blocks."""
        return self.nnz / (self.pattern_of.size * self.grid_shape[0] * self.grid_shape[1])

    @property
    def token_density(self) -> float:
        """Allowed pairs / all pairs."""
        return self.tokens / (self.pattern_of.size * self.shape[0] * self.shape[1])

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, np.bitwise_or)

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, np.bitwise_and)

    def __sub__(self, other: BlockMask) -> BlockMask:
        return self._combined(other, lambda a, b: a & ~b)

    def __invert__(self) -> BlockMask:
        from sparseflash.patterns.set_operations import full_mask

        return full_mask(self.grid) - self

    def __bool__(self) -> NoReturn:
        raise TypeError(f"a BlockMask has no truth value; {TRUTH}")

    def _combined(self, other: BlockMask, operation: Callable[[Any, Any], Any]) -> BlockMask:
        from sparseflash.patterns.set_operations import combine

        return combine(self, other, operation) if isinstance(other, BlockMask) else NotImplemented

    def transposed(self) -> BlockMask:
        """The mask with queries and keys exchanged."""
        tiles = np.ascontiguousarray(unpack(self.tiles, self.block[1]).swapaxes(1, 2))
        g = self.grid
        grid = Grid(g.kv_len, g.q_len, g.bk, g.bq, -g.q_offset)
        return BlockMask.canonical(grid, transposed(self.runs, self.patterns), pack(tiles), self.pattern_of)

    def to_dense(self) -> NDArray[np.bool_]:
        """The token mask, bool [q_len, kv_len]; with leading [H] or [B, H] when per head or per sample.

        Takes q_len x kv_len bytes: for looking and testing.
        """
        from sparseflash.patterns.conversions import to_dense

        return to_dense(self)

    def to_scipy(self, pattern: int = 0) -> csr_array:
        """Letters of one pattern as a scipy matrix [nQ, nK]: 1 is FULL, t >= 2 is PARTIAL with ``tiles[t - 2]``."""
        from sparseflash.patterns.conversions import to_scipy

        return to_scipy(self, pattern)

    @classmethod
    def from_scipy(
        cls,
        letters: Any,
        seq_len: int | tuple[int, int],
        block: int | tuple[int, int] = 128,
        tiles: NDArray[Any] | None = None,
        q_offset: int | None = None,
    ) -> BlockMask:
        """The mask of a scipy.sparse matrix of letters [nQ, nK]: what :meth:`to_scipy` gives, or blocks to see whole.

        Args:
            letters: booleans or ints. 0, or not stored, is EMPTY; 1 is FULL; t >= 2 is PARTIAL with ``tiles[t - 2]``.
            seq_len: tokens, or (q_len, kv_len). Blocks that reach past them are cut.
            block: tokens a block side from 16, 32, 64, 128, 256, or (BQ, BK).
            tiles: token bits, bool [T, BQ, BK], or packed as ``BlockMask.tiles``, uint32 [T, BQ, ceil(BK / 32)].
            q_offset: position of the first query; default ``kv_len - q_len``.

        Raises:
            TypeError: not a scipy.sparse matrix of booleans or ints, or a length, block or offset that is no int.
            ValueError: a matrix that does not fit the lengths, a letter without a tile, tiles that do not fit the
                block.

        Example:
            >>> from scipy.sparse import eye_array
            >>> from sparseflash import BlockMask
            >>> mask = BlockMask.from_scipy(eye_array(8, dtype=bool), 1000)
            >>> mask.nnz, mask.full_blocks, mask.to_scipy().toarray()[-1].tolist()
            (8, 7, [0, 0, 0, 0, 0, 0, 0, 2])
        """
        from sparseflash.patterns.conversions import from_scipy

        return from_scipy(letters, seq_len, block, tiles, q_offset)

    def check(self) -> None:
        """Look, slowly and independently of the compiler, whether the mask keeps everything that it promises.

        With the environment variable ``SPARSEFLASH_DEBUG=1`` every mask is checked before a table is made of it.

        Raises:
            ValueError: the first broken promise.

        Example:
            >>> from sparseflash import patterns as P
            >>> P.bigbird().compile(4096).check()
        """
        from sparseflash.patterns.checking import check

        check(self)

    def plot(
        self,
        path: str | PathLike[str],
        *,
        title: str | None = None,
        window: tuple[tuple[int, int], tuple[int, int]] | None = None,
    ) -> None:
        """Draw the mask as a picture: FULL and PARTIAL blocks told apart.

        Args:
            path: a ``.png``, ``.svg`` or ``.pdf`` file.
            title: text above the picture, e.g. the pattern's.
            window: ``((q0, q1), (k0, k1))``, half-open, in tokens: only this part. Up to 1,024 tokens a side are drawn
                pair by pair, larger parts (and larger masks) block by block.

        Raises:
            TypeError: window is not two pairs of ints.
            ValueError: another suffix, or a window that is empty or reaches out of the mask.
            FileNotFoundError: no such folder.
        """
        from sparseflash.patterns.drawing import draw

        draw(self, path, title=title, window=window)

    def write_html(self, path: str | PathLike[str], *, title: str | None = None) -> None:
        """Write one page that shows the mask in any browser, without a network: from all of it down to single tokens.

        Args:
            path: the file, usually ``.html``; written whole or not at all.
            title: heading of the page; default the pattern's text.

        Raises:
            ValueError: more runs or tiles than a page can hold (128 MiB unpacked, 16 MiB as a file).
            FileNotFoundError: no such folder.

        Example:
            >>> import tempfile
            >>> from sparseflash import patterns as P
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     P.causal().compile(65536).write_html(folder + "/mask.html")
        """
        from sparseflash.patterns.viewer import write

        write(self, path, title=title)

    def save(self, path: str | PathLike[str], *, expression: str | None = None) -> None:
        """Write the mask to a safetensors file, the pattern's text beside it.

        Args:
            path: the file.
            expression: text to keep instead of the mask's own.

        Raises:
            ValueError: the text is too long to be read back; nothing is written.
        """
        from sparseflash.patterns.mask_file import save

        save(self, path, self.expression if expression is None else expression)

    @classmethod
    def load(cls, path: str | PathLike[str], *, max_bytes: int = 1 << 30) -> BlockMask:
        """Read a mask that :meth:`save` wrote, its ``expression`` included. The file need not be trusted.

        Args:
            path: the file.
            max_bytes: larger files are refused.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mask file, too large, another version, damaged, or not in canonical form.
        """
        from sparseflash.patterns.mask_file import load

        return load(path, max_bytes)

    @classmethod
    def from_dense(
        cls, token_mask: NDArray[np.bool_], block: int | tuple[int, int] = 128, q_offset: int | None = None
    ) -> BlockMask:
        """The mask of a token mask, bool [q_len, kv_len].

        Args:
            token_mask: true where the query may see the key.
            block: tokens a block side from 16, 32, 64, 128, 256, or (BQ, BK).
            q_offset: position of the first query; default ``kv_len - q_len``.

        Raises:
            TypeError: not a 2-D array of booleans, or block is not made of ints.
            ValueError: an empty array, or a block size not offered.
        """
        from sparseflash.patterns.conversions import from_dense

        return from_dense(token_mask, block, q_offset)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that identify the content, in files and between processes."""
        state = blake2b(repr((self.grid, self.pattern_of.shape)).encode(), digest_size=16)
        for array in self._content:
            state.update(np.ascontiguousarray(array).tobytes())
        return state.digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockMask) and (
            self is other or (self.grid == other.grid and all(map(np.array_equal, self._content, other._content)))
        )

    @cached_property
    def _hash(self) -> int:
        # Sums tell masks apart well enough for a dict, which compares the content of those that have the same ones.
        return hash((self.grid, self.pattern_of.shape, *(int(array.sum()) for array in self._content)))

    def __hash__(self) -> int:
        return self._hash

    @property
    def _content(self) -> tuple[NDArray[Any], ...]:
        return self.pattern_of, self.runs.start, self.runs.stop, self.runs.letter, self.tiles

    def _repr_png_(self) -> bytes:
        from sparseflash.patterns.notebook import png

        return png(self)

    def _repr_html_(self) -> str:
        from sparseflash.patterns.notebook import html

        return html(self)

    def __repr__(self) -> str:
        (q, k), (bq, bk), (nq, nk) = self.shape, self.block, self.grid_shape
        heads = f", {'x'.join(map(str, leading(self.pattern_of)))} masks" if leading(self.pattern_of) else ""
        return (
            f"BlockMask({q:,} x {k:,} tokens, block {bq} x {bk}{heads}, {self.nnz:,} of "
            f"{self.pattern_of.size * nq * nk:,} blocks ({self.density:.2%}; tokens {self.token_density:.2%}), "
            f"{len(self.tiles)} tile{'s' * (len(self.tiles) != 1)})"
        )


def leading(pattern_of: NDArray[np.int32]) -> tuple[int, ...]:
    """The shape that goes before [q_len, kv_len]: nothing, [H] or [B, H]."""
    samples, heads = pattern_of.shape
    if samples == 1:
        return () if heads == 1 else (heads,)
    return samples, heads
