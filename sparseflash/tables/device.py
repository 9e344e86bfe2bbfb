"""What tables need of a device: copies that every later call can use, and no copies while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch._guards import active_fake_mode

# Kernels load the next block's index while they work on the current one; reading past the end must be harmless.
READ_AHEAD = 4

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")


def capturing(device: torch.device) -> bool:
    """Whether calls are being recorded into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_not_capturing(device: torch.device) -> None:
    """Raise RuntimeError where a table would have to be copied to the device while a CUDA graph is captured."""
    if capturing(device):
        raise RuntimeError(
            "a CUDA graph is being captured, and the mask's table is not on the device yet: run the call once before "
            "(sparseflash.lookup(mask, device) for masks, a first call for routed ones)"
        )


def unless_fake(cached: _lru_cache_wrapper[Made]) -> Callable[..., Made]:
    """A cached function that makes tensors; inside a FakeTensorMode without its cache, for fake ones must not stay."""
    # Without any mode there is none of those, which are looked for slowly.
    fake = torch._C._len_torch_dispatch_stack() and active_fake_mode() is not None
    return cached.__wrapped__ if fake else cached


def lasting(make: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
    """Decorator of a function whose tensors are kept: every later call can use them, whoever makes the first one.

    Made in inference mode, they could not be saved for a backward pass; made within a transform of torch.func, they
    would be wrapped for its level, and be errors once that is left.
    """

    @wraps(make)
    def made(*arguments: Arguments.args, **named: Arguments.kwargs) -> Made:
        with torch.inference_mode(False), torch._C._DisableFuncTorch():
            return make(*arguments, **named)

    return made


def per_device(maxsize: int) -> Callable[[Callable[..., Made]], _lru_cache_wrapper[Made]]:
    """Decorator of a function that makes tensors on a device, one of its arguments: :func:`lasting`, and cached.

    Where calls may come in a FakeTensorMode, call it through :func:`unless_fake`.
    """
    return lambda make: lru_cache(maxsize)(lasting(make))


def tensor(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """An array as int32 on a device."""
    return torch.from_numpy(np.array(array, np.int32, order="C")).to(device)
