"""Masks from and to arrays: dense token masks, and scipy matrices of block codes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse

from sparseflash.patterns.grid import Grid, is_int, make_grid
from sparseflash.patterns.mask_data import MaskData, leading
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL, Runs
from sparseflash.patterns.set_operations import full_mask, intersection
from sparseflash.patterns.tiles import TileSet, Words, no_tiles, pack, tile_table, unpack, words_per_row

BLOCKS_AT_ONCE = 4096


def to_dense(mask: MaskData) -> NDArray[np.bool_]:
    """See :meth:`BlockMask.to_dense`."""
    (bq, bk), (nq, nk) = mask.block, mask.grid_shape
    dense = np.zeros((mask.patterns * nq, bq, nk, bk), bool)
    rows, cols, codes = mask.runs.blocks()
    words = tile_table(mask.tiles, bq, bk)
    for begin in range(0, codes.size, BLOCKS_AT_ONCE):
        some = slice(begin, begin + BLOCKS_AT_ONCE)
        dense[rows[some], :, cols[some], :] = unpack(words[codes[some]], bk)
    dense = dense.reshape(mask.patterns, nq * bq, nk * bk)[:, : mask.shape[0], : mask.shape[1]]
    return dense[mask.pattern_of].reshape(*leading(mask.pattern_of), *mask.shape)


def from_dense(token_mask: NDArray[np.bool_], block: int | tuple[int, int], q_offset: int | None) -> MaskData:
    """See :meth:`BlockMask.from_dense`."""
    token_mask = np.asarray(token_mask)
    if token_mask.dtype != np.bool_ or token_mask.ndim != 2:
        raise TypeError(
            f"from_dense takes booleans [q_len, kv_len], got {token_mask.dtype} of shape {token_mask.shape}"
        )
    grid = make_grid((token_mask.shape[0], token_mask.shape[1]), block, q_offset)
    shape = (grid.rows, grid.bq, grid.cols, grid.bk)
    padded = np.zeros((shape[0] * shape[1], shape[2] * shape[3]), bool)
    padded[: grid.q_len, : grid.kv_len] = token_mask
    blocks = padded.reshape(shape).swapaxes(1, 2)
    rows, cols = np.nonzero(np.any(blocks, axis=(2, 3)))
    tile_set = TileSet(grid.bq, grid.bk)
    codes = tile_set.codes(pack(blocks[rows, cols]))
    return MaskData.canonical(grid, Runs.from_blocks(grid.shape, rows, cols, codes), tile_set.tiles())


def to_scipy(mask: MaskData, pattern: int) -> csr_array:
    """See :meth:`BlockMask.to_scipy`."""
    if not is_int(pattern) or not 0 <= pattern < mask.patterns:
        raise ValueError(f"to_scipy: pattern must be 0 to {mask.patterns - 1}, got {pattern!r}")
    nq, nk = mask.grid_shape
    rows, cols, codes = mask.runs.select_rows(np.arange(pattern * nq, (pattern + 1) * nq)).blocks()
    return csr_array((codes, (rows, cols)), shape=(nq, nk))


def from_scipy(
    codes: Any,
    seq_len: int | tuple[int, int],
    block: int | tuple[int, int],
    tiles: NDArray[Any] | None,
    q_offset: int | None,
) -> MaskData:
    """See :meth:`BlockMask.from_scipy`."""
    if not issparse(codes) or codes.dtype.kind not in "biu":
        what = f"one of {codes.dtype}" if issparse(codes) else type(codes).__name__
        raise TypeError(f"from_scipy takes a scipy.sparse matrix of booleans or ints, got {what}")
    grid = make_grid(seq_len, block, q_offset)
    if codes.shape != grid.shape:
        raise ValueError(f"{grid} are {grid.rows} x {grid.cols} blocks; the matrix has shape {codes.shape}")
    words = _words(tiles, grid)
    stored = codes.tocoo(copy=True).astype(np.int64)  # narrow codes stored twice must not wrap around
    stored.sum_duplicates()
    largest = FULL if not len(words) else FIRST_TILE + len(words) - 1
    for i in np.flatnonzero((stored.data < EMPTY) | (stored.data > largest))[:1]:
        raise ValueError(
            f"block ({stored.row[i]}, {stored.col[i]}) has code {stored.data[i]}: "
            f"expected 0 to {largest} with {len(words)} tiles"
        )
    linear = stored.row.astype(np.int64) * grid.cols + stored.col
    order = np.argsort(linear, kind="stable")
    linear = linear[order]
    runs = Runs(grid.shape, linear, linear + 1, stored.data[order].astype(np.int32))
    return intersection(MaskData.canonical(grid, runs, words), full_mask(grid))  # bits past the lengths are dropped


def _words(tiles: NDArray[Any] | None, grid: Grid) -> Words:
    if tiles is None:
        return no_tiles(grid.bq, grid.bk)
    tiles = np.asarray(tiles)
    as_bits, as_words = (grid.bq, grid.bk), (grid.bq, words_per_row(grid.bk))
    if tiles.ndim == 3 and tiles.dtype == np.bool_ and tiles.shape[1:] == as_bits:
        return pack(tiles)
    if tiles.ndim == 3 and tiles.dtype == np.uint32 and tiles.shape[1:] == as_words:
        return pack(unpack(tiles, grid.bk))  # bits past the block are dropped
    raise ValueError(
        f"tiles of {grid.bq} x {grid.bk} tokens must be booleans [T, {grid.bq}, {grid.bk}] or uint32 "
        f"[T, {as_words[0]}, {as_words[1]}], got {tiles.dtype} {list(tiles.shape)}"
    )
