"""Kernels that no GPU has run yet, and the two places where they register themselves.

- `gluon_forward`: the forward pass for sm_90 with a schedule written by hand.
- `one_pass`: dK, dV and dQ in one kernel, five products instead of seven.

Both are held by the laws (in the interpreter, or with stand-ins for the hardware) and compile without spills that
matter; docs/kernels.md shows what their machine code does. No call takes them. The tuner times them beside what is
committed: `python -m benchmarks.tune measure --kernel gluon one_pass`, on a GPU. The faster one then replaces what is
committed, and the other is deleted.

Attributes:
    forward: called by `triton.forward.forward` with its arguments; returns what it would, or None where the candidate
        does not suit the call. None: no candidate.
    backward: the same for `triton.backward.backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

forward: Callable[..., tuple[torch.Tensor, torch.Tensor] | None] | None = None
backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None] | None = None


class GluonLaunch(NamedTuple):
    """How `gluon_forward` is launched: steps that divide the block, with 16 queries a warp."""

    BM: int  # queries a step
    BN: int  # keys a step
    warps: int
    stages: int
    persistent: int = 0  # this many programs a multiprocessor take all lines in turn; 0: one program a line
