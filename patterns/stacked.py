"""One pattern for each head or each sample."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, check_operands, holds
from sparseflash.patterns.set_operations import stacked


@dataclasses.dataclass(frozen=True, repr=False)
class Stacked(Pattern):
    """One pattern for each head or each sample."""

    parts: tuple[Pattern, ...]

    axis: ClassVar[int]  # of a mask's [samples, heads]

    def compile_on(self, grid: Grid) -> BlockMask:
        reserve(len(set(self.parts)) * grid.rows, 160)
        return BlockMask.of(stacked([compile_pattern(part, grid) for part in self.parts], self.axis))

    def at(self, grid: Grid) -> Pattern:
        return type(self)(tuple(p.at(grid) for p in self.parts))

    def coarser(self, tokens: int) -> Pattern:
        return type(self)(tuple(p.coarser(tokens) for p in self.parts))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(str, self.parts))})"

    __repr__ = __str__


class PerHead(Stacked):
    """A pattern per head; see :func:`per_head`."""

    name, axis = "per_head", 1

    def allows(self, q: Ints, k: Ints) -> Bools:
        shape = np.broadcast_shapes(np.shape(q), np.shape(k))
        return np.stack([np.broadcast_to(p.allows(q, k), shape) for p in self.parts])


class PerSample(Stacked):
    """A pattern per sample; see :func:`per_sample`."""

    name, axis = "per_sample", 0

    def allows(self, q: Ints, k: Ints) -> Bools:
        dims = len(np.broadcast_shapes(np.shape(q), np.shape(k)))
        truths = [p.allows(q, k) for p in self.parts]
        # [heads or 1, ...] each, so that samples with and without their own heads can be stacked.
        return np.stack(np.broadcast_arrays(*(t if t.ndim > dims else t[None] for t in truths)))


def per_head(*patterns: Pattern) -> Pattern:
    """One pattern for each query head: head h sees the keys that ``patterns[h]`` allows.

    Equal patterns share one table. Patterns combined with the result hold for every head.

    Raises:
        TypeError: an operand is not a pattern.
        ValueError: no operand, or an operand that is itself per head or per sample.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.per_head(P.local(8), P.causal()).compile(256, block=64).to_dense().shape
        (2, 256, 256)
    """
    return _stacked(PerHead, patterns, (PerHead, PerSample))


def per_sample(*patterns: Pattern) -> Pattern:
    """One pattern for each sample of a batch, for example the documents packed into it.

    Equal patterns share one table. An operand may be per head; samples must then agree in the number of heads.

    Raises:
        TypeError: an operand is not a pattern.
        ValueError: no operand, or an operand that is itself per sample.

    Example:
        >>> from sparseflash import patterns as P
        >>> packed = P.per_sample(P.documents([3, 5]), P.documents([8])) & P.causal()
        >>> packed.compile(8, block=16).to_dense().shape  # [samples, heads or 1, queries, keys]
        (2, 1, 8, 8)
    """
    return _stacked(PerSample, patterns, (PerSample,))


def _stacked(kind: type[Stacked], patterns: tuple[Pattern, ...], forbidden: tuple[type[Stacked], ...]) -> Pattern:
    check_operands(kind.name, patterns)
    for index, pattern in enumerate(patterns):
        for inner in forbidden:
            if holds(pattern, inner):
                raise ValueError(f"{kind.name}: operand {index}, {pattern}, is already {inner.name.replace('_', ' ')}")
    return kind(patterns) if len(patterns) > 1 else patterns[0]
