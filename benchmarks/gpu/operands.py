"""The operands of the measurements."""

from __future__ import annotations

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.settings import Setting

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v and dout


def operands(setting: Setting, machine: Machine) -> list[Operands]:
    """Sets of q, k, v and dout, normally distributed."""
    batch, heads, kv_heads = setting.shape
    dtype = getattr(torch, setting.dtype)
    generator = torch.Generator(machine.device).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = batch, heads, setting.seq_len, setting.head_dim
        return torch.randn(shape, generator=generator, device=machine.device, dtype=dtype)

    def one() -> Operands:
        q, k, v = (draw(h).requires_grad_() for h in (heads, kv_heads, kv_heads))
        return q, k, v, draw(heads)

    drawn = [one()]
    nbytes = sum(x.nbytes for x in drawn[0][:3])
    return drawn + [one() for _ in range(machine.sets(nbytes) - 1)]
