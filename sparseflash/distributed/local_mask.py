"""The part of a mask that one rank computes: its block rows and the key blocks it holds or received, put together.

It is a mask like any other, rectangular, with the letters and tiles of the whole one. Where its blocks stand is the
*layout*:

- packed: side by side, nothing between them. What attention by tables alone needs, and the least memory.
- aligned: as far from each other as in the whole sequence, the first ones at the start. Distances between queries and
  keys are those of the whole sequence, which ALiBi needs.
- global: where they stand in the whole sequence. Dropout's bits depend on the indices of query and key.

The last two leave gaps, which no table lists and no kernel reads, but which take memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from sparseflash.distributed.partition import Bools
from sparseflash.distributed.plan import Blocks, Plan
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.runs import Runs

Layout: TypeAlias = Literal["packed", "aligned", "global"]


@dataclass(frozen=True)
class Places:
    """Where the blocks that a rank computes with stand in its own tensors."""

    blocks: Ints  # which blocks of the whole sequence, ascending
    place: Ints  # where each stands, ascending
    size: int  # tokens a block
    length: int  # tokens in all, gaps included

    @classmethod
    def of(cls, side: Blocks, rank: int, layout: Layout) -> Places:
        blocks = np.flatnonzero(side.wanted[rank])
        first = {"packed": 0, "aligned": int(blocks[0]), "global": 0}[layout]
        place = np.arange(blocks.size) if layout == "packed" else blocks - first
        length = int(place[-1]) * side.size + int(side.tokens[blocks[-1]])  # only the last block may be ragged
        return cls(blocks, place, side.size, length)

    @property
    def room(self) -> int:
        """Blocks in all, gaps included."""
        return int(self.place[-1]) + 1

    @property
    def shift(self) -> int:
        """Tokens by which the first block stands further ahead than in the whole sequence."""
        return int(self.blocks[0] - self.place[0]) * self.size

    def edges(self, column: Ints) -> Ints:
        """Where a stretch of wanted blocks that begins or ends at a column of the whole mask does so here."""
        at: Ints = np.searchsorted(self.blocks, column)
        return at if self.room == self.blocks.size else column - self.shift // self.size


def local_mask(plan: Plan, rank: int, rows: Places, columns: Places) -> BlockMask:
    """What a rank computes, as a mask over its own tensors."""
    mask, (nq, nk) = plan.mask, plan.mask.grid_shape
    patterns = np.arange(mask.patterns)[:, None]
    runs = mask.runs.select_rows((patterns * nq + rows.blocks).ravel())
    if plan.split.any():
        runs = _held(runs, np.tile(plan.split[rows.blocks], mask.patterns), plan.columns.owner == rank)
    pattern, row = runs.row // rows.blocks.size, runs.row % rows.blocks.size
    line = (pattern * rows.room + rows.place[row]) * columns.room
    begin = runs.start - runs.row * nk
    placed = Runs(
        (mask.patterns * rows.room, columns.room),
        line + columns.edges(begin),
        line + columns.edges(begin + runs.length),
        runs.letter,
    )
    offset = mask.q_offset + rows.shift - columns.shift
    grid = Grid(rows.length, columns.length, rows.size, columns.size, offset)
    return BlockMask.canonical(grid, placed, mask.tiles, mask.pattern_of)


def _held(runs: Runs, split: Bools, held: Bools) -> Runs:
    """The runs, those of split rows reduced to the columns that a rank holds."""
    cut = split[runs.row]
    some = Runs(runs.shape, runs.start[cut], runs.stop[cut], runs.letter[cut])
    rows, cols, letters = some.blocks()
    kept = held[cols]
    pieces = Runs.from_blocks(runs.shape, rows[kept], cols[kept], letters[kept])
    whole = Runs(runs.shape, runs.start[~cut], runs.stop[~cut], runs.letter[~cut])
    together = whole.beside(pieces)
    assert together is not None, "a row is split or whole"
    return together
