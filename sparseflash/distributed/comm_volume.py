"""Communication volume: the bytes that a plan moves, counted without processes, and those of ring attention.

The functions count what each rank receives from others in one call of attention. All ranks together send as much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.distributed.plan import Plan
from sparseflash.patterns.intervals import Ints


@dataclass(frozen=True)
class Operands:
    """Heads, widths and element size of the operands: they decide how many bytes a token has."""

    q_heads: int = 1
    kv_heads: int = 1
    dim: int = 128  # of q and k
    v_dim: int = 128
    itemsize: int = 2  # bytes per element: 2 in half precision
    batch: int = 1

    @property
    def keys(self) -> int:
        """Bytes of a token's key and value in all heads and samples; their gradients take as many."""
        return self.batch * self.kv_heads * (self.dim + self.v_dim) * self.itemsize

    @property
    def queries(self) -> int:
        """Bytes of a token's query; its gradient takes as many."""
        return self.batch * self.q_heads * self.dim * self.itemsize

    @property
    def partials(self) -> int:
        """Bytes of a token's partial output and lse (fp32 or fp64); their gradients take as many."""
        return self.batch * self.q_heads * (self.v_dim * self.itemsize + max(self.itemsize, 4))


def received(plan: Plan, operands: Operands) -> tuple[Ints, Ints]:
    """Bytes that each rank receives in the forward pass and in the backward pass, int64 [R] each.

    Example:
        >>> from sparseflash import patterns as P
        >>> from sparseflash.distributed import Sharding, plan
        >>> mask = P.local(1024).compile(65536)
        >>> sharding = Sharding.of(mask, ranks=4)
        >>> forward, backward = received(plan(mask, sharding, sharding), Operands())
        >>> forward.tolist()  # 1,024 tokens from one or two neighbours; in a ring each rank receives 49,152
        [524288, 1048576, 1048576, 524288]
        >>> ring_forward(65536, 4, Operands())
        25165824
    """
    keys, queries = plan.columns.traffic, plan.rows.traffic
    keys_in, keys_out = keys.sum(0), keys.sum(1)
    if plan.dense:
        keys_in = np.full(plan.ranks, (plan.ranks - 1) * max(plan.keys.lengths))
    forward = keys_in * operands.keys + queries.sum(0) * operands.queries + queries.sum(1) * operands.partials
    backward = keys_out * operands.keys + queries.sum(1) * operands.queries + queries.sum(0) * operands.partials
    return forward, backward


def ring_forward(kv_len: int, ranks: int, operands: Operands) -> int:
    """Bytes that each rank receives in the forward pass of ring attention. An all-gather moves as many.

    Every rank receives every key and value of the others once (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
    """
    return (ranks - 1) * -(-kv_len // ranks) * operands.keys
