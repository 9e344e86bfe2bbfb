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
from sparseflash.patterns.stacked import per_sample


@dataclass(frozen=True, repr=False)
class Documents(Interval):
    """See :func:`documents`."""

    lengths: tuple[int, ...]
    kv_lengths: tuple[int, ...] | None = None
    causal: bool = False
    name = "documents"

    @property
    def known_size(self) -> int | None:
        return sum(self.lengths) if self.kv_lengths is None else None

    @cached_property
    def _k_edges(self) -> Ints:
        """Where the keys of each document begin, and where the last ones end."""
        return _edges(self.lengths if self.kv_lengths is None else self.kv_lengths)

    @cached_property
    def _q_edges(self) -> Ints:
        """Where its queries begin: the last query of all stands on the last key of all."""
        edges = _edges(self.lengths)
        shifted: Ints = edges + (self._k_edges[-1] - edges[-1])
        return shifted

    @cached_property
    def _padded(self) -> tuple[Ints, Ints]:
        """Edges of queries and keys, with an empty document before the first one and after the last one."""
        q, k = self._q_edges, self._k_edges
        return np.concatenate([q[:1], q, q[-1:]]), np.concatenate([k[:1], k, k[-1:]])

    def bounds(self, q: Ints) -> tuple[Ints, Ints]:
        index = np.searchsorted(self._q_edges, q, side="right")
        q_edges, k_edges = self._padded
        low, stop = k_edges[index], k_edges[index + 1]
        if self.causal:
            # The last query of a document sees all of its keys, the one before all but the last, and so on.
            stop = np.clip(stop - (q_edges[index + 1] - 1 - q), low, stop)
        return low, stop

    def _fit(self, grid: Grid) -> None:
        queries, keys = sum(self.lengths), int(self._k_edges[-1])
        if self.kv_lengths is not None:
            if (grid.q_len, grid.kv_len, grid.q_offset) != (queries, keys, keys - queries):
                raise ValueError(
                    f"documents: lengths add up to {queries:,} queries and kv_lengths to {keys:,} keys; "
                    f"this mask is for {grid}"
                )
            return
        if grid.q_len > grid.kv_len and grid.q_offset == grid.kv_len - grid.q_len:
            # Nobody means this: aligned with the last key, the first queries stand before the first document.
            raise ValueError(
                f"documents: lengths add up to {keys:,} tokens; this mask is for {grid.q_len:,} queries and "
                f"{grid.kv_len:,} keys. Where the keys are another sequence, give their lengths: "
                "documents(lengths, kv_lengths=...); where they are the first tokens of the same one, q_offset=0"
            )
        tokens = max(grid.q_offset + grid.q_len, grid.kv_len)
        if tokens > keys:
            raise ValueError(
                f"documents: {len(self.lengths)} lengths add up to {keys:,} tokens; the sequence has {tokens:,}"
            )

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        self._fit(grid)
        return super().candidates(grid)


def documents(
    lengths: Iterable[int] | None = None,
    kv_lengths: Iterable[int] | None = None,
    causal: bool = False,
    *,
    cu_seqlens: Iterable[int] | None = None,
    cu_seqlens_k: Iterable[int] | None = None,
    ids: Iterable[int] | Iterable[Iterable[int]] | None = None,
) -> Pattern:
    """Query and key are in the same document of a packed sequence, or of two sequences that are packed alike.

    For decoders: ``causal() & documents(...)``, or ``causal=True``. For cross-attention of packed sequences give
    ``kv_lengths`` too.

    Args:
        lengths: tokens of each document in order; together they cover the sequence (a last one may be padding, and any
            may be empty).
        kv_lengths: keys of each document, if queries and keys are packed separately. ``lengths`` then counts queries
            only, and the mask must have exactly this many queries and keys.
        causal: query a of a document sees its key b only if ``b - a <= keys - queries`` of that document, counted from
            0: its last query sees all of its keys, as in flash-attention's variable-length functions.
        cu_seqlens: instead of lengths, cumulative lengths as those functions take them, starting with 0.
        cu_seqlens_k: cumulative lengths instead of kv_lengths.
        ids: instead of lengths, the document of each token: ints [tokens], or [samples, tokens] for documents of each
            sample. Any ints in any order (padding may be -1, which makes it a document), but the tokens of a document
            must be contiguous. An array or a tensor, which is read immediately.

    Raises:
        TypeError: entries are not ints, causal is not a bool, or lengths are given in two ways or in none.
        ValueError: a negative length, cumulative lengths that do not start at 0, another number of kv_lengths, ids of
            a document whose tokens do not stand together; when compiling, lengths that the documents do not have.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.documents([1, 2]).compile(3, block=16).to_dense().astype(int)
        array([[1, 0, 0],
               [0, 1, 1],
               [0, 1, 1]])
        >>> P.documents([2, 3], kv_lengths=[1, 3], causal=True).compile((5, 4), block=16).to_dense().astype(int)
        array([[0, 0, 0, 0],
               [1, 0, 0, 0],
               [0, 1, 0, 0],
               [0, 1, 1, 0],
               [0, 1, 1, 1]])
        >>> P.documents(cu_seqlens=[0, 1, 3]) == P.documents(ids=[7, 4, 4]) == P.documents([1, 2])
        True
        >>> P.documents(ids=[[0, 1, 1], [0, 0, -1]])
        per_sample(documents((1, 2)), documents((2, 1)))
    """
    if sum(given is not None for given in (lengths, cu_seqlens, ids)) != 1:
        raise TypeError("documents takes one of lengths, cu_seqlens and ids")
    if kv_lengths is not None and cu_seqlens_k is not None:
        raise TypeError("documents takes either kv_lengths or cu_seqlens_k")
    if not isinstance(causal, bool):
        raise TypeError(f"documents: causal must be True or False, got {causal!r}")
    if ids is not None:
        if kv_lengths is not None or cu_seqlens_k is not None:
            raise TypeError("documents takes no kv_lengths beside ids: where keys are another sequence, give lengths")
        return _of_ids(ids, causal)
    queries = _lengths("length", lengths, "cu_seqlens", cu_seqlens)
    if not queries:
        raise ValueError("documents: give at least one length, got none")
    if kv_lengths is None and cu_seqlens_k is None:
        return Documents(queries, None, causal)
    keys = _lengths("kv_length", kv_lengths, "cu_seqlens_k", cu_seqlens_k)
    if len(keys) != len(queries):
        raise ValueError(f"documents: {len(queries)} lengths need as many kv_lengths, got {len(keys)}")
    return Documents(queries, keys, causal)


def _of_ids(ids: object, causal: bool) -> Pattern:
    """The documents whose tokens have these ids, [tokens] or [samples, tokens]."""
    try:
        array = np.asarray(_listed("ids", ids))
    except ValueError:  # rows of unequal lengths
        raise ValueError("documents: ids must be as many for each sample; pad them, with -1 for example") from None
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"documents: ids must be ints, one per token, got {array.dtype}")
    if array.ndim not in (1, 2) or not array.size:
        raise ValueError(f"documents: ids must be [tokens] or [samples, tokens], got shape {list(array.shape)}")
    if array.ndim == 2:
        return per_sample(*(_of_ids(sample, causal) for sample in array))
    edges = np.concatenate([[0], np.flatnonzero(np.diff(array)) + 1, [array.size]])
    _, first = np.unique(array[edges[:-1]], return_index=True)
    for again in np.setdiff1d(np.arange(edges.size - 1), first)[:1]:
        raise ValueError(
            f"documents: the tokens of a document must stand together, but id {array[edges[again]]} comes again at "
            f"token {edges[again]:,}; for ids in any order use "
            "sparseflash.flex.create_block_mask(lambda b, h, q, k: ids[q] == ids[k], ...)"
        )
    return Documents(tuple(np.diff(edges).tolist()), None, causal)


def _lengths(
    name: str, lengths: Iterable[int] | None, cumulative_name: str, cumulative: Iterable[int] | None
) -> tuple[int, ...]:
    """Checked lengths, given as such or cumulatively."""
    if cumulative is None:
        return tuple(checked_int("documents", name, n, 0) for n in _listed(f"{name}s", lengths))
    edges = [checked_int("documents", f"{cumulative_name} entry", e, 0) for e in _listed(cumulative_name, cumulative)]
    if not edges or edges[0] != 0:
        raise ValueError(f"documents: {cumulative_name} must start at 0, got {edges[:1]}")
    for index, (a, b) in enumerate(pairwise(edges)):
        if a > b:
            raise ValueError(f"documents: {cumulative_name} must not fall, got {b} after {a} at entry {index + 1}")
    return tuple(b - a for a, b in pairwise(edges))


def _listed(name: str, values: object) -> Iterable[int]:
    """Python ints of an array or a tensor, which flash-attention's functions take too; else the values themselves."""
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Iterable):
        raise TypeError(f"documents: {name} must be ints, one per document, got {values!r}")
    return listed


def _edges(lengths: tuple[int, ...]) -> Ints:
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))])
