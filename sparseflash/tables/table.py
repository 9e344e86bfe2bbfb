"""LookupTable: a block mask on a device, in the order in which kernels read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.tables.check import check_table
from sparseflash.tables.from_indices import from_indices
from sparseflash.tables.packing import unpack


@dataclass(frozen=True, eq=False)
class LookupTable:
    """The table that kernels walk: for every block row its key blocks, for every block column its query blocks.

    Shapes: P distinct patterns; see :class:`sparseflash.kernels.layout.BlockLists` for the tensors.
    """

    shape: tuple[int, int]  # (q_len, kv_len)
    block: tuple[int, int]  # (BQ, BK)
    q_offset: int  # position of the first query; the first key stands at 0
    rows: BlockLists
    columns: BlockLists
    tiles: Tiles
    pattern_of: torch.Tensor  # int32 [B or 1, Hq or 1] -> pattern
    buffer: torch.Tensor | None = None  # holds all of these, for compiled graphs: see sparseflash.tables.packing
    layout: tuple[int, ...] = ()  # of the buffer

    @classmethod
    def unpacked(cls, buffer: torch.Tensor, layout: Sequence[int]) -> LookupTable:
        """The table whose tensors lie in a buffer."""
        header, contents = unpack(buffer, layout)
        shape, block = (header.q_len, header.kv_len), (header.bq, header.bk)
        return cls(shape, block, header.q_offset, *contents, buffer, tuple(layout))

    @classmethod
    def from_indices(
        cls,
        indices: torch.Tensor,
        counts: torch.Tensor | None = None,
        *,
        shape: int | tuple[int, int],
        block: int | tuple[int, int] = 128,
        q_offset: int | None = None,
        q_heads: int | None = None,
        causal: bool = False,
    ) -> LookupTable:
        """The table of the key blocks that a router chose, built on their device without waiting for it.

        Together with :func:`sparseflash.attention` this is content-based sparsity (MoBA,
        https://arxiv.org/abs/2502.13189; NSA, https://arxiv.org/abs/2502.11089; Quest,
        https://arxiv.org/abs/2406.10774). Works in ``torch.compile(fullgraph=True)``. The host waits for a CUDA device
        once for each new combination of shape, block, q_offset and causal, to copy their edge tiles.

        Args:
            indices: ints [B, H, nQ, k]: for each block row the key blocks it may see, in any order. Duplicates count
                once; indices outside 0 to nK - 1 are dropped. B may be 1 for all samples, H 1 for all heads.
            counts: ints [B, H, nQ]: use only this many of the entries of a row; default all k.
            shape: tokens, or (q_len, kv_len). nQ and nK are these in blocks, rounded up.
            block: tokens per block side, one of 16, 32, 64, 128, 256, or (BQ, BK).
            q_offset: position of the first query; default ``kv_len - q_len``.
            q_heads: query heads, a multiple of H: query head h uses the indices of head ``h // (q_heads // H)``.
                Default H.
            causal: hide keys past the position of the query: a chosen block on the diagonal is cut, and chosen blocks
                in the future are dropped.

        With the environment variable ``SPARSEFLASH_DEBUG=1``, an index or count out of range raises and names its
        place. This check waits for the device, and compiled graphs skip it.

        Raises:
            TypeError: indices or counts are not tensors of ints; shape, block, q_offset or q_heads are not ints.
            ValueError: shapes, heads or devices that do not match, or more entries than an int32 can index.

        Example:
            >>> import torch, sparseflash as sf
            >>> q, k, v = torch.randn(3, 1, 4, 1024, 32).unbind(0)
            >>> blocks = [x.unflatten(2, (-1, 128)).mean(3) for x in (q, k)]  # mean query and key of each block
            >>> chosen = (blocks[0] @ blocks[1].mT).topk(3).indices  # [1, 4, 8, 3]
            >>> table = sf.LookupTable.from_indices(chosen, shape=1024, causal=True)
            >>> sf.attention(q, k, v, table).shape
            torch.Size([1, 4, 1024, 32])
        """
        return cls(
            *from_indices(indices, counts, shape=shape, block=block, q_offset=q_offset, q_heads=q_heads, causal=causal)
        )

    def check(self, mask: BlockMask | None = None) -> None:
        """Check every entry against the invariants that kernels rely on and, if given, against a mask. Slow.

        With the environment variable ``SPARSEFLASH_DEBUG=1`` every table that :func:`lookup` makes is checked.

        Args:
            mask: the mask that the table was made from.

        Raises:
            ValueError: names the first entry that is wrong.

        Example:
            >>> import sparseflash as sf
            >>> mask = sf.patterns.longformer(64).compile(2048)
            >>> sf.lookup(mask).check(mask)
        """
        check_table(self, mask)

    def check_fits(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Raise ValueError unless the table fits q [B, Hq, N, D] and k [B, Hkv, M, D]."""
        lengths = q.shape[2], k.shape[2]
        if self.shape[0] != lengths[0] or self.shape[1] != lengths[1]:
            raise ValueError(f"the mask is for (q_len, kv_len) = {self.shape}, q and k have {lengths} tokens")
        samples, heads = self.pattern_of.shape
        for size, have, what in ((samples, q.shape[0], "samples"), (heads, q.shape[1], "query heads")):
            if size not in (1, have):
                raise ValueError(f"the mask is for {size} {what}, q has {have} (shape {tuple(q.shape)})")

    @property
    def device(self) -> torch.device:
        return self.pattern_of.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (*self.rows, *self.columns, *self.tiles, self.pattern_of))

    def __repr__(self) -> str:
        (q, k), (bq, bk) = self.shape, self.block
        return f"LookupTable({q:,} x {k:,} tokens, block {bq} x {bk}, {self.nbytes:,} bytes on {self.device})"


class PackedTable(NamedTuple):
    """A table as two tensors, for compiled graphs, which depend on nothing else of it."""

    buffer: torch.Tensor  # int32, on the device of q
    layout: torch.Tensor  # int64, on the CPU

    @classmethod
    def of(cls, table: LookupTable) -> PackedTable:
        """The table that :func:`lookup` made."""
        assert table.buffer is not None
        return cls(table.buffer, torch.tensor(table.layout))

    def table(self) -> LookupTable:
        return LookupTable.unpacked(self.buffer, self.layout.tolist())
