"""Exchanges of tokens between ranks that carry gradients back to their owners.

Blocks go in one all-to-all, or in one all-gather where everybody needs nearly everything. The backward pass is the
transposed exchange: each owner gets one gradient from each rank that computed with its tokens, and adds them up in the
order of ranks, in fp32 or wider. So gradients are equal bit for bit in every run, whatever the network does, which a
reduce-scatter would not promise.

Shape legend: S tokens of a shard, L tokens of a rank's own tensors, H heads, D head dim; on the wire [tokens, B, H, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from sparseflash.distributed.collectives import all_gather, all_to_all
from sparseflash.distributed.routes import Route


def fetch(route: Route, group: dist.ProcessGroup, *shards: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What this rank computes with: its own tokens and those of others, [B, H, L, D] each, of shards [B, H, S, D].

    Tensors go together: they have one dtype and equal B, H and S. Gaps of the layout are 0.
    """
    if route.idle and route.length == len(route.stay) and shards[0].shape[2] == route.length:
        return shards  # nothing moves: stay and stay_place are the identity
    joined = shards[0] if len(shards) == 1 else torch.cat(shards, -1)
    local: torch.Tensor = _Fetch.apply(route, group, joined)  # type: ignore[no-untyped-call]
    return tuple(local.split([x.shape[-1] for x in shards], -1))


def return_partials(route: Route, group: dist.ProcessGroup, local: torch.Tensor) -> torch.Tensor:
    """What other ranks computed for tokens of this one, from what all computed for foreign tokens.

    Args:
        route: on which the tokens came.
        group: the ranks.
        local: results [B, H, L, D] of this rank.

    Returns:
        [T, B, H, D], grouped by rank, in the order of `route.send`.
    """
    away = local.index_select(2, route.arrive_place).permute(2, 0, 1, 3)
    home: torch.Tensor = _AllToAll.apply(group, away, route.received, route.sent)  # type: ignore[no-untyped-call]
    return home


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, route: Route, group: dist.ProcessGroup, shard: torch.Tensor) -> torch.Tensor:
        ctx.route, ctx.group, ctx.tokens = route, group, shard.shape[2]
        B, H, _, D = shard.shape
        local = (shard.new_zeros if route.gaps else shard.new_empty)(B, H, route.length, D)
        local[:, :, route.stay_place] = shard[:, :, route.stay]
        if route.gathered:
            local[:, :, route.arrive_place] = _gathered(route, group, shard)
        elif not route.idle:
            arrived = all_to_all(group, shard.permute(2, 0, 1, 3)[route.send], route.sent, route.received)
            local[:, :, route.arrive_place] = arrived.permute(1, 2, 0, 3)
        return local

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        route = ctx.route
        by_token = grad.permute(2, 0, 1, 3)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.tokens, *by_token.shape[1:], dtype=wide, device=grad.device)
        total[route.stay] = by_token[route.stay_place].to(wide)
        if not route.idle:
            parts = all_to_all(ctx.group, by_token[route.arrive_place], route.received, route.sent)
            # No token is met twice within one rank's part: the order of ranks is the order of additions.
            for part, where in zip(parts.split(route.sent), route.send.split(route.sent), strict=True):
                total.index_add_(0, where, part.to(wide))
        return None, None, total.to(grad.dtype).permute(1, 2, 0, 3)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: dist.ProcessGroup, x: torch.Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> torch.Tensor:
        ctx.group, ctx.splits = group, (received, sent)
        # Activation checkpointing recomputes up to the last tensor that was saved, when the first one is asked for.
        # Ranks save different ones after this; with one here, they agree on which exchanges come before which.
        ctx.save_for_backward(x.new_empty(0))
        return all_to_all(group, x, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        _ = ctx.saved_tensors
        return None, all_to_all(ctx.group, grad, *ctx.splits), None, None


def _gathered(route: Route, group: dist.ProcessGroup, shard: torch.Tensor) -> torch.Tensor:
    """The tokens of all other ranks, [B, H, T, D], grouped by rank."""
    by_token = shard.permute(2, 0, 1, 3)
    mine = by_token.new_zeros(route.gathered, *by_token.shape[1:])
    mine[: len(by_token)] = by_token
    parts = zip(all_gather(group, mine).split(route.gathered), route.received, strict=True)
    return torch.cat([part[:tokens] for part, tokens in parts]).permute(1, 2, 0, 3)
