"""Every query sees every key."""

from __future__ import annotations

from dataclasses import dataclass

from sparseflash.patterns.interval import Band
from sparseflash.patterns.pattern import Pattern


@dataclass(frozen=True, repr=False)
class Full(Band):
    """See :func:`full`."""

    name = "full"


def full() -> Pattern:
    """Dense attention (Vaswani et al., 2017): all pairs.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.full().compile(1 << 20).density
        1.0
    """
    return Full()
