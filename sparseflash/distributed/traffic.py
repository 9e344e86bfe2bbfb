"""Deprecated: import these names from :mod:`sparseflash.distributed.comm_volume`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from sparseflash.distributed import comm_volume

if TYPE_CHECKING:
    from sparseflash.distributed.comm_volume import Operands, received, ring_forward

__all__ = ["Operands", "received", "ring_forward"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {comm_volume.__name__}.{name}", DeprecationWarning, stacklevel=2)
    return getattr(comm_volume, name)
