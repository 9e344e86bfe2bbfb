"""A limit in bytes for caches: `functools.lru_cache` limits the number of results, whatever their size."""

from __future__ import annotations

from collections.abc import Callable
from functools import _lru_cache_wrapper
from typing import TypeVar

Made = TypeVar("Made")

BYTES = 256 << 20  # the mask of 16 million tokens in `causal() & (local(1024) | butterfly())` has 26 MB, its table 29


class Budget:
    """Bytes that several caches may hold together. When they would exceed it, all of them are emptied.

    Bytes are counted since the caches were last emptied, so they never exceed the budget, except for the newest result,
    which is kept whatever its size. Nothing is locked: when threads count at the same moment, a count may be lost, but
    not the next one.

    Args:
        most: bytes.

    Example:
        >>> from functools import lru_cache
        >>> budget = Budget(100)
        >>> @budget.bounds
        ... @lru_cache
        ... def zeros(count: int) -> bytes:
        ...     made = bytes(count)
        ...     budget.spend(len(made))
        ...     return made
        >>> [len(zeros(count)) for count in (40, 50, 60)], zeros.cache_info().currsize
        ([40, 50, 60], 1)
    """

    def __init__(self, most: int = BYTES) -> None:
        self.most = most
        self._spent = 0
        self._caches: list[Callable[[], None]] = []

    def bounds(self, cached: _lru_cache_wrapper[Made]) -> _lru_cache_wrapper[Made]:
        """Decorator over ``lru_cache``: this cache is emptied with the others."""
        self._caches.append(cached.cache_clear)
        return cached

    def spend(self, size: int) -> None:
        """Count the bytes of a result that a cache is about to keep."""
        self._spent += size
        if self._spent > self.most:
            self._spent = size
            for forget in self._caches:
                forget()


MASKS = Budget()  # in host memory
TABLES = Budget()  # in the memory of their devices
