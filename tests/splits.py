"""Lookup tables whose heavy lines are split at sizes that a test can afford."""

from __future__ import annotations

from unittest import mock

import torch

from sparseflash.patterns import BlockMask
from sparseflash.tables import lookup, splitting
from sparseflash.tables.table import LookupTable


def lookup_with_splits(mask: BlockMask, device: torch.device | str = "cpu") -> LookupTable:
    """The lookup table of a mask with every line above the mean split, down to single blocks. Never the cached one."""
    with mock.patch.multiple(splitting, HEAVY=1, SHORTEST_SPLIT=1):
        return lookup.cached_lookup.__wrapped__(mask, torch.device(device))
