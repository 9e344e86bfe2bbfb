"""The memory layout of a lookup table, which is all that kernels know of a mask.

Shape legend: P distinct patterns, nQ / nK block rows / columns, T tiles, BQ x BK tokens a block,
W = ceil(BK / 32) words a tile row.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP = range(4)

# What a gradient takes beside the operands: dout [B, Hq, N, Dv], dlse [B, Hq, N] or None, out, lse.
Results = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]


# Fields of `BlockLists`, by their names before 2026-12.
RENAMED = {
    "spans": "ranges",
    "full": "full_indices",
    "partial": "partial_indices",
    "tile": "partial_tiles",
    "work": "work_items",
    "merges": "reductions",
}


class BlockLists(NamedTuple):
    """One orientation of a table: for each block row its key blocks, or for each block column its query blocks.

    A line (block row or block column) lists its FULL blocks, then its PARTIAL ones, each in ascending order. Lines may
    share a range of ``full_indices``: every line of a dense mask reads the same ``0, 1, 2, ...``, so a dense table is
    O(N).
    """

    ranges: torch.Tensor  # int32 [P, n, 4]: start and stop of a line in full_indices, then in partial_indices
    full_indices: torch.Tensor  # int32 [F]: block index on the other side
    partial_indices: torch.Tensor  # int32 [S]: block index on the other side
    partial_tiles: torch.Tensor  # int32 [S]: which tile masks that PARTIAL block
    order: torch.Tensor  # int32 [P, n]: the lines, those with most blocks first
    # Lines far above the mean are split among several programs. Where none is, W = L = 0 and `order` is used alone.
    # A work item, heaviest first: a line or -1 (nothing to do); where it starts and stops in full_indices and in
    # partial_indices; a slot for its partial result or -1 (it is the whole line). The splits of a line follow each
    # other through its FULL, then its PARTIAL entries; at their border one of the two ranges is empty.
    work_items: torch.Tensor  # int32 [P, W, 6]
    reductions: torch.Tensor  # int32 [P, L, 3]: a split line or -1 (none), its first slot and the one past its last

    def __getattr__(self, name: str) -> torch.Tensor:
        """The field that once had this name."""
        if name not in RENAMED:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        warnings.warn(f"{name} is called {RENAMED[name]} now", DeprecationWarning, stacklevel=2)
        field: torch.Tensor = getattr(self, RENAMED[name])
        return field

    @property
    def items(self) -> int:
        """Lines and splits of lines that programs are started for, in each pattern."""
        return self.work_items.shape[1] or self.order.shape[1]

    @property
    def slots(self) -> int:
        """The most partial results that a head has, from shapes alone: 0 when no line is split."""
        return self.items - self.order.shape[1] + self.reductions.shape[1]

    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, by name: torch.compile of torch 2.11 cannot iterate over a tuple that is a graph's constant."""
        return [
            *(self.ranges, self.full_indices, self.partial_indices, self.partial_tiles),
            *(self.order, self.work_items, self.reductions),
        ]


class Tiles(NamedTuple):
    """The bits inside PARTIAL blocks. Bit j of word w in row i: may query i of the block see its key 32 w + j?"""

    bits: torch.Tensor  # int32 [T, BQ, W]
    seen_keys: torch.Tensor  # int32 [T, W]: the OR over a tile's rows: keys that some query of the block sees

    def tensors(self) -> list[torch.Tensor]:
        """Its tensors, by name as well."""
        return [self.bits, self.seen_keys]


class Score(NamedTuple):
    """The steps from q.k to a probability, in this order: scale, cap, bias, softmax, dropout.

    A feature is off when it is None. Data are run-time arguments of the kernels.
    """

    scale: float
    softcap: float | None = None  # s -> softcap * tanh(s / softcap)
    slopes: torch.Tensor | None = None  # fp32 [Hq] or [B, Hq]: s -> s - slope * |query's position - key's position|
    q_offset: int = 0  # position of query 0; key 0 stands at 0
    dropout: float = 0.0  # share of the probabilities that becomes 0; needs a seed
    seed: torch.Tensor | None = None  # int64 []; None: no dropout
    # The last field: operators take it first, because it has a gradient.
    bias: torch.Tensor | None = None  # floating, of a form of `bias`: s -> s + bias; -inf hides the pair

    @property
    def featured(self) -> bool:
        """Whether more than the scale comes between a product and its probability."""
        return not (self.softcap is None and self.slopes is None and self.seed is None and self.bias is None)
