"""A card's own rates, each from a small program: matrix products, exponentials, a copy."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.gpu.machine import Machine
from benchmarks.gpu.work import Rates
from sparseflash.tools.timing import Call, time_interleaved

ROUNDS = 256  # exponentials of each element, one after the other
RUNS = 20


def measure(machine: Machine, side: int = 8192, elements: int = 1 << 24, copied: int = 1 << 32) -> dict[str, Any]:
    """Operations, exponentials and bytes a second: best of the runs, since a floor is what nothing gets below.

    Args:
        machine: measured on.
        side: of the square matrices.
        elements: that are put through 256 exponentials each.
        copied: bytes that are read, and as many written.
    """
    device = machine.device
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=half)
    x = torch.rand(elements, device=device)
    read = torch.randn(copied // 4, device=device)
    written = torch.empty_like(read)
    amounts = {"matrix": 2 * side**3, "exponentials": elements * ROUNDS, "bytes": 2 * read.nbytes}
    calls: dict[str, Call] = {
        "matrix": lambda: a @ b,
        "exponentials": lambda: exponentials(x),
        "bytes": lambda: written.copy_(read),
    }
    times = time_interleaved(calls, RUNS, machine.clock).times
    found: dict[str, Any] = {name: amount / min(times[name]) for name, amount in amounts.items()}
    found |= {f"{name}_median": amount / statistics.median(times[name]) for name, amount in amounts.items()}
    return found


def rates(row: dict[str, Any]) -> Rates:
    """The rates that a row holds."""
    return Rates(row["matrix"], row["exponentials"], row["bytes"])


def exponentials(x: torch.Tensor) -> torch.Tensor:
    """Replace x by 2^-x, 256 times over, which tends to 0.64: neither overflows nor is known beforehand."""
    if x.device.type != "cuda":
        y = x.clone()
        for _ in range(ROUNDS):
            torch.exp2(y.neg_(), out=y)
        return y
    from benchmarks.gpu.exp2_kernel import BLOCK, exp2_kernel

    y = torch.empty_like(x)
    exp2_kernel[(x.numel() // BLOCK,)](x, y, ROUNDS, BLOCK=BLOCK, num_warps=4)
    return y
