"""Who computes what, and who needs which blocks of whom: read from the mask, the same on every rank.

Legend: R ranks, nQ / nK block rows / columns of the whole mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b

import numpy as np

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
from sparseflash.patterns.intervals import Ints
from sparseflash.patterns.runs import frozen

# From this share of all foreign tokens on, everything is exchanged: an all-gather sends one copy of a shard, where
# blocks packed for each rank would be copied once for each.
DENSE = 0.9


@dataclass(frozen=True)
class Blocks:
    """The blocks of one side of a mask: who holds them, and which ranks compute with them."""

    length: int  # tokens
    size: int  # tokens a block
    owner: Owners  # int32 [n]
    wanted: Bools  # [R, n]

    @property
    def tokens(self) -> Ints:
        """Tokens of each block, [n]."""
        return np.minimum(self.size, self.length - np.arange(self.owner.size) * self.size)

    @property
    def traffic(self) -> Ints:
        """Tokens that go from each rank (first) to each other (second), int64 [R, R]."""
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
    split: Bools  # [nQ], rows whose queries travel
    rows: Blocks  # `wanted`: the block rows that each rank works on, its own and the split ones
    columns: Blocks  # `wanted`: the key blocks that each rank works with
    dense: bool  # nearly every rank needs nearly every key: all are exchanged

    @property
    def ranks(self) -> int:
        return self.queries.ranks

    @cached_property
    def description(self) -> str:
        """Text that tells plans apart."""
        owners = blake2b(self.queries.owner.tobytes() + self.keys.owner.tobytes(), digest_size=4).hexdigest()
        return f"mask {self.mask.digest.hex()}, {self.queries!r}, keys {self.keys!r}, dealt as {owners}"

    @property
    def work(self) -> Ints:
        """Stored blocks that each rank walks, summed over heads and samples, int64 [R]."""
        heads = self.mask.pattern_of.size
        own = np.where(self.split, 0, row_workloads(self.mask)) * heads
        work = np.bincount(self.rows.owner, weights=own, minlength=self.ranks)
        work += np.bincount(
            self.columns.owner, weights=column_workloads(self.mask, self.split) * heads, minlength=self.ranks
        )
        return np.rint(work).astype(np.int64)


@lru_cache(maxsize=64)
def plan(mask: BlockMask, queries: Sharding, keys: Sharding) -> Plan:
    """The plan for a mask whose queries and keys are sharded so.

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
    wanted = np.arange(ranks)[:, None] == row_owner
    needed = required_key_blocks(mask, row_owner, col_owner, split, ranks)
    columns = Blocks(mask.shape[1], bk, col_owner, frozen(needed))
    dense = ranks > 1 and bool(columns.traffic.sum() >= DENSE * (ranks - 1) * mask.shape[1])
    if dense:
        columns = Blocks(mask.shape[1], bk, col_owner, frozen(np.ones_like(needed)))
    rows = Blocks(mask.shape[0], bq, row_owner, frozen(wanted | split))
    return Plan(mask, queries, keys, frozen(split), rows, columns, dense)
