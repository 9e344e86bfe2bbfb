"""Tiles of a pattern over a grid of places, put together from one tile along each axis.

Along an axis a query sees a stretch of places. The bits of a block's keys that lie before a place are listed once for
each way in which keys lie in a block, so that a stretch is the difference of two entries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.cells import joint_key
from sparseflash.patterns.intervals import Ints, positions
from sparseflash.patterns.runs import distinct
from sparseflash.patterns.span import Places, Span
from sparseflash.patterns.tiles import Words, distinct_rows, pack

BITS_AT_ONCE = 1 << 21
NOWHERE = np.int32(1 << 30)  # the coordinate of a token that is not there: past every bound


class Keys(NamedTuple):
    """The keys of all block columns, along one axis."""

    origin: Places  # [columns] the first place of each
    kind: Ints  # [columns] how its keys lie from there on
    extent: Places  # [kinds] places from the first to the last one
    begin: Ints  # [kinds] where the entries of a kind begin
    below: Words  # [entries, W] the keys that lie less than 0, 1, ..., extent places behind the first one
    lie: Places  # [kinds, BK] places behind the first one

    @classmethod
    def of(cls, places: Places) -> Keys:
        """From the coordinates of keys, [columns, BK]."""
        origin = places.min(axis=1)
        first, kind = _kinds(places - origin[:, None])
        lie = np.where(places[first] < NOWHERE, places[first] - origin[first, None], NOWHERE)
        extent = np.where(lie < NOWHERE, lie, -1).max(axis=1) + 1
        stop = np.cumsum(extent + 1, dtype=np.int64)
        begin = stop - extent - 1
        owner = np.repeat(np.arange(first.size), extent + 1)
        count = positions(np.zeros_like(stop), (extent + 1).astype(np.int64))
        step = max(1, BITS_AT_ONCE // places.shape[1])
        below = [
            pack(lie[owner[i : i + step]] < count[i : i + step, None].astype(np.int32))
            for i in range(0, count.size, step)
        ]
        return cls(origin, kind, extent, begin, np.concatenate(below), lie)

    def between(self, cols: Ints, low: Places, stop: Places) -> Words:
        """The keys of block columns from ``low`` [n, BQ] to before ``stop``, [n, BQ, W]."""
        kind = self.kind[cols]
        origin, extent = self.origin[cols][:, None], self.extent[kind][:, None]
        begin = self.begin[kind][:, None]
        words: Words = self.below.take(begin + np.clip(stop - origin, 0, extent), axis=0)
        words &= ~self.below.take(begin + np.clip(low - origin, 0, extent), axis=0)
        return words

    def in_step(self, cols: Ints, q: Places, step: int) -> Words:
        """The keys of block columns that lie a multiple of ``step`` from queries [n, BQ], [n, BQ, W]."""
        residues = np.arange(step, dtype=np.int32)[:, None]
        kinds, index = distinct(self.kind[cols])
        alike = pack(self.lie[kinds][:, None, :] % step == residues)  # of a few blocks at a time
        words: Words = alike[index[:, None], (q - self.origin[cols][:, None]) % step]
        return words


class AxisTiles:
    """The blocks of a grid, and what is seen between them along each axis of some terms."""

    def __init__(self, terms: tuple[tuple[Span, ...], ...], q: Places, k: Places) -> None:
        """Coordinates of queries [axes, rows, BQ] and keys [axes, columns, BK]; NOWHERE for tokens outside."""
        # One axis at least: it leaves out the tokens that are not there.
        self._terms = [
            {axis: span for axis, span in enumerate(term) if not span.unbounded} or {0: term[0]} for term in terms
        ]
        self._q = q
        # Of blocks that hold tokens; those that hold none are not asked about.
        self._stretch = [
            (np.minimum(places.min(axis=1), NOWHERE - 1), np.where(places < NOWHERE, places, 0).max(axis=1))
            for places in q
        ]
        self._k = {axis: Keys.of(k[axis]) for term in self._terms for axis in term}
        self.nbytes = q.nbytes + sum(array.nbytes for keys in self._k.values() for array in keys)

    def tiles(self, rows: Ints, cols: Ints) -> Words:
        """Tiles of blocks, uint32 [n, BQ, W]."""
        seen = None
        for term in self._terms:
            words = None
            for axis, span in term.items():
                along = self._along(axis, span, rows, cols)
                words = along if words is None else np.bitwise_and(words, along, out=words)
            assert words is not None
            seen = words if seen is None else np.bitwise_or(seen, words, out=seen)
        assert seen is not None
        return seen

    def _along(self, axis: int, span: Span, rows: Ints, cols: Ints) -> Words:
        q, keys = self._q[axis][rows], self._k[axis]
        words = keys.between(cols, *_bounds(span, q))
        if span.step > 1:
            words &= keys.in_step(cols, q, span.step)
        return words

    def kinds(self, rows: Ints, cols: Ints) -> Ints:
        """Numbers of blocks, equal only for blocks with equal tiles."""
        key, numbers = np.zeros_like(rows), 1
        for term in self._terms:
            # Most blocks of a pattern of many terms are empty in most of them, and keep their number.
            here = np.arange(rows.size) if len(self._terms) == 1 else self._near(term, rows, cols)
            kind = None
            for axis, span in term.items():
                along = self._kinds_along(axis, span, rows[here], cols[here])
                some = np.flatnonzero(along >= 0)  # empty along one axis is empty
                kind = along[some] if kind is None else joint_key(kind[some], along[some])
                here = here[some]
            assert kind is not None
            found, index = distinct(joint_key(key[here], kind))
            key[here] = numbers + index
            numbers += found.size
        return key

    def _near(self, term: dict[int, Span], rows: Ints, cols: Ints) -> Ints:
        """Which blocks may see anything by a term, from the stretches of places of their queries and keys."""
        here = np.arange(rows.size)
        for axis, span in term.items():
            if not here.size:
                return here
            (first, last), keys = self._stretch[axis], self._k[axis]
            i, j = rows[here], cols[here]
            begin = keys.origin[j]
            here = here[span.meets(first[i], last[i], begin, begin + keys.extent[keys.kind[j]] - 1)]
        return here

    def _kinds_along(self, axis: int, span: Span, rows: Ints, cols: Ints) -> Ints:
        """Numbers of the tiles along one axis, equal only for equal ones; -1 for empty ones."""
        q, keys = self._q[axis], self._k[axis]
        origin = q.min(axis=1)
        places = [bound - origin[:, None] for bound in _bounds(span, q)] + [q - origin[:, None]] * (span.step > 1)
        _, q_kind = _kinds(np.concatenate(places, axis=1))
        apart = (keys.origin[cols] - origin[rows]).astype(np.int64)
        found, index = distinct(joint_key(q_kind[rows], keys.kind[cols], apart))
        some = np.empty(found.size, np.int64)
        some[index] = np.arange(index.size)
        number = np.empty(found.size, np.int64)
        step = max(1, BITS_AT_ONCE // (q.shape[1] * keys.lie.shape[1]))
        for begin in range(0, found.size, step):
            chosen = some[begin : begin + step]
            words = self._along(axis, span, rows[chosen], cols[chosen]).reshape(chosen.size, -1).view(np.uint64)
            first, same = distinct_rows(words)
            number[begin : begin + step] = np.where(words.any(axis=1), begin + first[same], -1)
        return number[index]


def _bounds(span: Span, q: Places) -> tuple[Places, Places]:
    """What queries see along an axis; nothing, where there is no query."""
    at = np.minimum(q, span.low.size - 1)
    return span.low[at], np.where(q < NOWHERE, span.stop[at], -NOWHERE)


def _kinds(rows: NDArray[np.int32]) -> tuple[Ints, Ints]:
    """The first of each kind of rows [n, m], of which m is even, and the number of each row's kind."""
    return distinct_rows(np.ascontiguousarray(rows).view(np.uint64))
