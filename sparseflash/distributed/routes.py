"""One rank's view of an exchange: which of its tokens go where, and where those that arrive are put.

Legend: R ranks, S tokens of this rank's shard, L tokens of its own tensors (`Places.length`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from sparseflash.distributed.local_mask import Places
from sparseflash.distributed.plan import Blocks
from sparseflash.patterns.intervals import Ints, positions


@dataclass(frozen=True, eq=False)
class Route:
    """Index lists of an exchange, int64 tensors on one device, and how many tokens go to and come from each rank."""

    ranks: int
    length: int  # L
    stay: torch.Tensor  # in the shard: what this rank computes with itself
    stay_place: torch.Tensor  # and where it stands in [L]
    send: torch.Tensor  # in the shard, grouped by receiver
    arrive_place: torch.Tensor  # in [L], grouped by sender
    sent: tuple[int, ...]  # [R]
    received: tuple[int, ...]  # [R]
    idle: bool  # nobody sends anything
    gaps: bool  # some of [L] is filled by nobody
    gathered: int = 0  # tokens to which every shard is padded for an all-gather; 0: blocks go one by one

    def to(self, device: torch.device) -> Route:
        names = ("stay", "stay_place", "send", "arrive_place")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def route(side: Blocks, places: Places, rank: int, shard: int, dense: bool = False) -> Route:
    """The route of a rank that holds `shard` tokens.

    `dense`: every rank gets every block, all shards in one all-gather.
    """
    ranks, owner, wanted = len(side.wanted), side.owner, side.wanted
    mine = owner == rank
    slot = np.cumsum(mine) - 1  # of a block in its owner's shard: only the last block of all is ragged
    place = np.full(owner.size, -1, np.int64)
    place[places.blocks] = places.place
    out = [np.flatnonzero(mine & wanted[r]) if r != rank else _NONE for r in range(ranks)]
    into = [np.flatnonzero((owner == r) & wanted[rank]) if r != rank else _NONE for r in range(ranks)]
    stay = np.flatnonzero(mine & wanted[rank])
    traffic = side.traffic
    gathered = 0
    if dense:
        gathered = int(max(np.bincount(owner, weights=side.tokens, minlength=ranks)))
    filled = side.tokens[places.blocks].sum()
    assert shard == side.tokens[mine].sum()
    return Route(
        ranks=ranks,
        length=places.length,
        stay=_tokens(side, slot, stay),
        stay_place=_tokens(side, place, stay),
        send=_tokens(side, slot, np.concatenate(out)),
        arrive_place=_tokens(side, place, np.concatenate(into)),
        sent=tuple(traffic[rank].tolist()),
        received=tuple(traffic[:, rank].tolist()),
        idle=not traffic.any(),
        gaps=bool(filled < places.length),
        gathered=gathered,
    )


_NONE = np.empty(0, np.int64)


def _tokens(side: Blocks, place: Ints, blocks: Ints) -> torch.Tensor:
    """Token indices of blocks that stand at these places."""
    start = place[blocks] * side.size
    return torch.from_numpy(positions(start, start + side.tokens[blocks]))
