"""An additive bias inside kernels. Its two forms are described in `sparseflash.kernels.bias`.

A bias shared by all queries is read as a row, one shared by all keys as a column, a relative one by the difference of
positions. Fields that a form lacks are None and compile to nothing.
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sparseflash.kernels import bias as biases


@triton.jit
def bias_of(bias_ptr, batch, head, bias_b, bias_h):
    """Where a head's bias starts."""
    return bias_ptr + batch.to(tl.int64) * bias_b + head.to(tl.int64) * bias_h


@triton.jit
def bias_at(bias, query, key, CHECKED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """The bias of a step's pairs, fp32: [BM, BN], or [1, BN] or [BM, 1] where all queries or keys share it.

    `query` and `key` are the indices of the step's first ones. CHECKED: some may be past the end; they get any bias.
    """
    queries = tl.arange(0, BM)[:, None]
    keys = tl.arange(0, BN)[None, :]
    if bias.reach is not None:
        apart = (key - (query + bias.offset)) + (keys - queries)
        more = tl.load(bias.ptr + (bias.reach + tl.minimum(tl.maximum(apart, -bias.reach), bias.reach)))
    else:
        # Keys within a step are near each other (see `bias_arguments`), rows need not be.
        if bias.row is None:
            there = key + keys < bias.keys
            at = bias.ptr + key.to(tl.int64) * bias.column + keys * bias.column
        else:
            there = query + queries < bias.queries
            at = bias.ptr + (query + queries).to(tl.int64) * bias.row
            if bias.column is not None:
                there = there & (key + keys < bias.keys)
                at = at + key.to(tl.int64) * bias.column + keys * bias.column
        more = tl.load(at, mask=there, other=0.0) if CHECKED else tl.load(at)
    return more.to(tl.float32)


@triton.jit
def biased(s, more, bias):
    """Scores plus the bias of `bias_at`, or its transpose; -inf hides a pair, whatever its score."""
    return tl.where(more == float("-inf"), more, s + more * bias.unit)


def bias_arguments(bias: torch.Tensor | None) -> dict[str, Any]:
    """The kernels' arguments for a bias; None for what it has not."""
    arguments: dict[str, Any] = dict.fromkeys(("bias_ptr", "bias_b", "bias_h", "bias_n", "bias_m", "reach"))
    if bias is None:
        return arguments
    if biases.is_relative(bias):
        bias = bias if bias.stride(1) == 1 else bias.contiguous()
        step = bias.stride(0) if bias.shape[0] > 1 else 0
        return arguments | {"bias_ptr": bias, "bias_b": 0, "bias_h": step, "reach": biases.reach(bias)}
    bias = bias if bias.stride(3) < 1 << 22 else bias.contiguous()  # offsets within a step are in 32 bits
    b, h, n, m = (stride if size > 1 else 0 for stride, size in zip(bias.stride(), bias.shape, strict=True))
    arguments |= {"bias_ptr": bias, "bias_b": b, "bias_h": h}
    by_query, by_key = bias.shape[2] > 1, bias.shape[3] > 1 or bias.shape[2] == 1
    return arguments | {"bias_n": n if by_query else None, "bias_m": m if by_key else None}
