"""Sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from sparseflash.patterns.interval import Band
from sparseflash.patterns.pattern import Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Local(Band):
    """See :func:`local`."""

    window: int
    name = "local"

    @property
    def low(self) -> int:
        return -self.window

    @property
    def high(self) -> int:
        return self.window


def local(window: int) -> Pattern:
    """``abs(q - k) <= window``: sliding window attention, Beltagy et al., "Longformer" (2020), section 3.1.

    Args:
        window: tokens seen on either side; 0 leaves the diagonal only. In ``causal() & local(w)`` a query sees
            itself and w earlier tokens.

    Raises:
        TypeError: window is not an int.
        ValueError: window is negative.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.local(1).compile(4, block=16).to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 1, 0],
               [0, 1, 1, 1],
               [0, 0, 1, 1]])
    """
    return Local(checked_int("local", "window", window, 0))
