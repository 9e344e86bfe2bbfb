"""Packed documents that do not see each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.interval import Interval
from sparseflash.patterns.pattern import Pattern, checked_int


@dataclass(frozen=True, repr=False)
class Documents(Interval):
    """See :func:`documents`."""

    lengths: tuple[int, ...]
    name = "documents"

    @cached_property
    def _edges(self) -> Ints:
        return np.concatenate([[0], np.cumsum(np.array(self.lengths, np.int64))])

    @cached_property
    def _padded(self) -> Ints:
        return np.concatenate([[0], self._edges, self._edges[-1:]])

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        # Positions before the first document see nothing; after the last one there is no document either.
        index = np.searchsorted(self._edges, q, side="right")
        return self._padded[index], self._padded[index + 1]

    def _fit(self, tokens: int) -> None:
        if tokens > self._edges[-1]:
            raise ValueError(
                f"documents: {len(self.lengths)} lengths add up to {self._edges[-1]:,} tokens; "
                f"the sequence has {tokens:,}"
            )

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit(max(grid.q_offset + grid.q_len, grid.kv_len))
        return super().candidates(grid)


def documents(lengths: Iterable[int] | None = None, *, cu_seqlens: Iterable[int] | None = None) -> Pattern:
    """Query and key lie in the same document of a packed sequence.

    For decoders: ``causal() & documents(...)``.

    Args:
        lengths: tokens of each document in order; together they cover the sequence (a last one may be padding).
        cu_seqlens: instead, the cumulative lengths as flash-attention's variable-length functions take them: 0 first.

    Raises:
        TypeError: entries are not ints, or both or neither argument is given.
        ValueError: a length below 1, cumulative lengths that do not start at 0; when compiling, a sequence longer than
            the documents.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.documents([1, 2]).compile(3, block=16).to_dense().astype(int)
        array([[1, 0, 0],
               [0, 1, 1],
               [0, 1, 1]])
        >>> P.documents(cu_seqlens=[0, 1, 3]) == P.documents([1, 2])
        True
    """
    if (lengths is None) == (cu_seqlens is None):
        raise TypeError("documents takes either lengths or cu_seqlens")
    if cu_seqlens is not None:
        edges = [checked_int("documents", "cu_seqlens entry", e, 0) for e in _listed(cu_seqlens)]
        if not edges or edges[0] != 0:
            raise ValueError(f"documents: cu_seqlens must start at 0, got {edges[:1]}")
        for index, (a, b) in enumerate(pairwise(edges)):
            if a >= b:
                raise ValueError(f"documents: cu_seqlens must rise, got {b} after {a} at entry {index + 1}")
        lengths = [b - a for a, b in pairwise(edges)]
    if not isinstance(lengths, Iterable):
        raise TypeError(f"documents: lengths must be ints, one a document, got {lengths!r}")
    checked = tuple(checked_int("documents", "length", n, 1) for n in _listed(lengths))
    if not checked:
        raise ValueError("documents: give at least one length, got none")
    return Documents(checked)


def _listed(values: Iterable[int]) -> Iterable[int]:
    """Python ints of an array or a tensor, which flash-attention's functions take too; else the values themselves."""
    listed: Iterable[int] = values.tolist() if hasattr(values, "tolist") else values
    return listed
