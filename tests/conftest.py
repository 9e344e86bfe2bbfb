"""Hypothesis profiles: examples are derandomised so that a run can be repeated; deadlines are off, machines differ."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "suite",
    max_examples=int(os.environ.get("SPARSEFLASH_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

# The operands are small and the suite runs several processes: threads would only wait for each other.
torch.set_num_threads(1)
