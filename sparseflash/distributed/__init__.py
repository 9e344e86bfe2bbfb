"""Attention over sequences that are sharded over ranks. Needs torch.distributed, DeviceMesh and torchrun only."""

from sparseflash.distributed.context import context_parallel_attention, summed
from sparseflash.distributed.plan import Plan, plan
from sparseflash.distributed.sharding import Sharding

__all__ = ["Plan", "Sharding", "context_parallel_attention", "plan", "summed"]
