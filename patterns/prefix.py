"""A prefix that all see, causal after it."""

from __future__ import annotations

from dataclasses import dataclass

from sparseflash.patterns.causal import causal
from sparseflash.patterns.composed import Composed, FirstKeys
from sparseflash.patterns.pattern import Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Prefix(Composed):
    """See :func:`prefix`."""

    n: int
    name = "prefix"

    def expression(self) -> Pattern:
        return causal() | FirstKeys(self.n)


def prefix(n: int) -> Pattern:
    """``k <= q`` or ``k < n``: prefix language model, Raffel et al., "T5" (2020), section 3.2.1.

    Raises:
        TypeError: n is not an int.
        ValueError: n is negative.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.prefix(2).compile(4, block=16).to_dense().astype(int)
        array([[1, 1, 0, 0],
               [1, 1, 0, 0],
               [1, 1, 1, 0],
               [1, 1, 1, 1]])
    """
    return Prefix(checked_int("prefix", "n", n, 0))
