"""Copies of tables to devices: kept for later calls, and refused while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch._guards import active_fake_mode

# Kernels load the index of the next block ahead of time, so reading past the end must be safe.
READ_AHEAD = 4

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on this device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Raise RuntimeError if a table would be copied to the device while a CUDA graph is captured."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and the mask's table is not on the device yet: run the call once before "
            "(sparseflash.lookup(mask, device) for masks, a first call for routed ones)"
        )


def unless_fake(cached: _lru_cache_wrapper[Made]) -> Callable[..., Made]:
    """A cached function that makes tensors. A FakeTensorMode bypasses the cache, so that no fake tensor stays in it."""
    # Without any mode there is no FakeTensorMode either, and looking for one is slow.
    fake = torch._C._len_torch_dispatch_stack() and active_fake_mode() is not None
    return cached.__wrapped__ if fake else cached


def lasting(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorator of a function whose tensors are cached, so that later calls in any mode can use them.

    Tensors made in inference mode could not be saved for a backward pass. Tensors made in a transform of torch.func
    would be wrapped for its level, and raise after the transform ends.
    """

    @wraps(make)
    def made(*arguments: Arguments.args, **named: Arguments.kwargs) -> Made:
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            return make(*arguments, **named)

    return made


def per_device(maxsize: int) -> Callable[[Callable[..., Made]], _lru_cache_wrapper[Made]]:
    """Decorator of a function that makes tensors on a device, one of its arguments: :func:`lasting` with a cache.

    If calls may come in a FakeTensorMode, call it through :func:`unless_fake`.
    """
    return lambda make: lru_cache(maxsize)(lasting(make))


def tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as int32 on a device."""
    return torch.from_numpy(np.array(array, np.int32, order="C")).to(device)
