"""An independent, slow check of the invariants of a table, written from the description of its layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflash.kernels.layout import BlockLists
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.tables.device import READ_AHEAD

if TYPE_CHECKING:
    from sparseflash.tables.table import LookupTable

Entries = dict[tuple[int, int, int], int]  # (pattern, line, block on the other side) -> tile, -1 for FULL


def check_table(table: LookupTable, mask: BlockMask | None = None) -> None:
    """Raise ValueError for the first entry that breaks an invariant of kernels.

    Args:
        table: a table on any device; it is copied to the host and checked entry by entry.
        mask: the mask that the table was made from, to compare the entries with.
    """
    (bq, bk), (q_len, kv_len) = table.block, table.shape
    rows, cols = -(-q_len // bq), -(-kv_len // bk)
    bits, seen = (_ints(x, "tiles") for x in table.tiles)
    pattern_of = _ints(table.pattern_of.contiguous(), "pattern_of")  # kernels read it by its strides
    _demand(pattern_of.ndim == 2 and pattern_of.size > 0, "pattern_of is [samples, heads]")
    patterns = table.rows.ranges.shape[0]
    _demand(pattern_of.min() >= 0 and pattern_of.max() < patterns, f"pattern_of names patterns below {patterns}")
    _demand(bits.shape[1:] == (bq, -(-bk // 32)), f"tiles are {bq} rows of {-(-bk // 32)} words, not {bits.shape}")
    _demand(np.array_equal(seen, np.bitwise_or.reduce(bits, axis=1)), "seen_keys is the OR over each tile's rows")
    by_row = _entries(table.rows, "row", patterns, rows, cols, len(bits))
    by_column = _entries(table.columns, "column", patterns, cols, rows, len(bits))
    turned = {(p, row, col): tile for (p, col, row), tile in by_column.items()}
    for at in by_row.keys() ^ turned.keys():
        raise ValueError(f"the table is damaged: block {at} (pattern, row, column) is on one side only")
    for at, tile in by_row.items():
        _demand(turned[at] == tile, f"block {at} (pattern, row, column) has one tile on both sides")
    if mask is not None:
        _check_against(by_row, table, mask)


def _demand(holds: bool | np.bool_, promise: str) -> None:
    if not holds:
        raise ValueError(f"the table is damaged: {promise}")


def _ints(tensor: torch.Tensor, name: str) -> NDArray[np.int32]:
    _demand(tensor.dtype == torch.int32, f"{name} is int32, not {tensor.dtype}")
    _demand(tensor.is_contiguous(), f"{name} is contiguous")
    array: NDArray[np.int32] = tensor.cpu().numpy()
    return array


def _entries(side: BlockLists, name: str, patterns: int, lines: int, others: int, tiles: int) -> Entries:
    """The blocks that a side lists, after checking all of its tensors."""
    ranges, full, partial, tile, order, work, reductions = (
        _ints(x, f"{f} of the {name}s") for f, x in zip(side._fields, side, strict=True)
    )
    shape = (patterns, lines, 4)
    _demand(ranges.shape == shape, f"ranges of the {name}s is {shape}, not {ranges.shape}")
    _demand(order.shape == (patterns, lines), f"order of the {name}s is {(patterns, lines)}, not {order.shape}")
    _demand(partial.shape == tile.shape, f"every PARTIAL entry of the {name}s has a tile")
    for what, array, fields in (("work_items", work, 6), ("reductions", reductions, 3)):
        whole = array.ndim == 3 and array.shape[::2] == (patterns, fields)
        _demand(whole, f"{what} of the {name}s is ({patterns}, items, {fields}), not {array.shape}")
    lists = (("full_indices", others, full), ("partial_indices", others, partial), ("partial_tiles", tiles, tile))
    for what, limit, array in lists:
        inside = (array >= 0) & (array < limit)
        _demand(inside.all(), f"{what} of the {name}s names {limit} at most, not {array[~inside][:1]}")
    found: Entries = {}
    for p in range(patterns):
        for line, (a, b, c, d) in enumerate(ranges[p].tolist()):
            where = f"{name} {line} of pattern {p}"
            _demand(0 <= a <= b <= full.size - READ_AHEAD, f"FULL entries of {where} lie in the list")
            _demand(0 <= c <= d <= partial.size - READ_AHEAD, f"PARTIAL entries of {where} lie in the list")
            for blocks in (full[a:b], partial[c:d]):
                _demand((np.diff(blocks) > 0).all(), f"{where} lists its blocks in ascending order, each once")
            here = dict.fromkeys(full[a:b].tolist(), -1) | dict(
                zip(partial[c:d].tolist(), tile[c:d].tolist(), strict=True)
            )
            _demand(len(here) == b - a + d - c, f"{where} lists no block as both FULL and PARTIAL")
            found |= {(p, line, block): t for block, t in here.items()}
        weight = ranges[p, :, 1] - ranges[p, :, 0] + ranges[p, :, 3] - ranges[p, :, 2]
        _demand(np.array_equal(np.sort(order[p]), np.arange(lines)), f"order of pattern {p} names every {name} once")
        _demand((np.diff(weight[order[p]]) <= 0).all(), f"order of pattern {p} has heavy {name}s first")
        if work.shape[1]:
            _check_work(work[p], reductions[p], ranges[p], f"{name}s of pattern {p}")
    return found


def _check_work(work: NDArray[np.int32], reductions: NDArray[np.int32], ranges: NDArray[np.int32], where: str) -> None:
    """Check that the splits of a line leave no gap and do not overlap, and that reductions name splits of one line."""
    splits: dict[int, list[list[int]]] = {}
    for item in work[work[:, 0] >= 0].tolist():
        splits.setdefault(item[0], []).append(item[1:])
    _demand(sorted(splits) == list(range(len(ranges))), f"work items of the {where} cover every line")
    named = {line: (first, past) for line, first, past in reductions[reductions[:, 0] >= 0].tolist()}
    slots: list[int] = []
    for line, parts in splits.items():
        parts.sort(key=lambda part: part[4])
        here = [part[4] for part in parts]
        slots += [slot for slot in here if slot >= 0]
        if line in named:
            first, past = named[line]  # may be any numbers, so no array of this length may be allocated
            in_turn = past - first == len(here) and here == list(range(first, past))
            _demand(in_turn, f"line {line} of the {where} is reduced from its slots")
        else:
            _demand(here == [-1], f"line {line} of the {where}, not reduced, is one work item")
        for kind in (0, 2):
            spots = [part[kind + end] for part in parts for end in (0, 1)]
            ends = [ranges[line, kind], *spots, ranges[line, kind + 1]]
            paired = np.array(ends).reshape(-1, 2)
            _demand((paired[:, 0] == paired[:, 1]).all(), f"splits of line {line} of the {where} follow each other")
    there = work[work[:, 0] >= 0]
    sizes = there[:, 2] - there[:, 1] + there[:, 4] - there[:, 3]
    _demand((np.diff(sizes) <= 0).all(), f"work items of the {where} have heavy ones first")
    _demand(len(set(slots)) == len(slots), f"slots of the {where} are used once")


def _check_against(found: Entries, table: LookupTable, mask: BlockMask) -> None:
    _demand(table.shape == mask.shape and table.block == mask.block, "the table has the mask's lengths and block")
    _demand(table.q_offset == mask.q_offset, "the table has the mask's offset")
    _demand(np.array_equal(table.pattern_of.cpu().numpy(), mask.pattern_of), "heads have the mask's patterns")
    rows, cols, codes = mask.runs.blocks()
    n = mask.grid_shape[0]
    stored = {
        (row // n, row % n, col): code - 2
        for row, col, code in zip(rows.tolist(), cols.tolist(), codes.tolist(), strict=True)
    }
    _demand(found == stored, "the table lists the mask's blocks and tiles")
    if len(mask.tiles):
        bits = table.tiles.bits.cpu().numpy().view(np.uint32)
        _demand(np.array_equal(bits, mask.tiles), "the table has the mask's tiles")
