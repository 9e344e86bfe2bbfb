"""The micro-kernel behind the rate of exponentials."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 2048  # elements a program: 16 a thread, which are independent of each other


@triton.jit
def exp2_kernel(x_ptr, y_ptr, rounds, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    for _ in range(rounds):
        x = tl.exp2(-x)
    tl.store(y_ptr + at, x)
