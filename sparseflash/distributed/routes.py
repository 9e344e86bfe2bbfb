"""Send and receive lists of one rank: which of its tokens go to which rank, and where received tokens are put."""

from __future__ import annotations

import numpy as np
import torch

from sparseflash.distributed.exchange import SendRecv
from sparseflash.distributed.local_mask import Places
from sparseflash.distributed.plan import Blocks
from sparseflash.patterns.intervals import Ints, positions


def send_recv_lists(side: Blocks, places: Places, rank: int, shard: int, dense: bool = False) -> SendRecv:
    """The send and receive lists of a rank that holds `shard` tokens.

    `dense`: every rank receives every block, from one all-gather of all shards.
    """
    ranks, owner, wanted = len(side.wanted), side.owner, side.wanted
    mine = owner == rank
    in_shard = np.cumsum(mine) - 1  # index of a block within its owner's shard: only the last block of all is ragged
    in_local = np.full(owner.size, -1, np.int64)
    in_local[places.blocks] = places.place
    none = np.empty(0, np.int64)
    keep = np.flatnonzero(mine & wanted[rank])
    sent = [np.flatnonzero(mine & wanted[r]) if r != rank else none for r in range(ranks)]
    received = [np.flatnonzero((owner == r) & wanted[rank]) if r != rank else none for r in range(ranks)]
    traffic = side.traffic
    padded = int(max(np.bincount(owner, weights=side.tokens, minlength=ranks))) if dense else 0
    filled = side.tokens[places.blocks].sum()
    assert shard == side.tokens[mine].sum()
    return SendRecv(
        ranks=ranks,
        length=places.length,
        keep=_token_indices(side, in_shard, keep),
        keep_at=_token_indices(side, in_local, keep),
        send=_token_indices(side, in_shard, np.concatenate(sent)),
        recv_at=_token_indices(side, in_local, np.concatenate(received)),
        send_counts=tuple(traffic[rank].tolist()),
        recv_counts=tuple(traffic[:, rank].tolist()),
        nothing_moves=not traffic.any(),
        has_gaps=bool(filled < places.length),
        padded=padded,
    )


def _token_indices(side: Blocks, index: Ints, blocks: Ints) -> torch.Tensor:
    """Indices of the tokens of some blocks, int64, in a tensor that holds each block at `index[block]`."""
    start = index[blocks] * side.size
    return torch.from_numpy(positions(start, start + side.tokens[blocks]))
