"""The values that a predicate captured, for the key of a cache.

They are read without calling the predicate, so changes of dicts, files and objects go unnoticed, as ``where`` says.
``integrations/mask_mods.py`` notices those too: it calls a ``mask_mod`` under torch's dispatcher. That needs torch,
which patterns do not import, and a function of tensors: numpy's operations do not pass the dispatcher.
"""

from __future__ import annotations

from collections.abc import Hashable
from hashlib import blake2b
from types import FunctionType
from typing import Any

import numpy as np

MOST_BYTES = 4 << 20  # largest array whose content is compared: some milliseconds
DEPTH = 3  # levels of nested functions and tuples


def state(fn: Any, depth: int = DEPTH) -> Hashable:
    """A key that changes when a value that ``fn`` captured changes.

    It covers numbers, texts, arrays up to 4 MB and torch tensors, in closures, defaults, global variables, attributes
    of bound objects, and functions that are captured in turn. Other values are compared by identity.

    Example:
        >>> import numpy as np
        >>> shift = np.array([1])
        >>> fn = lambda q, k: k == q + shift
        >>> before = state(fn)
        >>> shift[0] = 2
        >>> state(fn) == before
        False
    """
    return _of(fn, depth)


def _of(value: Any, depth: int) -> Hashable:
    if isinstance(value, int | float | complex | str | bytes | None.__class__):
        return type(value), value
    if isinstance(value, np.ndarray) and value.dtype != object and value.nbytes <= MOST_BYTES:
        return value.shape, value.dtype.str, blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).digest()
    version = getattr(value, "_version", None)
    if isinstance(version, int):  # a torch tensor counts the changes in place
        return id(value), version
    if depth:
        if isinstance(value, tuple | list):
            return (type(value), *(_of(each, depth - 1) for each in value))
        if isinstance(value, FunctionType):
            return id(value.__code__), *(_of(each, depth - 1) for each in _captured(value))
        if callable(value) and hasattr(value, "__self__") and hasattr(value, "__func__"):  # a method
            return id(value.__func__), _of(value.__self__, depth)
        if callable(value) and isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
            return id(value), *((name, _of(each, depth - 1)) for name, each in sorted(vars(value).items()))
    return id(value)


def _captured(fn: FunctionType) -> list[Any]:
    """Values of a function's closure cells (None for empty ones), its defaults and the globals that it uses."""
    found: list[Any] = [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    for cell in fn.__closure__ or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            found.append(None)
    return found + [fn.__globals__[name] for name in fn.__code__.co_names if name in fn.__globals__]
