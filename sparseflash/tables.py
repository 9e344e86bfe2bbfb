"""LookupTable: a block mask on a device, in the order in which kernels read it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch._guards import active_fake_mode

from sparseflash.kernels.layout import Side, Tiles
from sparseflash.packing import Header, pack, unpack
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import TABLES
from sparseflash.patterns.described import described
from sparseflash.patterns.intervals import positions
from sparseflash.patterns.overlay import transposed
from sparseflash.patterns.runs import FIRST_TILE, FULL, Runs
from sparseflash.patterns.tiles import Words
from sparseflash.schedule import cuts, deal, weights

# Kernels load the next block's index while they work on the current one; reading past the end must be harmless.
READ_AHEAD = 4

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class LookupTable:
    """What kernels walk: for every block row its key blocks, for every block column its query blocks.

    Shapes: P distinct patterns; see :class:`sparseflash.kernels.layout.Side` for the tensors.
    """

    shape: tuple[int, int]  # (q_len, kv_len)
    block: tuple[int, int]  # (BQ, BK)
    q_offset: int  # position of the first query; the first key stands at 0
    rows: Side
    columns: Side
    tiles: Tiles
    pattern_of: torch.Tensor  # int32 [B or 1, Hq or 1] -> pattern
    buffer: torch.Tensor | None = None  # what holds all of these, for compiled graphs: see sparseflash.packing
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
        """The table of key blocks that a router chose, built where they lie and without waiting for the device.

        Content-based sparsity (MoBA, https://arxiv.org/abs/2502.13189; NSA, https://arxiv.org/abs/2502.11089; Quest,
        https://arxiv.org/abs/2406.10774) is this and :func:`sparseflash.attention`. Works in
        ``torch.compile(fullgraph=True)``. A CUDA device is waited for once for each new combination of shape, block,
        q_offset and causal, when their edge tiles are copied to it.

        Args:
            indices: ints [B, H, nQ, k]: for each block row the key blocks it may see, in any order. One named twice
                counts once; one outside 0 to nK - 1 is dropped. B may be 1 for all samples, H 1 for all heads.
            counts: ints [B, H, nQ]: only the first that many entries of a row are meant; default all k.
            shape: tokens, or (q_len, kv_len). nQ and nK are these in blocks, rounded up.
            block: tokens a block side from 16, 32, 64, 128, 256, or (BQ, BK).
            q_offset: position of the first query; default ``kv_len - q_len``.
            q_heads: query heads, a multiple of H: query head h uses the indices of head ``h // (q_heads // H)``.
                Default H.
            causal: let a query see no key past its own position: the chosen block on the diagonal is cut, chosen
                blocks in the future are dropped.

        With the environment variable ``SPARSEFLASH_DEBUG=1``, an index or count out of range is an error that names
        the place; finding it waits for the device, and compiled graphs do not look.

        Raises:
            TypeError: indices or counts are no tensors of ints; shape, block, q_offset or q_heads are no ints.
            ValueError: shapes, heads or devices that do not fit each other, more entries than an int32 can index.

        Example:
            >>> import torch, sparseflash as sf
            >>> q, k, v = torch.randn(3, 1, 4, 1024, 32).unbind(0)
            >>> blocks = [x.unflatten(2, (-1, 128)).mean(3) for x in (q, k)]  # mean query and key of each block
            >>> chosen = (blocks[0] @ blocks[1].mT).topk(3).indices  # [1, 4, 8, 3]
            >>> table = sf.LookupTable.from_indices(chosen, shape=1024, causal=True)
            >>> sf.attention(q, k, v, table).shape
            torch.Size([1, 4, 1024, 32])
        """
        from sparseflash.dynamic import from_indices

        return from_indices(
            indices, counts, shape=shape, block=block, q_offset=q_offset, q_heads=q_heads, causal=causal
        )

    def check(self, mask: BlockMask | None = None) -> None:
        """Look, slowly and entry by entry, whether the table is what kernels take for granted, and what the mask says.

        With the environment variable ``SPARSEFLASH_DEBUG=1`` every table that :func:`lookup` makes is checked.

        Args:
            mask: what the table was made from, if it is at hand.

        Raises:
            ValueError: the first thing that is wrong.

        Example:
            >>> import sparseflash as sf
            >>> mask = sf.patterns.longformer(64).compile(2048)
            >>> sf.lookup(mask).check(mask)
        """
        from sparseflash.table_check import check_table

        check_table(self, mask)

    def check_fits(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Raise ValueError unless the table serves q [B, Hq, N, D] and k [B, Hkv, M, D]."""
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
    """A table as two tensors, for compiled graphs: they see nothing of it but that."""

    buffer: torch.Tensor  # int32, on the device of q
    layout: torch.Tensor  # int64, on the CPU

    @classmethod
    def of(cls, table: LookupTable) -> PackedTable:
        """The table that :func:`lookup` made."""
        assert table.buffer is not None
        return cls(table.buffer, torch.tensor(table.layout))

    def table(self) -> LookupTable:
        return LookupTable.unpacked(self.buffer, self.layout.tolist())


def lookup(mask: BlockMask, device: torch.device | str = "cpu") -> LookupTable:
    """The lookup table of a mask on a device, cached by content and device. ``attention`` calls this by itself.

    The cache holds 64 tables, and no more than 256 MB of them beside the newest.

    Args:
        mask: a compiled pattern.
        device: where the tensors are to lie.

    Raises:
        TypeError: mask is not a BlockMask.
        ValueError: more entries than an int32 index can address.

    Example:
        >>> import sparseflash as sf
        >>> table = sf.lookup(sf.patterns.causal().compile(1 << 20), "cpu")
        >>> table.nbytes < 2_000_000  # rows of a causal mask share one list: O(N), not O(N^2)
        True
    """
    if not isinstance(mask, BlockMask):
        raise TypeError(f"lookup takes a BlockMask (pattern.compile(...)), got {described(mask)}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    table = unless_fake(_lookup)(mask, device)
    if capturing(device):
        _captured.add(table)
    return table


# A CUDA graph reads the tables it was captured with as long as it is replayed, whatever the cache forgets.
_captured: set[LookupTable] = set()


def capturing(device: torch.device) -> bool:
    """Whether calls are being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Raise RuntimeError where a table would have to be copied to the device while a CUDA graph is captured."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and the mask's table is not on the device yet: run the call once before "
            "(sparseflash.lookup(mask, device) for masks, a first call for routed ones)"
        )


def unless_fake(cached: _lru_cache_wrapper[Made]) -> Callable[..., Made]:
    """A cached function that makes tensors; inside a FakeTensorMode without its cache, for fake ones must not stay."""
    # Without any mode there is none of those, which are looked for slowly.
    fake = torch._C._len_torch_dispatch_stack() and active_fake_mode() is not None
    return cached.__wrapped__ if fake else cached


def lasting(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorator of a function whose tensors are kept: every later call can use them, whoever makes the first one.

    Made in inference mode, they could not be saved for a backward pass; made within a transform of torch.func, they
    would be wrapped for its level, and be errors once that is left.
    """

    @wraps(make)
    def made(*arguments: Arguments.args, **named: Arguments.kwargs) -> Made:
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            return make(*arguments, **named)

    return made


@TABLES.bounds
@lru_cache(maxsize=64)
@lasting
def _lookup(mask: BlockMask, device: torch.device) -> LookupTable:
    check_not_capturing(device)
    patterns = mask.patterns
    arrays = [
        *_side(mask.runs, patterns),
        *_side(transposed(mask.runs, patterns), patterns),
        *tile_arrays(mask.tiles),
        mask.pattern_of,
    ]
    buffer, layout = pack(Header(*mask.shape, *mask.block, mask.q_offset), arrays, device)
    table = LookupTable.unpacked(buffer, layout)
    TABLES.spend(table.nbytes)
    if os.environ.get("SPARSEFLASH_DEBUG") == "1":
        mask.check()
        table.check(mask)
    return table


def tile_arrays(words: Words) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Bits and seen keys of :class:`Tiles`, from tiles uint32 [T, BQ, W]."""
    # A kernel may read the words of a tile ahead of knowing that there is none.
    bits = words if len(words) else np.zeros((1, *words.shape[1:]), np.uint32)
    return bits.view(np.int32), np.bitwise_or.reduce(bits, axis=1).view(np.int32)


def _side(runs: Runs, patterns: int) -> list[NDArray[Any]]:
    """The arrays of a :class:`Side`."""
    lines, others = runs.shape
    row, length = runs.row, runs.length
    first = runs.start - row * others
    is_full = runs.letter == FULL
    filled, partial = np.flatnonzero(is_full), np.flatnonzero(~is_full)
    shared = np.bincount(row[filled], minlength=lines) == 1  # one run of FULL blocks: a range of 0, 1, 2, ...
    in_range = shared[row[filled]]
    alone, rest = filled[in_range], filled[~in_range]
    common = others if alone.size else 0

    spans = np.empty((lines, 4), np.int32)
    for at, chosen, skipped in ((0, rest, common), (2, partial, 0)):
        entries = np.zeros(lines + 1, np.int64)
        np.add.at(entries, row[chosen] + 1, length[chosen])
        np.cumsum(entries, out=entries)
        entries += skipped
        if entries[-1] > np.iinfo(np.int32).max - READ_AHEAD:
            raise ValueError(f"a table of {int(entries[-1]):,} entries is past what int32 can index")
        spans[:, at], spans[:, at + 1] = entries[:-1], entries[1:]
    line, begin = row[alone], first[alone]
    spans[line, 0], spans[line, 1] = begin, begin + length[alone]
    full, masked = (positions(at, at + length[chosen]) for chosen in (rest, partial) for at in (first[chosen],))
    letter = np.repeat(runs.letter[partial], length[partial])
    by_pattern = spans.reshape(patterns, -1, 4)
    weight = weights(by_pattern)
    work, merges = np.empty((patterns, 0, 6), np.int64), np.empty((patterns, 0, 3), np.int64)
    if (cuts(weight) > 1).any():
        work, merges = deal(by_pattern)
    return [
        by_pattern,
        _padded(np.arange(common, dtype=np.int32), full),
        _padded(masked),
        _padded(letter - FIRST_TILE),
        np.argsort(-weight, axis=1, kind="stable"),
        work,
        merges,
    ]


def _padded(*parts: NDArray[Any]) -> NDArray[np.int32]:
    filled = sum(part.size for part in parts)
    padded = np.zeros(filled + READ_AHEAD, np.int32)
    np.concatenate(parts, out=padded[:filled], casting="same_kind")
    return padded


def tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as int32 on a device."""
    return torch.from_numpy(np.array(array, np.int32, order="C")).to(device)
