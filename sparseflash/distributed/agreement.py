"""Errors that every rank raises, instead of one rank raising and the others waiting for it.

Before the first exchange the ranks tell each other, in one small all-gather, what they are about to do or why they
cannot. On GPUs that makes the host wait, so there it is done once for each group and plan; on CPUs, and with
SPARSEFLASH_DEBUG=1, at every call.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable

import torch
import torch.distributed as dist

from sparseflash.distributed.collectives import all_gather

ROOM = 1024  # bytes a rank's message may take
REFUSED, PLANNED = "!", "="
REMEMBERED = 1024

_agreed: OrderedDict[Hashable, None] = OrderedDict()


def agree(group: dist.ProcessGroup, device: torch.device, about: Hashable, intent: str | Exception) -> None:
    """Go on only if every rank of the group does, with the same intent.

    Args:
        group: the ranks.
        device: where the operands lie.
        about: what needs to be agreed on once; equal on all ranks.
        intent: what this rank is about to do, as text; or the error that keeps it from it.

    Raises:
        Exception: the error itself, on the rank that has one.
        ValueError: another rank has an error, or another intent than this one.
    """
    key = (group.group_name, about)
    if device.type == "cpu" or os.environ.get("SPARSEFLASH_DEBUG") == "1" or key not in _agreed:
        _ask(group, device, intent)
        _agreed[key] = None
        if len(_agreed) > REMEMBERED:
            _agreed.popitem(last=False)
    elif isinstance(intent, Exception):
        raise intent  # the others are past asking: they notice when this process ends


def _ask(group: dist.ProcessGroup, device: torch.device, intent: str | Exception) -> None:
    mine = f"{REFUSED}{intent}" if isinstance(intent, Exception) else f"{PLANNED}{intent}"
    message = torch.frombuffer(bytearray(mine.encode()[:ROOM].ljust(ROOM, b"\0")), dtype=torch.uint8).to(device)
    every = all_gather(group, message).view(-1, ROOM)
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
