"""No query sees a later key."""

from __future__ import annotations

from dataclasses import dataclass

from sparseflash.patterns.interval import Band
from sparseflash.patterns.pattern import Pattern


@dataclass(frozen=True, repr=False)
class Causal(Band):
    """See :func:`causal`."""

    name = "causal"

    @property
    def high(self) -> int:
        return 0


def causal() -> Pattern:
    """``k <= q``: the decoder mask of Vaswani et al., "Attention Is All You Need" (2017), section 3.2.3.

    With fewer queries than keys the last query has the position of the last key, unless ``q_offset`` says otherwise.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.causal().compile((2, 4), block=16).to_dense().astype(int)
        array([[1, 1, 1, 0],
               [1, 1, 1, 1]])
    """
    return Causal()
