"""Lookup tables whose lines come in pieces at sizes that a test can afford."""

from __future__ import annotations

from unittest import mock

import torch

from sparseflash import schedule, tables
from sparseflash.patterns import BlockMask


def lookup_in_pieces(mask: BlockMask, device: torch.device | str = "cpu") -> tables.LookupTable:
    """The lookup table of a mask with every line above the mean cut, down to single blocks. Never the cached one."""
    with mock.patch.multiple(schedule, HEAVY=1, SHORTEST_PIECE=1):
        return tables._lookup.__wrapped__(mask, torch.device(device))
