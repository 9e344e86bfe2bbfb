"""Curves through a grid of any shape: Morton's order of interleaved bits, and a generalised Hilbert curve."""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.intervals import Ints

Edge: TypeAlias = tuple[int, int]  # an axis, and how far a box reaches along it: backwards if negative


def morton(places: tuple[Ints, ...]) -> Ints:
    """The bits of all coordinates interleaved, those of the last axis lowest."""
    keys = np.zeros_like(places[0])
    axes = len(places)
    for axis, values in enumerate(reversed(places)):
        for bit in range(int(values.max(initial=0)).bit_length()):
            keys |= (values >> bit & 1) << (axes * bit + axis)
    return keys


def hilbert(shape: tuple[int, ...]) -> tuple[Ints, ...]:
    """Coordinates along a generalised Hilbert curve, one array an axis.

    Boxes are cut in halves of even length where there are any, so that the curve of each part ends beside the beginning
    of the next one: the construction of Cerveny, https://github.com/jakubcerveny/gilbert. The curve begins at the first
    place; on a square whose side is a power of two it is Hilbert's.
    """
    axes = sorted(range(len(shape)), key=lambda axis: (-shape[axis], -axis))  # along the longest one
    edges = [(axis, shape[axis]) for axis in axes]
    edges += [(axis, 1) for axis in range(len(shape), 3)]
    first, second, third = edges
    steps = _curve(first, second, third)
    return tuple(steps[:, axis].astype(np.int64) for axis in range(len(shape)))


@lru_cache(maxsize=1024)
def _curve(a: Edge, b: Edge, c: Edge) -> NDArray[np.int32]:
    """The places of a box in order, int32 [n, 3] counted from its corner: from there to the far end of edge a."""
    w, h, d = abs(a[1]), abs(b[1]), abs(c[1])
    if (w > 1) + (h > 1) + (d > 1) <= 1:
        axis, length = next((edge for edge in (a, b, c) if abs(edge[1]) > 1), a)
        line = np.zeros((abs(length), 3), np.int32)
        line[:, axis] = np.arange(abs(length)) * _sign(length)
        return line
    (a1, a2), (b1, b2), (c1, c2) = _halves(a), _halves(b), _halves(c)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: one half after the other
        return _joined(((), (a1, b, c)), ((a1,), (a2, b, c)))
    if 3 * h > 4 * d:  # flat in c: up, along, and down
        return _joined(
            ((), (b1, c, a1)),
            ((b1,), (a, b2, c)),
            ((_end(a), _end(b1)), (_back(b1), c, _back(a2))),
        )
    if 3 * d > 4 * h:  # flat in b
        return _joined(
            ((), (c1, a1, b)),
            ((c1,), (a, b, c2)),
            ((_end(a), _end(c1)), (_back(c1), _back(a2), b)),
        )
    return _joined(
        ((), (b1, c1, a1)),
        ((b1,), (c, a1, b2)),
        ((_end(b1), _end(c)), (a, _back(b1), _back(c2))),
        ((_end(a), b1, _end(c)), (_back(c), _back(a2), b2)),
        ((_end(a), _end(b1)), (_back(b1), c1, _back(a2))),
    )


def _joined(*parts: tuple[tuple[Edge, ...], tuple[Edge, Edge, Edge]]) -> NDArray[np.int32]:
    """The curves of boxes one after another, each of which begins where some steps lead."""
    curves = []
    for steps, edges in parts:
        if all(length for _, length in edges):  # half of a single place is none
            corner = np.zeros(3, np.int32)
            for axis, length in steps:
                corner[axis] += length
            curves.append(_curve(*edges) + corner)
    return np.concatenate(curves)


def _halves(edge: Edge) -> tuple[Edge, Edge]:
    axis, length = edge
    half = abs(length) // 2
    if half % 2 and abs(length) > 2:
        half += 1  # an even number of steps leads back to the side where the curve came in
    first = half * _sign(length)
    return (axis, first), (axis, length - first)


def _end(edge: Edge) -> Edge:
    """The steps to the last place of an edge."""
    return edge[0], edge[1] - _sign(edge[1])


def _back(edge: Edge) -> Edge:
    return edge[0], -edge[1]


def _sign(length: int) -> int:
    return (length > 0) - (length < 0)
