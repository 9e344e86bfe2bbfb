"""Checks of q, k and v. An error says what was expected, what came and what to write instead.

Operands like those of an earlier call are not checked again: the host's part of a call is some tens of microseconds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sparseflash.functional.transforms import PLAIN_TYPES

MOST_TOKENS = (1 << 31) - 1024  # positions and those just past the end are int32 in kernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def under_autocast(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operands cast to the dtype of ``torch.autocast``, as scaled_dot_product_attention does.

    float64 operands stay, and all of them if autocast is off.
    """
    first = operands[0]
    if not isinstance(first, torch.Tensor) or not torch.is_autocast_enabled(first.device.type):
        return operands
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in operands
    )


def _shared_out(function: Any) -> bool:
    """Whether a function is what torch's context_parallel puts in place of scaled_dot_product_attention."""
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.tensor.experimental")


_SDPA = None if _shared_out(F.scaled_dot_product_attention) else F.scaled_dot_product_attention


def check_whole() -> None:
    """Raise inside of torch's ``context_parallel``, where each rank holds a part of the sequence.

    That context replaces ``scaled_dot_product_attention`` only; this library would take the part for the whole.
    """
    if F.scaled_dot_product_attention is not _SDPA and _shared_out(F.scaled_dot_product_attention):
        raise ValueError(
            "inside of torch's context_parallel each rank holds a part of the tokens, and attention would see only "
            "that part: leave that context, shard q, k and v with sparseflash.distributed.Sharding, and call "
            "sparseflash.distributed.context_parallel_attention(q, k, v, mask, mesh)"
        )


# Dtypes, shapes, strides and devices of operands that passed: most calls repeat those of an earlier one.
_passed: set[tuple[Any, ...]] = set()
MOST_PASSED = 4096


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless these are q, k and v of attention."""
    check_whole()
    if torch.compiler.is_compiling() or not (_is_plain(q) and _is_plain(k) and _is_plain(v)):
        _check_operands(q, k, v)
        return
    # Written out, because a loop takes half as long again.
    key = (
        *(q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.device),
        *(v.dtype, v.shape, v.stride(), v.device),
    )
    if key in _passed:
        return
    _check_operands(q, k, v)
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def _is_plain(x: Any) -> bool:
    return type(x) in PLAIN_TYPES and x.layout is torch.strided and not x.is_nested


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    operands = {"q": q, "k": k, "v": v}
    for name, x in operands.items():
        _check_operand(name, x)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    _check_fit(operands)
    for name, x in operands.items():
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"the last dim of {name} must be contiguous, got strides {x.stride()}; call {name}.contiguous()"
            )


def check_queries_and_keys(q: torch.Tensor, k: torch.Tensor) -> None:
    """Raise unless these are q and k of attention, for routers: strides and dtypes are free."""
    operands = {"q": q, "k": k}
    for name, x in operands.items():
        _check_operand(name, x)
    _check_fit(operands)


def _check_operand(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    check_layout(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_fit(operands: dict[str, torch.Tensor]) -> None:
    """Raise unless the devices and shapes of q, k and, if given, v match."""
    q, k, *values = operands.values()
    names = "q, k and v" if values else "q and k"
    if any(x.device != q.device for x in (k, *values)):
        devices = ", ".join(str(x.device) for x in operands.values())
        raise ValueError(f"{names} must lie on one device, got {devices}")
    if any(x.shape[0] != q.shape[0] for x in (k, *values)):
        raise ValueError(f"{names} must have one batch size; got {_shapes(operands)}")
    if any(x.shape[1:3] != k.shape[1:3] for x in values):
        raise ValueError(f"k and v must have equal heads and tokens; got {_shapes(operands)}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head dim; got {_shapes(operands)}")
    if q.shape[2] > MOST_TOKENS or k.shape[2] > MOST_TOKENS:
        raise ValueError(f"sequences have at most {MOST_TOKENS:,} tokens; got {_shapes(operands)}")
    if any(0 in x.shape[1:] for x in operands.values()):
        raise ValueError(f"no dimension but the batch may be 0; got {_shapes(operands)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads: {q.shape[1]} % {k.shape[1]} != 0; got {_shapes(operands)}"
        )


def _shapes(operands: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in operands.items())


def check_layout(name: str, x: torch.Tensor) -> None:
    """Raise for nested, sparse and distributed tensors."""
    if x.layout is torch.strided and not x.is_nested and type(x).__name__ != "DTensor":
        return
    if x.is_nested:
        raise ValueError(
            f"{name} is a nested tensor: pack its samples into one sequence, [1, heads, all tokens, dim], and let "
            "patterns.documents(lengths) keep them apart; or pad them and give SparseAttention their lengths="
        )
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor: where heads or samples are sharded, call attention on the shards, "
            f"{name}.to_local(); where tokens are, call sparseflash.distributed.context_parallel_attention"
        )
    raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}; {name}.to_dense() makes one")
