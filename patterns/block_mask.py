"""BlockMask: a token mask in blocks, with its set operations, conversions, files and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from sparseflash.patterns import checking, conversions, mask_file
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.misuse import TRUTH
from sparseflash.patterns.renamed import renamed
from sparseflash.patterns.set_operations import difference, full_mask, intersection, transposed, union


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask(MaskData):
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

    @classmethod
    def of(cls, data: MaskData) -> BlockMask:
        """The mask of canonical data, for example the result of a set operation."""
        return cls(data.grid, data.runs, data.tiles, data.pattern_of, data.expression)

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._combined(union, other)

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._combined(intersection, other)

    def __sub__(self, other: BlockMask) -> BlockMask:
        return self._combined(difference, other)

    def __invert__(self) -> BlockMask:
        return self.of(difference(full_mask(self.grid), self))

    def __bool__(self) -> NoReturn:
        raise TypeError(f"a BlockMask has no truth value; {TRUTH}")

    def _combined(self, operation: Callable[[MaskData, MaskData], MaskData], other: BlockMask) -> BlockMask:
        return self.of(operation(self, other)) if isinstance(other, BlockMask) else NotImplemented

    def transposed(self) -> BlockMask:
        """The mask with queries and keys exchanged."""
        return self.of(transposed(self))

    def to_dense(self) -> NDArray[np.bool_]:
        """The token mask, bool [q_len, kv_len]; with leading [H] or [B, H] when per head or per sample.

        Takes q_len x kv_len bytes per pattern: for inspection and tests.
        """
        return conversions.to_dense(self)

    def to_scipy(self, pattern: int = 0) -> csr_array:
        """Block codes of one pattern as a scipy matrix [nQ, nK]: 1 is FULL, t >= 2 is PARTIAL with ``tiles[t - 2]``."""
        return conversions.to_scipy(self, pattern)

    @classmethod
    @renamed(letters="codes")
    def from_scipy(
        cls,
        codes: Any,
        seq_len: int | tuple[int, int],
        block: int | tuple[int, int] = 128,
        tiles: NDArray[Any] | None = None,
        q_offset: int | None = None,
    ) -> BlockMask:
        """The mask of a scipy.sparse matrix of block codes [nQ, nK], from :meth:`to_scipy`, or of FULL blocks.

        Args:
            codes: booleans or ints. 0, or not stored, is EMPTY; 1 is FULL; t >= 2 is PARTIAL with ``tiles[t - 2]``.
            seq_len: tokens, or (q_len, kv_len). Blocks that reach past them are cut.
            block: tokens per block side, one of 16, 32, 64, 128, 256, or (BQ, BK).
            tiles: token bits, bool [T, BQ, BK], or packed as ``BlockMask.tiles``, uint32 [T, BQ, ceil(BK / 32)].
            q_offset: position of the first query; default ``kv_len - q_len``.

        Raises:
            TypeError: not a scipy.sparse matrix of booleans or ints, or a length, block or offset that is not an int.
            ValueError: a matrix that does not match the lengths, a code without a tile, or tiles that do not match
                the block.

        Example:
            >>> from scipy.sparse import eye_array
            >>> from sparseflash import BlockMask
            >>> mask = BlockMask.from_scipy(eye_array(8, dtype=bool), 1000)
            >>> mask.nnz, mask.full_blocks, mask.to_scipy().toarray()[-1].tolist()
            (8, 7, [0, 0, 0, 0, 0, 0, 0, 2])
        """
        return cls.of(conversions.from_scipy(codes, seq_len, block, tiles, q_offset))

    def check(self) -> None:
        """Check the mask against its invariants, independently of the compiler. Slow.

        With the environment variable ``SPARSEFLASH_DEBUG=1`` every mask is checked before a table is made of it.

        Raises:
            ValueError: names the first invariant that does not hold.

        Example:
            >>> from sparseflash import patterns as P
            >>> P.bigbird().compile(4096).check()
        """
        checking.check(self)

    def plot(
        self,
        path: str | PathLike[str],
        *,
        title: str | None = None,
        window: tuple[tuple[int, int], tuple[int, int]] | None = None,
        token: int | None = None,
    ) -> None:
        """Draw the mask as a picture, with FULL and PARTIAL blocks in two colours; or what one token of an image sees.

        Args:
            path: a ``.png``, ``.svg`` or ``.pdf`` file.
            title: text above the picture, e.g. the pattern's.
            window: ``((q0, q1), (k0, k1))``, half-open, in tokens: draw only this part. Parts of up to 1,024 tokens a
                side are drawn pair by pair, larger parts block by block.
            token: instead of a window, a query, counted from 0: draw the keys that it sees at their places in the image
                or in the frames of the pattern, with the other tokens beside them.

        Raises:
            TypeError: window is not two pairs of ints, or token is not an int.
            ValueError: another suffix, an empty window or one that reaches out of the mask, a token outside the mask,
                both a window and a token, or the token of a pattern without an image.
            FileNotFoundError: no such folder.
        """
        from sparseflash.pictures.drawing import draw

        draw(self, path, title=title, window=window, token=token)

    def write_html(self, path: str | PathLike[str], *, title: str | None = None) -> None:
        """Write a page that shows the mask in any browser, offline, and zooms from the whole mask to single tokens.

        Args:
            path: the file, usually ``.html``; written atomically.
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
        from sparseflash.pictures.viewer import write

        write(self, path, title=title)

    def save(self, path: str | PathLike[str], *, expression: str | None = None) -> None:
        """Write the mask to a safetensors file, together with the pattern's text.

        Args:
            path: the file.
            expression: text to store instead of the mask's own.

        Raises:
            ValueError: the text is too long for :meth:`load`; nothing is written.
        """
        mask_file.save(self, path, self.expression if expression is None else expression)

    @classmethod
    def load(cls, path: str | PathLike[str], *, max_bytes: int = 1 << 30) -> BlockMask:
        """Read a mask that :meth:`save` wrote, including its ``expression``. Safe for files from untrusted sources.

        Args:
            path: the file.
            max_bytes: refuse larger files.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a mask file, too large, of another version, damaged, or not in canonical form.
        """
        return cls.of(mask_file.load(path, max_bytes))

    @classmethod
    def from_dense(
        cls, token_mask: NDArray[np.bool_], block: int | tuple[int, int] = 128, q_offset: int | None = None
    ) -> BlockMask:
        """The mask of a token mask, bool [q_len, kv_len].

        Args:
            token_mask: true where the query may see the key.
            block: tokens per block side, one of 16, 32, 64, 128, 256, or (BQ, BK).
            q_offset: position of the first query; default ``kv_len - q_len``.

        Raises:
            TypeError: not a 2-D array of booleans, or a block that is not an int or a pair of ints.
            ValueError: an empty array, or a block size not offered.
        """
        return cls.of(conversions.from_dense(token_mask, block, q_offset))

    def _repr_png_(self) -> bytes:
        from sparseflash.pictures.notebook import png

        return png(self)

    def _repr_html_(self) -> str:
        from sparseflash.pictures.notebook import html

        return html(self)
