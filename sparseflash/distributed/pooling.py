"""Deprecated: import `summed` from :mod:`sparseflash.distributed`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sparseflash import distributed

if TYPE_CHECKING:
    from sparseflash.distributed import summed

__all__ = ["summed"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now sparseflash.distributed.{name}", DeprecationWarning, stacklevel=2)
    return getattr(distributed, name)
