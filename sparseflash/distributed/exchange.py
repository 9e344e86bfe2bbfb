"""Collectives between the ranks of a mesh: the exchange of tokens, whose gradients return to the ranks that hold them.

Tokens move in one all-to-all, or in one all-gather if every rank needs nearly everything. The backward pass is the
transposed exchange: each rank receives one gradient from every rank that computed with its tokens, and sums them in the
order of ranks, in fp32 or wider. Gradients are therefore equal bit for bit in every run, whatever the network does. A
reduce-scatter would not guarantee that.

Shape legend: R ranks, S tokens of a shard, L tokens of a rank's own tensors, T tokens that move, B, H heads, D head
dim; during an exchange tensors are [tokens, B, H, D].
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

MESSAGE_BYTES = 1024  # of each rank, in the comparison before the first exchange
REFUSED, PLANNED = "!", "="
REMEMBERED = 1024  # comparisons that are not repeated

_agreed: OrderedDict[Hashable, None] = OrderedDict()

# torch 2.13 renamed this function and warns of the old name; 2.11 has only the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, eq=False)
class SendRecv:
    """Send and receive lists of one rank: int64 index tensors on one device, and the tokens to and from each rank."""

    ranks: int  # R
    length: int  # L
    keep: torch.Tensor  # indices in [S] of the tokens that this rank computes with itself
    keep_at: torch.Tensor  # their indices in [L]
    send: torch.Tensor  # indices in [S], grouped by receiver
    recv_at: torch.Tensor  # indices in [L], grouped by sender
    send_counts: tuple[int, ...]  # [R]
    recv_counts: tuple[int, ...]  # [R]
    nothing_moves: bool  # no rank sends anything
    has_gaps: bool  # the layout leaves gaps in [L]
    padded: int = 0  # tokens to which every shard is padded for an all-gather; 0: an all-to-all

    def to(self, device: torch.device) -> SendRecv:
        names = ("keep", "keep_at", "send", "recv_at")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def mesh_group(mesh: DeviceMesh, ranks: int | None = None) -> tuple[dist.ProcessGroup, int, int]:
    """(process group, this process's rank in it, number of ranks) of a mesh with one dim.

    Raises:
        TypeError: not a DeviceMesh.
        ValueError: several dims, another number of ranks than `ranks`, or a mesh without this process.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh (torch.distributed.device_mesh.init_device_mesh), got {mesh!r}")
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        one = f"mesh[{names[-1]!r}]" if names else "a mesh with named dims, indexed by one of them"
        raise ValueError(
            f"the sequence is sharded over one dim, the mesh has {mesh.ndim}"
            f"{' (' + ', '.join(names) + ')' if names else ''}: pass {one}"
        )
    if ranks is not None and mesh.size() != ranks:
        raise ValueError(f"the sharding is for {ranks} ranks, the mesh has {mesh.size()}")
    if mesh.get_coordinate() is None:
        raise ValueError("this process is not part of the mesh")
    return mesh.get_group(), mesh.get_local_rank(), mesh.size()


def all_ranks_agree(group: dist.ProcessGroup, device: torch.device, key: Hashable, intent: str | Exception) -> None:
    """Return if all ranks of the group have the same intent; otherwise raise on every rank, so that none waits.

    Before the first exchange the ranks compare, in one small all-gather, what they are about to do, or why they cannot.
    On GPUs this makes the host wait, so there it happens once per group and key. On CPUs, and with SPARSEFLASH_DEBUG=1,
    it happens at every call.

    Args:
        group: the ranks.
        device: of the operands.
        key: identifies what needs one comparison only; equal on all ranks.
        intent: what this rank is about to do, as text; or the error that prevents it.

    Raises:
        Exception: this rank's own error.
        ValueError: another rank has an error, or another intent than this one.
    """
    key = (group.group_name, key)
    if device.type == "cpu" or os.environ.get("SPARSEFLASH_DEBUG") == "1" or key not in _agreed:
        _compare(group, device, intent)
        _agreed[key] = None
        if len(_agreed) > REMEMBERED:
            _agreed.popitem(last=False)
    elif isinstance(intent, Exception):
        raise intent  # the other ranks no longer compare: they notice when this process ends


def fetch(lists: SendRecv, group: dist.ProcessGroup, *shards: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors that this rank computes with, [B, H, L, D] each, from shards [B, H, S, D]. Differentiable.

    All shards move in one exchange: they have the same dtype, B, H and S. Gaps of the layout are filled with 0.
    """
    if lists.nothing_moves and lists.length == len(lists.keep) and shards[0].shape[2] == lists.length:
        return shards  # keep and keep_at are the identity
    joined = shards[0] if len(shards) == 1 else torch.cat(shards, -1)
    local: torch.Tensor = _Fetch.apply(lists, group, joined)  # type: ignore[no-untyped-call]
    return tuple(local.split([x.shape[-1] for x in shards], -1))


def return_partials(lists: SendRecv, group: dist.ProcessGroup, local: torch.Tensor) -> torch.Tensor:
    """Partial results for this rank's tokens, from the ranks that fetched them. Differentiable.

    Args:
        lists: with which the tokens were fetched.
        group: the ranks.
        local: this rank's results [B, H, L, D]; those of fetched tokens are sent to their owners.

    Returns:
        [T, B, H, D], grouped by rank, in the order of `lists.send`.
    """
    away = local.index_select(2, lists.recv_at).permute(2, 0, 1, 3)
    home: torch.Tensor = _AllToAll.apply(group, away, lists.recv_counts, lists.send_counts)  # type: ignore[no-untyped-call]
    return home


def all_gather(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """Tensors [n, ...] of equal shapes from all ranks, concatenated in their order: [R * n, ...]."""
    every = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    _all_gather(every, x.contiguous(), group=group)
    return every


def all_to_all(
    group: dist.ProcessGroup, x: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]
) -> torch.Tensor:
    """Send the rows of x [sum(send_counts), ...], grouped by receiver; the rows received, [sum(recv_counts), ...]."""
    out = x.new_empty(sum(recv_counts), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), list(recv_counts), list(send_counts), group=group)
    return out


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lists: SendRecv, group: dist.ProcessGroup, shard: torch.Tensor) -> torch.Tensor:
        ctx.lists, ctx.group, ctx.tokens = lists, group, shard.shape[2]
        B, H, _, D = shard.shape
        local = (shard.new_zeros if lists.has_gaps else shard.new_empty)(B, H, lists.length, D)
        local[:, :, lists.keep_at] = shard[:, :, lists.keep]
        if lists.padded:
            local[:, :, lists.recv_at] = _gather_shards(lists, group, shard)
        elif not lists.nothing_moves:
            received = all_to_all(group, shard.permute(2, 0, 1, 3)[lists.send], lists.send_counts, lists.recv_counts)
            local[:, :, lists.recv_at] = received.permute(1, 2, 0, 3)
        return local

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, None, torch.Tensor]:
        lists = ctx.lists
        by_token = grad.permute(2, 0, 1, 3)
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = torch.zeros(ctx.tokens, *by_token.shape[1:], dtype=wide, device=grad.device)
        total[lists.keep] = by_token[lists.keep_at].to(wide)
        if not lists.nothing_moves:
            parts = all_to_all(ctx.group, by_token[lists.recv_at], lists.recv_counts, lists.send_counts)
            # Within one rank's part no token repeats, so the order of ranks is the order of additions.
            split = zip(parts.split(lists.send_counts), lists.send.split(lists.send_counts), strict=True)
            for part, tokens in split:
                total.index_add_(0, tokens, part.to(wide))
        return None, None, total.to(grad.dtype).permute(1, 2, 0, 3)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        group: dist.ProcessGroup,
        x: torch.Tensor,
        send_counts: tuple[int, ...],
        recv_counts: tuple[int, ...],
    ) -> torch.Tensor:
        ctx.group, ctx.transposed = group, (recv_counts, send_counts)
        # Activation checkpointing recomputes up to the last saved tensor, when the first one is needed. After this
        # exchange ranks save different tensors. One saved here makes all ranks run the exchanges in the same order.
        ctx.save_for_backward(x.new_empty(0))
        return all_to_all(group, x, send_counts, recv_counts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
        _ = ctx.saved_tensors
        return None, all_to_all(ctx.group, grad, *ctx.transposed), None, None


def _gather_shards(lists: SendRecv, group: dist.ProcessGroup, shard: torch.Tensor) -> torch.Tensor:
    """The tokens of all other ranks, [B, H, T, D], grouped by rank."""
    by_token = shard.permute(2, 0, 1, 3)
    mine = by_token.new_zeros(lists.padded, *by_token.shape[1:])
    mine[: len(by_token)] = by_token
    parts = zip(all_gather(group, mine).split(lists.padded), lists.recv_counts, strict=True)
    return torch.cat([part[:tokens] for part, tokens in parts]).permute(1, 2, 0, 3)


def _compare(group: dist.ProcessGroup, device: torch.device, intent: str | Exception) -> None:
    mine = f"{REFUSED}{intent}" if isinstance(intent, Exception) else f"{PLANNED}{intent}"
    padded = mine.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
    message = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
    every = all_gather(group, message).view(-1, MESSAGE_BYTES)
    ranks = len(every)
    if isinstance(intent, Exception):
        raise intent
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every.cpu().numpy()]
    for rank, text in enumerate(texts):
        if text.startswith(REFUSED):
            raise ValueError(f"rank {rank} of {ranks} refused: {text[1:]}")
    for rank, text in enumerate(texts):
        if text != texts[0]:
            raise ValueError(
                f"all ranks must make the same call, but rank 0 of {ranks} has {texts[0][1:]}; "
                f"rank {rank} has {text[1:]}"
            )
