"""Tables from block indices that a router wrote on the device: content-based sparsity without waiting for the host.

Every shape here follows from the shapes of the arguments, never from their values, so building a table never waits
for the device and works in a compiled graph. A block row has room for k entries; unused room is never read.

Shape legend: B samples, H heads of indices, P = B * H patterns, nQ x nK blocks of BQ x BK tokens, k entries a row.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.grid import Grid, make_grid
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL
from sparseflash.patterns.tiles import TileSet, pack
from sparseflash.tables.device import READ_AHEAD, check_not_capturing, per_device, tensor, unless_fake
from sparseflash.tables.packing import tile_arrays

LARGEST_INDEX = np.iinfo(np.int32).max


class Parts(NamedTuple):
    """The fields of a :class:`LookupTable`, in its order."""

    shape: tuple[int, int]
    block: tuple[int, int]
    q_offset: int
    rows: BlockLists
    columns: BlockLists
    tiles: Tiles
    pattern_of: torch.Tensor


def from_indices(
    indices: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    shape: int | tuple[int, int],
    block: int | tuple[int, int],
    q_offset: int | None,
    q_heads: int | None,
    causal: bool,
) -> Parts:
    """See :meth:`sparseflash.LookupTable.from_indices`."""
    q_heads = _checked(indices, counts, q_heads)
    if torch.compiler.is_compiling():  # lengths may be symbols, and range() makes them numbers
        shape = range(shape).stop if isinstance(shape, int) else (range(shape[0]).stop, range(shape[1]).stop)
    edges = _edges(shape, block, q_offset, causal, indices.device)
    (samples, heads, lines, k), (nq, nk) = indices.shape, edges.blocks
    if lines != nq:
        raise ValueError(
            f"indices must be [B, H, nQ, k] with nQ = {nq} block rows for {edges.shape[0]:,} queries in blocks of "
            f"{edges.block[0]}; got {tuple(indices.shape)}"
        )
    most = samples * heads * max(nq * max(k, 1), nk)
    if most > LARGEST_INDEX - READ_AHEAD:
        raise ValueError(f"a table of {most:,} entries is past what int32 can index; take fewer samples or heads")
    if not torch.compiler.is_compiling() and os.environ.get("SPARSEFLASH_DEBUG") == "1":
        _check_values(indices, counts, nk)

    rows, by_row = _rows(edges, indices.flatten(0, 1), None if counts is None else counts.flatten(0, 1))
    pattern_of = torch.arange(samples * heads, dtype=torch.int32, device=indices.device).view(samples, heads, 1)
    return Parts(
        shape=edges.shape,
        block=edges.block,
        q_offset=edges.q_offset,
        rows=rows,
        columns=_columns(edges, by_row),
        tiles=edges.tiles,
        pattern_of=pattern_of.expand(samples, heads, q_heads // heads).reshape(samples, q_heads),
    )


def _checked(indices: torch.Tensor, counts: torch.Tensor | None, q_heads: int | None) -> int:
    """The number of query heads."""
    for name, x, dims in (("indices", indices, "[B, H, nQ, k]"), ("counts", counts, "[B, H, nQ]")):
        if x is None:
            continue
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of ints {dims}, got {type(x).__name__}")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"{name} must be a tensor of ints {dims}, got {x.dtype}")
    if indices.dim() != 4 or 0 in indices.shape[:3]:
        raise ValueError(f"indices must be [B, H, nQ, k] with B, H and nQ at least 1, got {tuple(indices.shape)}")
    if counts is not None and counts.shape != indices.shape[:3]:
        raise ValueError(
            f"counts must be [B, H, nQ] = {tuple(indices.shape[:3])} like indices, got {tuple(counts.shape)}"
        )
    if counts is not None and counts.device != indices.device:
        raise ValueError(f"indices and counts must lie on one device, got {indices.device} and {counts.device}")
    heads: int = indices.shape[1]
    if q_heads is None:
        return heads
    if isinstance(q_heads, bool) or not isinstance(q_heads, int):
        raise TypeError(f"q_heads must be an int or None, got {q_heads!r}")
    if q_heads < 1 or q_heads % heads:
        raise ValueError(f"q_heads must be a multiple of the {heads} heads of indices, got {q_heads}")
    return q_heads


def _check_values(indices: torch.Tensor, counts: torch.Tensor | None, nk: int) -> None:
    """Raise for the first count or index out of range. Waits for the device."""
    if counts is not None:
        for b, h, row in ((counts < 0) | (counts > indices.shape[3])).nonzero()[:1].tolist():
            raise ValueError(
                f"counts of batch {b}, head {h}, block row {row} is {int(counts[b, h, row])}: "
                f"expected 0 to k = {indices.shape[3]}"
            )
    outside = (indices < 0) | (indices >= nk)
    if counts is not None:
        outside &= _counted(indices, counts)
    for b, h, row, i in outside.nonzero()[:1].tolist():
        raise ValueError(
            f"indices of batch {b}, head {h}, block row {row} name key block {int(indices[b, h, row, i])} "
            f"(entry {i}): expected 0 to {nk - 1}"
        )


def _counted(indices: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which entries [..., k] are among the first counts [...] of their row."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)


class Edges(NamedTuple):
    """The code of a selected block by its position: FULL, or cut by a ragged end or the diagonal of a causal mask.

    How the diagonal cuts a block depends only on its distance from the block, and only few distances matter.
    """

    shape: tuple[int, int]  # (q_len, kv_len)
    block: tuple[int, int]  # (BQ, BK)
    blocks: tuple[int, int]  # (nQ, nK)
    q_offset: int
    nearest: int  # the smallest distance listed: blocks up to it are not cut
    farthest: int  # the largest distance listed: blocks from it on are empty
    codes: torch.Tensor  # int32 [distances * 4]: by distance, in the last block row?, in the last block column?
    tiles: Tiles

    def codes_at(self, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """Codes of the blocks (rows, cols), int64 tensors that broadcast."""
        (nq, nk), (bq, bk) = self.blocks, self.block
        index = (rows == nq - 1) * 2 + (cols == nk - 1)
        if self.farthest > self.nearest:
            ahead = (cols * bk - rows * bq - self.q_offset) // min(bq, bk)
            index = index + (ahead.clamp(self.nearest, self.farthest) - self.nearest) * 4
        return self.codes[index]


def _edges(
    shape: int | tuple[int, int],
    block: int | tuple[int, int],
    q_offset: int | None,
    causal: bool,
    device: torch.device,
) -> Edges:
    """The edges of a mask of these lengths. A compiled graph computes them once, while tracing."""
    return unless_fake(_edges_of)(make_grid(shape, block, q_offset), bool(causal), device)


# What torch.compiler.assume_constant_result sets; calling it would import the compiler for everyone.
_edges._dynamo_marked_constant = True  # type: ignore[attr-defined]


@per_device(maxsize=64)
def _edges_of(grid: Grid, causal: bool, device: torch.device) -> Edges:
    check_not_capturing(device)
    (nq, nk), bq, bk, step = grid.shape, grid.bq, grid.bk, min(grid.bq, grid.bk)
    i, j = np.arange(bq)[:, None], np.arange(bk)
    nearest = farthest = 0
    if causal:  # key j of a block is `ahead * step + skew + j` positions after the block's first query
        skew = -grid.q_offset % step
        nearest, farthest = (1 - bk - skew) // step, -(-(bq - skew) // step)
    ahead = np.arange(nearest, farthest + 1)[:, None, None, None, None]
    bits = ahead * step + skew + j <= i if causal else np.ones((1, 1, 1, bq, bk), bool)
    last_row = np.stack([i < bq, i < grid.q_len - (nq - 1) * bq])[:, None]
    last_col = np.stack([j < bk, j < grid.kv_len - (nk - 1) * bk])[:, None]
    bits = bits & last_row & last_col
    tile_set = TileSet(bq, bk)
    codes = tile_set.codes(pack(bits.reshape(-1, bq, bk)))
    return Edges(
        shape=(grid.q_len, grid.kv_len),
        block=(bq, bk),
        blocks=grid.shape,
        q_offset=grid.q_offset,
        nearest=nearest,
        farthest=farthest,
        codes=tensor(codes, device),
        tiles=Tiles(*(tensor(array, device) for array in tile_arrays(tile_set.tiles()))),
    )


def _rows(edges: Edges, indices: torch.Tensor, counts: torch.Tensor | None) -> tuple[BlockLists, torch.Tensor]:
    """The side of the block rows, and its entries [P, nQ, k] as keys: the column, plus nK if PARTIAL; 2 nK if unused.

    Sorting by these keys puts FULL blocks before PARTIAL ones, each in the order of columns, and unused entries last.
    """
    nk, (patterns, lines, k) = edges.blocks[1], indices.shape
    line = torch.arange(lines, device=indices.device).unsqueeze(-1)
    chosen = indices.long()
    column = chosen.clamp(0, nk - 1)
    code = edges.codes_at(line, column)
    kept = (chosen == column) & (code != EMPTY)
    if counts is not None:
        kept = kept & _counted(indices, counts)
    key = torch.where(kept, column + nk * (code != FULL), 2 * nk).sort(-1).values
    again = key.diff(dim=-1, prepend=key.new_full((patterns, lines, 1), -1)) == 0
    key = key.masked_fill(again, 2 * nk).sort(-1).values

    full, stored = (key < nk).sum(-1), (key < 2 * nk).sum(-1)
    start = torch.arange(patterns * lines, device=key.device).view(patterns, lines) * k
    ranges = torch.stack([start, start + full, start + full, start + stored], -1)
    return _side(ranges, key % nk, edges.codes_at(line, key % nk)), key


def _columns(edges: Edges, by_row: torch.Tensor) -> BlockLists:
    """The side of the block columns, from the keys of the rows' entries."""
    nk, (patterns, lines, k) = edges.blocks[1], by_row.shape
    line = torch.arange(lines, device=by_row.device).unsqueeze(-1)
    # (column, PARTIAL or not, row) as one number; unused entries come after all columns.
    key = torch.where(by_row < 2 * nk, (by_row % nk * 2 + by_row // nk) * lines + line, 2 * nk * lines)
    key = key.flatten(1).sort(-1).values
    steps = torch.arange(2 * nk + 1, device=key.device) * lines
    bounds = torch.searchsorted(key, steps.expand(patterns, -1).contiguous())
    bounds = bounds + torch.arange(patterns, device=key.device).unsqueeze(-1) * (lines * k)
    start, middle, stop = bounds[:, 0:-1:2], bounds[:, 1::2], bounds[:, 2::2]
    column = (key // (2 * lines)).clamp(max=nk - 1)
    return _side(torch.stack([start, middle, middle, stop], -1), key % lines, edges.codes_at(key % lines, column))


def _side(ranges: torch.Tensor, others: torch.Tensor, codes: torch.Tensor) -> BlockLists:
    """One side from its ranges [P, n, 4], which point into the flat list of blocks on the other side."""
    entries = F.pad(others.flatten(), (0, READ_AHEAD)).int()
    tile = F.pad((codes - FIRST_TILE).clamp(min=0).flatten(), (0, READ_AHEAD))
    weight = ranges[..., 3] - ranges[..., 0]
    order = weight.argsort(dim=1, descending=True, stable=True)
    patterns = ranges.shape[0]  # no splits, because the host does not know their number
    work, reductions = (ranges.new_empty((patterns, 0, fields), dtype=torch.int32) for fields in (6, 3))
    return BlockLists(ranges.int(), entries, entries, tile.int(), order.int(), work, reductions)
