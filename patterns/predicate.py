"""Calling predicates that were written for numpy or for torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from sparseflash.patterns.grid import Ints

Predicate = Callable[[Any, Any], Any]


def ask(fn: Predicate, q: Ints, k: Ints) -> Any:
    """``fn(q, k)`` as a numpy array. It is called with numpy arrays or, if it refuses them, with tensors.

    Patterns do not import torch, but the author of a predicate of tensors has imported it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return fn(q, k)
    try:
        truth = fn(q, k)
    except (TypeError, AttributeError) as refused:
        try:
            truth = fn(torch.from_numpy(np.ascontiguousarray(q)), torch.from_numpy(np.ascontiguousarray(k)))
        except Exception:
            raise refused from None
    return truth.detach().cpu().numpy() if isinstance(truth, torch.Tensor) else truth
