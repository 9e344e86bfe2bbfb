"""A slow check of the invariants of a compiled mask, written independently of the compiler."""

from __future__ import annotations

import numpy as np

from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.runs import FIRST_TILE, FULL
from sparseflash.patterns.tiles import unpack, words_per_row


def check(mask: MaskData) -> None:
    """Raise ValueError with the first invariant that the mask violates.

    Time and memory are linear in runs and tiles.
    """
    _check_arrays(mask)
    _check_runs(mask)
    _check_tiles(mask)
    _check_numbering(mask)


def _demand(holds: bool | np.bool_, promise: str) -> None:
    if not holds:
        raise ValueError(f"the mask is damaged: {promise}")


def _check_arrays(mask: MaskData) -> None:
    runs, (bq, bk) = mask.runs, mask.block
    for name, array, dtype, shape in (
        ("start", runs.start, np.int64, (len(runs),)),
        ("stop", runs.stop, np.int64, (len(runs),)),
        ("code", runs.code, np.int32, (len(runs),)),
        ("tiles", mask.tiles, np.uint32, (len(mask.tiles), bq, words_per_row(bk))),
        ("pattern_of", mask.pattern_of, np.int32, mask.pattern_of.shape[:2]),
    ):
        _demand(array.dtype == dtype, f"{name} is {np.dtype(dtype)}, not {array.dtype}")
        _demand(array.shape == shape, f"{name} has shape {shape}, not {array.shape}")
        _demand(not array.flags.writeable, f"{name} is read-only")
    _demand(mask.pattern_of.size > 0, "there is at least one pattern")
    _demand(runs.shape == (mask.patterns * mask.grid.rows, mask.grid.cols), f"runs lie in {runs.shape}")


def _check_runs(mask: MaskData) -> None:
    previous_stop, previous_code = 0, 0
    rows, cols = mask.runs.shape
    for start, stop, code in zip(*(x.tolist() for x in (mask.runs.start, mask.runs.stop, mask.runs.code)), strict=True):
        where = f"the run at block row {start // cols}, column {start % cols}"
        _demand(0 <= start < stop <= rows * cols, f"{where} lies in the matrix and is not empty")
        _demand(start // cols == (stop - 1) // cols, f"{where} stays in its row")
        _demand(start >= previous_stop, f"{where} begins where the one before has ended")
        joined = start == previous_stop and start % cols != 0 and code == previous_code
        _demand(not joined, f"{where} is not the continuation of the one before")
        _demand(FULL <= code < FIRST_TILE + len(mask.tiles), f"{where} has the code of a tile, not {code}")
        previous_stop, previous_code = stop, code


def _check_tiles(mask: MaskData) -> None:
    grid, (bq, bk) = mask.grid, mask.block
    seen = set()
    spare = words_per_row(bk) * 32 - bk
    for number, words in enumerate(mask.tiles):
        bits = unpack(words, bk)
        _demand(bits.any(), f"tile {number} is not empty")
        _demand(not bits.all(), f"tile {number} is not full")
        _demand(not spare or not (words[:, -1] >> np.uint32(32 - spare)).any(), f"tile {number} ends with its block")
        content = words.tobytes()
        _demand(content not in seen, f"tile {number} stands there once")
        seen.add(content)
    # In a ragged last block row or column no bit may lie past the lengths, so no block there can be FULL.
    q_left, k_left = grid.q_len - (grid.rows - 1) * bq, grid.kv_len - (grid.cols - 1) * bk
    rows, cols = mask.runs.row % grid.rows, mask.runs.stop - mask.runs.row * grid.cols
    for ragged, last, inside, what in (
        (q_left < bq, rows == grid.rows - 1, np.s_[:, q_left:, :], "rows"),
        (k_left < bk, cols == grid.cols, np.s_[:, :, k_left:], "columns"),
    ):
        if ragged:
            codes = np.unique(mask.runs.code[last])
            _demand(FULL not in codes, f"no FULL block lies in the ragged last block {what}")
            _demand(not unpack(mask.tiles[codes - FIRST_TILE], bk)[inside].any(), f"no bit lies past the last {what}")


def _check_numbering(mask: MaskData) -> None:
    codes = mask.runs.code[mask.runs.code >= FIRST_TILE]
    first = np.unique(codes, return_index=True)[1]
    _demand(first.size == len(mask.tiles), "every tile is used")
    _demand((np.diff(first) > 0).all(), "tiles are numbered in the order in which they are met")
    patterns = mask.pattern_of.ravel()
    found, first = np.unique(patterns, return_index=True)
    _demand(np.array_equal(found, np.arange(found.size)), "patterns are numbered from 0 without gaps")
    _demand((np.diff(first) > 0).all(), "patterns are numbered in the order in which they are met")
    bounds = np.searchsorted(mask.runs.row, np.arange(mask.patterns + 1) * mask.grid.rows)
    contents = set()
    for p in range(mask.patterns):
        part, base = slice(bounds[p], bounds[p + 1]), p * mask.grid.rows * mask.grid.cols
        runs = mask.runs
        contents.add(
            (
                *(runs.start[part] - base).tolist(),
                -1,
                *(runs.stop[part] - base).tolist(),
                -1,
                *runs.code[part].tolist(),
            )
        )
    _demand(len(contents) == mask.patterns, "patterns are distinct")
