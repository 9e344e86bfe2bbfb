"""Attention over sequences that several ranks share: on torch.distributed, DeviceMesh and torchrun, nothing else."""

from sparseflash.distributed.context import context_parallel_attention, summed
from sparseflash.distributed.plan import Plan, plan
from sparseflash.distributed.sharding import Sharding

__all__ = ["Plan", "Sharding", "context_parallel_attention", "plan", "summed"]
