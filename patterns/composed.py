"""Named patterns that are short expressions of others."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.causal import causal
from sparseflash.patterns.global_tokens import global_tokens
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.interval import Interval
from sparseflash.patterns.local import local
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


class Composed(Pattern):
    """Base of patterns with a name that stand for an expression."""

    @abstractmethod
    def expression(self) -> Pattern:
        """The expression that the name stands for."""

    def allows(self, q: Ints, k: Ints) -> Bools:
        return self.expression().allows(q, k)

    def compile_on(self, grid: Grid) -> BlockMask:
        return self.expression().compile_on(grid)

    def at(self, grid: Grid) -> Pattern:
        return self.expression().at(grid)


@dataclass(frozen=True, repr=False)
class FirstKeys(Interval):
    """``k < n``. Not public: users want ``global_tokens``; ``streaming`` needs its half of the keys."""

    n: int
    name = "first_keys"

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        return np.zeros_like(q), np.full_like(q, self.n)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return cols


@dataclass(frozen=True, repr=False)
class Star(Composed):
    """See :func:`star`."""

    name = "star"

    def expression(self) -> Pattern:
        return local(1) | global_tokens(1)


@dataclass(frozen=True, repr=False)
class Streaming(Composed):
    """See :func:`streaming`."""

    sinks: int
    window: int
    name = "streaming"

    def expression(self) -> Pattern:
        return causal() & (FirstKeys(self.sinks) | local(self.window - 1))


def star() -> Pattern:
    """``abs(q - k) <= 1``, or q or k is 0: Guo et al., "Star-Transformer" (2019), with the relay node as token 0.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.star().compile(4, block=16).to_dense().astype(int)
        array([[1, 1, 1, 1],
               [1, 1, 1, 0],
               [1, 1, 1, 1],
               [1, 0, 1, 1]])
    """
    return Star()


def streaming(sinks: int, window: int) -> Pattern:
    """``k <= q`` and (``k < sinks`` or ``q - k < window``): Xiao et al., "StreamingLLM" (2023), section 3.2.

    Args:
        sinks: number of leading tokens that stay visible.
        window: number of latest tokens seen, including the query's own.

    Raises:
        TypeError: sinks or window is not an int.
        ValueError: sinks is negative or window below 1.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.streaming(1, 2).compile(5, block=16).to_dense().astype(int)
        array([[1, 0, 0, 0, 0],
               [1, 1, 0, 0, 0],
               [1, 1, 1, 0, 0],
               [1, 0, 1, 1, 0],
               [1, 0, 0, 1, 1]])
    """
    return Streaming(checked_int("streaming", "sinks", sinks, 0), checked_int("streaming", "window", window, 1))
