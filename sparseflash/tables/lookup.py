"""From a block mask to its lookup table, cached by content and device."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import TABLES
from sparseflash.patterns.described import described
from sparseflash.patterns.intervals import positions
from sparseflash.patterns.overlay import transposed
from sparseflash.patterns.runs import FIRST_TILE, FULL, Runs
from sparseflash.tables.device import READ_AHEAD, capturing, check_not_capturing, per_device, unless_fake
from sparseflash.tables.packing import Header, pack, tile_arrays
from sparseflash.tables.splitting import assign, split_counts, weights
from sparseflash.tables.table import LookupTable

# A CUDA graph reads the tables it was captured with as long as it is replayed, so the cache may not free them.
_captured: set[LookupTable] = set()


def lookup(mask: BlockMask, device: torch.device | str = "cpu") -> LookupTable:
    """The lookup table of a mask on a device, cached by content and device. ``attention`` calls this by itself.

    The cache holds at most 64 tables and, besides the newest, at most 256 MB.

    Args:
        mask: a compiled pattern.
        device: device of the table's tensors.

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
    table = unless_fake(cached_lookup)(mask, device)
    if capturing(device):
        _captured.add(table)
    return table


@TABLES.bounds
@per_device(maxsize=64)
def cached_lookup(mask: BlockMask, device: torch.device) -> LookupTable:
    """:func:`lookup` for a device with an index, remembered."""
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


def _side(runs: Runs, patterns: int) -> list[NDArray[Any]]:
    """The arrays of a :class:`BlockLists`."""
    lines, others = runs.shape
    row, length = runs.row, runs.length
    first = runs.start - row * others
    is_full = runs.code == FULL
    filled, partial = np.flatnonzero(is_full), np.flatnonzero(~is_full)
    shared = np.bincount(row[filled], minlength=lines) == 1  # one run of FULL blocks: a range of 0, 1, 2, ...
    in_range = shared[row[filled]]
    alone, rest = filled[in_range], filled[~in_range]
    common = others if alone.size else 0

    ranges = np.empty((lines, 4), np.int32)
    for at, chosen, skipped in ((0, rest, common), (2, partial, 0)):
        entries = np.zeros(lines + 1, np.int64)
        np.add.at(entries, row[chosen] + 1, length[chosen])
        np.cumsum(entries, out=entries)
        entries += skipped
        if entries[-1] > np.iinfo(np.int32).max - READ_AHEAD:
            raise ValueError(f"a table of {int(entries[-1]):,} entries is past what int32 can index")
        ranges[:, at], ranges[:, at + 1] = entries[:-1], entries[1:]
    line, begin = row[alone], first[alone]
    ranges[line, 0], ranges[line, 1] = begin, begin + length[alone]
    full, masked = (positions(at, at + length[chosen]) for chosen in (rest, partial) for at in (first[chosen],))
    code = np.repeat(runs.code[partial], length[partial])
    by_pattern = ranges.reshape(patterns, -1, 4)
    weight = weights(by_pattern)
    work, reductions = np.empty((patterns, 0, 6), np.int64), np.empty((patterns, 0, 3), np.int64)
    if (split_counts(weight) > 1).any():
        work, reductions = assign(by_pattern)
    return [
        by_pattern,
        _padded(np.arange(common, dtype=np.int32), full),
        _padded(masked),
        _padded(code - FIRST_TILE),
        np.argsort(-weight, axis=1, kind="stable"),
        work,
        reductions,
    ]


def _padded(*parts: NDArray[Any]) -> NDArray[np.int32]:
    filled = sum(part.size for part in parts)
    padded = np.zeros(filled + READ_AHEAD, np.int32)
    np.concatenate(parts, out=padded[:filled], casting="same_kind")
    return padded
