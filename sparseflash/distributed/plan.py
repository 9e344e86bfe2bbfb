"""Who needs what: the plan of an exchange, read from the mask, and what it means for one rank.

A :class:`Plan` is the same on every rank. From it follow, for each rank, the layout of its own tensors
(:class:`LocalLayout`), the part of the mask that it computes (:func:`local_mask`), and the tokens that it sends and
receives (:func:`send_recv_lists`).

Legend: R ranks, nQ / nK block rows / columns of the whole mask, S tokens of a rank's shard, L tokens of its own
tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from typing import Literal, TypeAlias

import numpy as np
import torch

from sparseflash.distributed.exchange import SendRecv
from sparseflash.distributed.partition import (
    Bools,
    Owners,
    column_workloads,
    required_key_blocks,
    row_workloads,
    split_rows,
)
from sparseflash.distributed.sharding import Sharding
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.intervals import Ints, positions
from sparseflash.patterns.runs import Runs, frozen

# If the ranks need at least this share of all keys that they do not hold, all keys are exchanged: an all-gather sends
# one copy of a shard, an all-to-all one copy for each receiver.
DENSE = 0.9

Layout: TypeAlias = Literal["packed", "aligned", "global"]


@dataclass(frozen=True)
class Blocks:
    """The block rows or the block columns of a mask: who holds them, and which ranks compute with them."""

    length: int  # tokens
    size: int  # tokens per block
    owner: Owners  # int32 [n], the rank that holds each block
    wanted: Bools  # [R, n], which ranks compute with each block

    @property
    def tokens(self) -> Ints:
        """Tokens of each block, [n]."""
        return np.minimum(self.size, self.length - np.arange(self.owner.size) * self.size)

    @property
    def traffic(self) -> Ints:
        """Tokens that each rank (first) sends to each other rank (second), int64 [R, R]."""
        ranks = len(self.wanted)
        sizes = self.tokens.astype(np.float64)
        sent = [np.bincount(self.owner, weights=sizes * wanted, minlength=ranks) for wanted in self.wanted]
        traffic = np.stack(sent, axis=1).astype(np.int64)
        np.fill_diagonal(traffic, 0)
        return traffic


@dataclass(frozen=True, eq=False)
class Plan:
    """What context parallel attention does for a mask and the shardings of its queries and keys.

    Made by :func:`plan`, on the host, once; every rank makes the same one.
    """

    mask: BlockMask
    queries: Sharding
    keys: Sharding
    split: Bools  # [nQ], rows whose queries go to all ranks
    rows: Blocks  # the block rows; `wanted` are those that each rank computes, its own and the split ones
    columns: Blocks  # the key blocks; `wanted` are those that each rank computes with
    dense: bool  # nearly every rank needs nearly every key, so all keys are exchanged

    @property
    def ranks(self) -> int:
        return self.queries.ranks

    @cached_property
    def description(self) -> str:
        """Text that tells plans apart."""
        owners = blake2b(self.queries.owner.tobytes() + self.keys.owner.tobytes(), digest_size=4).hexdigest()
        return f"mask {self.mask.digest.hex()}, {self.queries!r}, keys {self.keys!r}, owners {owners}"

    @property
    def work(self) -> Ints:
        """Stored blocks that each rank computes, summed over heads and samples, int64 [R]."""
        heads = self.mask.pattern_of.size
        own = np.where(self.split, 0, row_workloads(self.mask)) * heads
        split = column_workloads(self.mask, self.split) * heads
        work = np.bincount(self.rows.owner, weights=own, minlength=self.ranks)
        work += np.bincount(self.columns.owner, weights=split, minlength=self.ranks)
        return np.rint(work).astype(np.int64)


@lru_cache(maxsize=64)
def plan(mask: BlockMask, queries: Sharding, keys: Sharding) -> Plan:
    """The plan for a mask and the shardings of its queries and keys.

    Example:
        >>> from sparseflash import patterns as P
        >>> mask = P.local(100).compile(4096)
        >>> sharding = Sharding.of(mask, ranks=4)
        >>> plan(mask, sharding, sharding).columns.traffic.tolist()  # a block of 128 tokens from each neighbour
        [[0, 128, 0, 0], [128, 0, 128, 0], [0, 128, 0, 128], [0, 0, 128, 0]]
    """
    (bq, bk), ranks = mask.block, queries.ranks
    row_owner, col_owner = queries.block_owner(bq), keys.block_owner(bk)
    split = split_rows(mask, ranks)
    own_rows = np.arange(ranks)[:, None] == row_owner
    required = required_key_blocks(mask, row_owner, col_owner, split, ranks)
    columns = Blocks(mask.shape[1], bk, col_owner, frozen(required))
    dense = ranks > 1 and bool(columns.traffic.sum() >= DENSE * (ranks - 1) * mask.shape[1])
    if dense:
        columns = Blocks(mask.shape[1], bk, col_owner, frozen(np.ones_like(required)))
    rows = Blocks(mask.shape[0], bq, row_owner, frozen(own_rows | split))
    return Plan(mask, queries, keys, frozen(split), rows, columns, dense)


@dataclass(frozen=True)
class LocalLayout:
    """Which blocks are in one rank's own tensors, and where.

    - packed: side by side. Attention by tables alone needs no more, and this takes the least memory.
    - aligned: as far apart as in the whole sequence, the first one at the start. The distances between queries and keys
      are those of the whole sequence, which ALiBi needs.
    - global: at their positions in the whole sequence. Dropout's bits depend on the indices of query and key.

    The last two leave gaps. No table lists the gaps and no kernel reads them, but they take memory.
    """

    blocks: Ints  # indices of the blocks in the whole sequence, ascending
    local: Ints  # their indices in this rank's tensors, ascending
    size: int  # tokens per block
    length: int  # L, gaps included

    @classmethod
    def of(cls, side: Blocks, rank: int, layout: Layout) -> LocalLayout:
        blocks = np.flatnonzero(side.wanted[rank])
        first = {"packed": 0, "aligned": int(blocks[0]), "global": 0}[layout]
        local = np.arange(blocks.size) if layout == "packed" else blocks - first
        length = int(local[-1]) * side.size + int(side.tokens[blocks[-1]])  # only the last block may be ragged
        return cls(blocks, local, side.size, length)

    @property
    def local_blocks(self) -> int:
        """Number of blocks in this rank's tensors, gaps included."""
        return int(self.local[-1]) + 1

    @property
    def shift(self) -> int:
        """Global minus local position of the first block, in tokens."""
        return int(self.blocks[0] - self.local[0]) * self.size

    def to_local(self, column: Ints) -> Ints:
        """Local block indices where runs of wanted blocks begin or end, from those in the whole mask."""
        at: Ints = np.searchsorted(self.blocks, column)
        return at if self.local_blocks == self.blocks.size else column - self.shift // self.size


def local_mask(plan: Plan, rank: int, rows: LocalLayout, columns: LocalLayout) -> BlockMask:
    """The part of the mask that one rank computes, over its own tensors.

    It is a rectangular mask like any other, with the codes and tiles of the whole mask.
    """
    mask, (nq, nk) = plan.mask, plan.mask.grid_shape
    patterns = np.arange(mask.patterns)[:, None]
    runs = mask.runs.select_rows((patterns * nq + rows.blocks).ravel())
    if plan.split.any():
        runs = _within_held_columns(runs, np.tile(plan.split[rows.blocks], mask.patterns), plan.columns.owner == rank)
    pattern, row = runs.row // rows.blocks.size, runs.row % rows.blocks.size
    line = (pattern * rows.local_blocks + rows.local[row]) * columns.local_blocks
    begin = runs.start - runs.row * nk
    local_runs = Runs(
        (mask.patterns * rows.local_blocks, columns.local_blocks),
        line + columns.to_local(begin),
        line + columns.to_local(begin + runs.length),
        runs.code,
    )
    offset = mask.q_offset + rows.shift - columns.shift
    grid = Grid(rows.length, columns.length, rows.size, columns.size, offset)
    return BlockMask.canonical(grid, local_runs, mask.tiles, mask.pattern_of)


def send_recv_lists(side: Blocks, layout: LocalLayout, rank: int, shard: int, dense: bool = False) -> SendRecv:
    """Which tokens a rank sends to which rank, and where it puts those that it receives.

    Args:
        side: the block rows or the block columns.
        layout: of the rank's own tensors.
        rank: this rank.
        shard: S.
        dense: every rank receives every block, from one all-gather of all shards.
    """
    ranks, owner, wanted = len(side.wanted), side.owner, side.wanted
    mine = owner == rank
    in_shard = np.cumsum(mine) - 1  # index of a block within its owner's shard: only the last block of all is ragged
    in_local = np.full(owner.size, -1, np.int64)
    in_local[layout.blocks] = layout.local
    none = np.empty(0, np.int64)
    keep = np.flatnonzero(mine & wanted[rank])
    sent = [np.flatnonzero(mine & wanted[r]) if r != rank else none for r in range(ranks)]
    received = [np.flatnonzero((owner == r) & wanted[rank]) if r != rank else none for r in range(ranks)]
    traffic = side.traffic
    padded = int(max(np.bincount(owner, weights=side.tokens, minlength=ranks))) if dense else 0
    filled = side.tokens[layout.blocks].sum()
    assert shard == side.tokens[mine].sum()
    return SendRecv(
        ranks=ranks,
        length=layout.length,
        keep=_token_indices(side, in_shard, keep),
        keep_at=_token_indices(side, in_local, keep),
        send=_token_indices(side, in_shard, np.concatenate(sent)),
        recv_at=_token_indices(side, in_local, np.concatenate(received)),
        send_counts=tuple(traffic[rank].tolist()),
        recv_counts=tuple(traffic[:, rank].tolist()),
        nothing_moves=not traffic.any(),
        has_gaps=bool(filled < layout.length),
        padded=padded,
    )


def _within_held_columns(runs: Runs, split: Bools, held: Bools) -> Runs:
    """The runs, but those of split rows only in the columns that a rank holds."""
    is_split = split[runs.row]
    whole = Runs(runs.shape, runs.start[~is_split], runs.stop[~is_split], runs.code[~is_split])
    rows, cols, codes = Runs(runs.shape, runs.start[is_split], runs.stop[is_split], runs.code[is_split]).blocks()
    kept = held[cols]
    parts = Runs.from_blocks(runs.shape, rows[kept], cols[kept], codes[kept])
    together = whole.beside(parts)
    assert together is not None, "a row is split or whole"
    return together


def _token_indices(side: Blocks, index: Ints, blocks: Ints) -> torch.Tensor:
    """Indices of the tokens of some blocks, int64, in a tensor that holds each block at `index[block]`."""
    start = index[blocks] * side.size
    return torch.from_numpy(positions(start, start + side.tokens[blocks]))
