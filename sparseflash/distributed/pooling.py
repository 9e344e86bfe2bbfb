"""Sums over a sequence that ranks share, for a readout of all tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.distributed.exchange import mesh_group
from sparseflash.transforms import refuse_all


def summed(x: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum over the ranks of a mesh, on each of them; a collective, its gradient too. Differentiable.

    What comes after, a head and a loss, every rank computes for itself, with the same result. The gradient adds up what
    all ranks ask for, so averaging weights' gradients over all ranks, as DDP and FSDP2 do, gives those of the loss.

    Args:
        x: this rank's part, of one shape on all ranks: of its tokens' features, say, the sum.
        mesh: a DeviceMesh of one dim.

    Returns:
        The sum, in the shape of x.

    Raises:
        TypeError: mesh is no DeviceMesh.
        ValueError: a mesh with several dims.
        NotImplementedError: a transform of torch.func, or a forward-mode derivative.
    """
    refuse_all("summed", x)
    group, _, ranks = mesh_group(mesh)
    total: torch.Tensor = x if ranks == 1 else _Sum.apply(group, x)  # type: ignore[no-untyped-call]
    return total


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
        ctx.group = group
        return _reduced(group, x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, _reduced(ctx.group, grad)


def _reduced(group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total
