"""How many bytes a plan moves, counted from its tables, beside what ring attention and an all-gather move.

Counted is what each rank receives from others for one call of attention; what all ranks receive, all ranks send.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.distributed.plan import Plan
from sparseflash.patterns.intervals import Ints


@dataclass(frozen=True)
class Operands:
    """What a token weighs."""

    q_heads: int = 1
    kv_heads: int = 1
    dim: int = 128  # of q and k
    v_dim: int = 128
    itemsize: int = 2  # bytes an element: 2 in half precision
    batch: int = 1

    @property
    def keys(self) -> int:
        """Bytes of a token's key and value in all heads and samples, and of their gradients."""
        return self.batch * self.kv_heads * (self.dim + self.v_dim) * self.itemsize

    @property
    def queries(self) -> int:
        """Bytes of a token's query, and of its gradient."""
        return self.batch * self.q_heads * self.dim * self.itemsize

    @property
    def partials(self) -> int:
        """Bytes of a token's output and lse over some of its keys, and of their gradients; lse is fp32 or fp64."""
        return self.batch * self.q_heads * (self.v_dim * self.itemsize + max(self.itemsize, 4))


def received(plan: Plan, operands: Operands) -> tuple[Ints, Ints]:
    """Bytes that each rank receives in the forward and in the backward pass, int64 [R] each.

    Example:
        >>> from sparseflash import patterns as P
        >>> from sparseflash.distributed import Sharding, plan
        >>> mask = P.local(1024).compile(65536)
        >>> sharding = Sharding.of(mask, ranks=4)
        >>> forward, backward = received(plan(mask, sharding, sharding), Operands())
        >>> forward.tolist()  # 1,024 tokens from one neighbour or two, where a ring brings each rank 49,152
        [524288, 1048576, 1048576, 524288]
        >>> ring_forward(65536, 4, Operands())
        25165824
    """
    keys, queries = plan.columns.traffic, plan.rows.traffic
    into, out = keys.sum(0), keys.sum(1)
    if plan.dense:
        into = np.full(plan.ranks, (plan.ranks - 1) * max(plan.keys.lengths))
    forward = into * operands.keys + queries.sum(0) * operands.queries + queries.sum(1) * operands.partials
    backward = out * operands.keys + queries.sum(1) * operands.queries + queries.sum(0) * operands.partials
    return forward, backward


def ring_forward(kv_len: int, ranks: int, operands: Operands) -> int:
    """Bytes that each rank receives in the forward pass of ring attention, and as many of an all-gather.

    Every rank sees every key and value once (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
    """
    return (ranks - 1) * -(-kv_len // ranks) * operands.keys
