"""The two collectives that everything here is made of, under the names that each version of torch has for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

# torch 2.13 renamed it and warns of the old name; 2.11 knows no other.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """Tensors [n, ...] of equal shapes from all ranks, one after another: [ranks * n, ...]."""
    every = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _gather(every, x.contiguous(), group=group)
    return every


def all_to_all(group: dist.ProcessGroup, x: torch.Tensor, sent: Sequence[int], received: Sequence[int]) -> torch.Tensor:
    """Rows of x [sum(sent), ...] go to the ranks, so many to each; what they sent to this one, [sum(received), ...]."""
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=group)
    return out
