"""LookupTable: a block mask on a device, in the order in which kernels read it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflash.kernels.layout import Side, Tiles
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.runs import FIRST_TILE, FULL, Runs

# Kernels load the next block's index while they work on the current one; reading past the end must be harmless.
READ_AHEAD = 4


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


def lookup(mask: BlockMask, device: torch.device | str = "cpu") -> LookupTable:
    """The lookup table of a mask on a device, cached by content and device. ``attention`` calls this by itself.

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
        raise TypeError(f"lookup takes a BlockMask (pattern.compile(...)), got {mask!r}")
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _lookup(mask, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a table first asked for while evaluating must serve a later backward pass
def _lookup(mask: BlockMask, device: torch.device) -> LookupTable:
    patterns = mask.patterns
    # A kernel may read the words of a tile ahead of knowing that there is none.
    bits = mask.tiles if len(mask.tiles) else np.zeros((1, *mask.tiles.shape[1:]), np.uint32)
    return LookupTable(
        shape=mask.shape,
        block=mask.block,
        q_offset=mask.q_offset,
        rows=_side(mask.runs, patterns, device),
        columns=_side(mask.runs.transposed(patterns), patterns, device),
        tiles=Tiles(
            bits=_tensor(bits.view(np.int32), device),
            seen_keys=_tensor(np.bitwise_or.reduce(bits, axis=1).view(np.int32), device),
        ),
        pattern_of=_tensor(mask.pattern_of, device),
    )


def _side(runs: Runs, patterns: int, device: torch.device) -> Side:
    lines, others = runs.shape
    per_line = np.bincount(runs.row[runs.letter == FULL], minlength=lines)
    shared = per_line == 1  # one run of FULL blocks: a range of 0, 1, 2, ...
    alone = (runs.letter == FULL) & shared[runs.row]
    rest = (runs.letter == FULL) & ~alone
    partial = runs.letter >= FIRST_TILE
    common = np.arange(others if shared.any() else 0)

    line, full, _ = _subset(runs, rest).blocks()
    bounds = np.searchsorted(line, np.arange(lines + 1)) + common.size
    spans = np.empty((lines, 4), np.int64)
    spans[:, 0], spans[:, 1] = bounds[:-1], bounds[1:]
    spans[runs.row[alone], 0] = runs.start[alone] % others
    spans[runs.row[alone], 1] = runs.start[alone] % others + runs.length[alone]

    line, masked, letter = _subset(runs, partial).blocks()
    bounds = np.searchsorted(line, np.arange(lines + 1))
    spans[:, 2], spans[:, 3] = bounds[:-1], bounds[1:]
    if spans.max(initial=0) > np.iinfo(np.int32).max - READ_AHEAD:
        raise ValueError(f"a table of {int(spans.max()):,} entries is past what int32 can index")
    weight = (spans[:, 1] - spans[:, 0] + spans[:, 3] - spans[:, 2]).reshape(patterns, -1)
    return Side(
        spans=_tensor(spans.reshape(patterns, -1, 4), device),
        full=_tensor(_padded(np.concatenate([common, full])), device),
        partial=_tensor(_padded(masked), device),
        tile=_tensor(_padded(letter - FIRST_TILE), device),
        order=_tensor(np.argsort(-weight, axis=1, kind="stable"), device),
    )


def _subset(runs: Runs, chosen: NDArray[np.bool_]) -> Runs:
    return Runs(runs.shape, runs.start[chosen], runs.stop[chosen], runs.letter[chosen])


def _padded(index: NDArray[Any]) -> NDArray[Any]:
    return np.pad(index, (0, READ_AHEAD))


def _tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.int32, order="C")).to(device)
