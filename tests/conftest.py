"""Hypothesis profiles: examples are derandomised so that a run can be repeated; deadlines are off, machines differ.

Triton's interpreter gets fewer of them: it runs a few thousand scores a second.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

EXAMPLES = 4 if os.environ.get("TRITON_INTERPRET") == "1" else 60

settings.register_profile(
    "suite",
    max_examples=int(os.environ.get("SPARSEFLASH_EXAMPLES", EXAMPLES)),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("suite")

# The operands are small and the suite runs several processes: threads would only wait for each other.
torch.set_num_threads(1)
