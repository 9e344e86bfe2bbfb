"""What a place sees along one axis of a grid."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints

Places = NDArray[np.int32]  # coordinates along one axis


@dataclass(frozen=True, eq=False)
class Span:
    """Place q sees the places k with ``low[q] <= k < stop[q]`` that lie a multiple of ``step`` away."""

    low: Places  # [n]
    stop: Places
    step: int = 1

    @classmethod
    def of(cls, low: Ints, stop: Ints, step: int = 1) -> Span:
        """From bounds of any size, cut where no place is."""
        n = low.size
        # Bounds past the border stay there, so that places near it and far from it see the same relative to themselves.
        return cls(np.clip(low, -n, 2 * n).astype(np.int32), np.clip(stop, -n, 2 * n).astype(np.int32), step)

    @classmethod
    def everything(cls, n: int) -> Span:
        return cls.of(np.zeros(n, np.int64), np.full(n, n))

    @classmethod
    def offsets(cls, n: int, low: int, high: int, step: int = 1) -> Span:
        """``low <= k - q <= high``."""
        q = np.arange(n, dtype=np.int64)
        return cls.of(q + max(low, -n), q + min(high, n) + 1, step)

    @cached_property
    def unbounded(self) -> bool:
        """Whether every place sees every place."""
        return self.step == 1 and bool((self.low <= 0).all() and (self.stop >= self.low.size).all())

    def allows(self, q: Places, k: Places) -> NDArray[np.bool_]:
        """Truth for places of shapes that broadcast."""
        return self.holds(self.low[q], self.stop[q], q, k)

    def holds(self, low: Places, stop: Places, q: Places, k: Places) -> NDArray[np.bool_]:
        """Truth for bounds that were looked up already."""
        seen = (k >= low) & (k < stop)
        if self.step > 1:
            seen &= (k - q) % self.step == 0
        return np.asarray(seen)

    @cached_property
    def _reach(self) -> tuple[Places, Places]:
        """The lowest bound of any place from here on, and the highest one of any place up to here."""
        return np.minimum.accumulate(self.low[::-1])[::-1], np.maximum.accumulate(self.stop)

    def meets(self, q0: Places, q1: Places, k0: Places, k1: Places) -> NDArray[np.bool_]:
        """Whether any of the places q0 to q1 may see any of k0 to k1: a superset of where one does."""
        low, stop = self._reach
        seen = (low[q0] <= k1) & (stop[q1] > k0)
        if self.step > 1:
            seen &= (k1 - q0) // self.step * self.step >= k0 - q1
        return np.asarray(seen)
