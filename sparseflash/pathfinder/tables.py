"""Tables of everything about a dash that does not depend on its position, one set per dash geometry and canvas side.

A *state* is a direction of travel: first the candidate offsets of one extension (pixels of a ring of radius r = L + m
around the pivot), then the 360 whole degrees of a seed dash. For every state the tables hold the two kernels as lists
of cells (flat offsets into a padded map and values) and the float displacement of the next step.

Quirk: ``shift(p, t, d) = ceil(p + d * (sin t, cos t))`` is formed in float64 *before* the ceil, so at axis-aligned
angles a displacement of 1e-16 lifts a small coordinate by one pixel and is absorbed by a large one. Only the float
displacements can be tabulated; the addition and the ceil happen at run time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparseflash.pathfinder.geometry import Geometry
from sparseflash.pathfinder.strokes import Bools, Bytes, Floats, Ints, dilate, flip, kernels

BLOCKED = 77
"""A pixel is blocked if the 8-bit occupancy reaches this (0.3 of 1 in floats)."""
COLLISION = 459
"""A footprint collides if occupancy plus footprint reach this (1.8 of 1 in floats)."""
DEGREES = range(-180, 180)

Number = TypeVar("Number", bound=np.integer[Any])


def shift(position: Ints, displacement: Floats) -> Ints:
    """ceil(position + displacement), the sum formed in float64 first."""
    return np.ceil(position + displacement).astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Cells:
    """Ragged lists of cells, one per state: flat offsets int64 [states, n] and values uint8 [states, n].

    Short rows are padded with copies of one of their own cells, which changes no maximum and no collision test.
    """

    offsets: Ints
    values: Bytes


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Tables of one (dash geometry, margin, canvas); C candidates, S = C + 360 states, K kernel half width.

    Maps are flat uint8 arrays of ``stride * stride`` cells: the canvas with ``border`` cells around it, so that windows
    need no clipping. Outside the canvas the occupancy is 0 (probes there find nothing) and its dilation is 255
    (candidates there have no weight).

    Attributes:
        size, border, stride: canvas side H, width of the border, side of a map.
        margin: m, the radius of the dilation.
        half: K.
        ring_radius: r = L + m.
        candidates: C.
        angles: direction of travel of each state, radians, float64 [S].
        ring: the candidate offsets (dy, dx), int64 [C, 2]; ``ring_flat`` and ``ring_in_dilated`` [C], the same as steps
            within M and from a cell of M into D.
        weights: cos^2 bend weights, float64 [S, C].
        step: displacement of one period, float64 [S, 2].
        head, back: displacements from a seed's tail to its head and from there to its pivot, float64 [360, 2].
        strokes, footprints: uint8 [S, 2K+1, 2K+1], drawn with the centre on the state's pixel.
        hit: footprint cells that can collide, with the lowest occupancy that does.
        mark: what a commit writes: the non-zero footprint cells in M, then in D those of the footprint dilated by the
            disc of radius m.
        probes: for each degree the offsets (dy, dx) tested for a seed; ``probes_flat`` int64 [360, n] likewise.
        viable: bool [360].
        first_low, first_high: the rectangle of first tails, low inclusive and high exclusive, int64 [360, 2].
        first: degrees (as indices) that can start a first target.
        blank: the maps of an empty canvas, M and then D, uint8 [2 * stride * stride].
        free: weight factor 1 - D / 255 of each value of D, float64 [256].
    """

    size: int
    border: int
    stride: int
    margin: int
    half: int
    ring_radius: int
    candidates: int
    angles: Floats
    ring: Ints
    ring_flat: Ints
    ring_in_dilated: Ints
    weights: Floats
    step: Floats
    head: Floats
    back: Floats
    strokes: Bytes
    footprints: Bytes
    hit: Cells
    mark: Cells
    probes: tuple[Ints, ...]
    probes_flat: Ints
    viable: Bools
    first_low: Ints
    first_high: Ints
    first: Ints
    blank: Bytes
    free: Floats

    def flat(self, position: Ints) -> Ints:
        """Cell of a map for canvas pixels int64 [..., 2]."""
        cell: Ints = position[..., 0] * self.stride + position[..., 1] + self.border * (self.stride + 1)
        return cell

    def canvas(self, maps: Bytes) -> Bytes:
        """View of one lane's maps without the border: M and D, uint8 [2, H, H]."""
        inner = slice(self.border, self.border + self.size)
        return maps.reshape(2, self.stride, self.stride)[:, inner, inner]

    def pixel(self, flat: Ints) -> Ints:
        """Canvas pixels int64 [..., 2] of cells of a map."""
        return np.stack((flat // self.stride - self.border, flat % self.stride - self.border), axis=-1)


def tables_for(geometry: Geometry, margin: int) -> Tables:
    """The tables of ``geometry`` at one of its margins. Building them takes about 0.2 s; they are cached.

    Raises:
        ValueError: a first target can start at no angle, so no image exists.
    """
    return _tables(
        geometry.size,
        geometry.padding,
        geometry.seed_distance,
        geometry.paddle_length,
        margin,
        geometry.paddle_thickness,
        geometry.line_width,
        geometry.continuity,
        geometry.antialias,
    )


def ring_offsets(radius: int) -> Ints:
    """Candidate pixels of one extension relative to the pivot, int64 [C, 2], distinct.

    Angles k / r for k = 0 .. ceil(2 pi r) - 1. Quirk: the floor shifts the ring half a pixel to the upper left.
    """
    angle = np.arange(math.ceil(2 * math.pi * radius)) / radius
    points = np.stack((np.floor(radius * np.sin(angle)), np.floor(radius * np.cos(angle))), axis=-1)
    return np.unique(points.astype(np.int64), axis=0)


def bend_weights(travel: Floats, onward: Floats, continuity: float) -> Floats:
    """cos^2 of the bend, scaled by continuity, from each direction of travel to each candidate, float64 [S, C]."""
    delta = np.abs(onward[None, :] - travel[:, None])
    delta = np.minimum(delta, 2 * math.pi - delta)
    result: Floats = np.cos(np.minimum(continuity * delta, math.pi / 2)) ** 2
    return result


def probe_offsets(footprint: Bytes, length: int, margin: int) -> Ints:
    """Pixels tested before a seed is placed, relative to its tail, int64 [n, 2].

    All cells of the footprint that are exactly 255, within -(L+m+1) .. L+m-1. Quirk: they are then moved by (+1, +1),
    so the test is one pixel off from where the dash is drawn.
    """
    half = footprint.shape[0] // 2
    cells = np.argwhere(footprint == 255) - half
    inside = (cells >= -(length + margin + 1)).all(1) & (cells <= length + margin - 1).all(1)
    moved: Ints = cells[inside] + 1
    return moved


def is_viable(probes: Ints) -> bool:
    """Whether a seed of this angle can be placed at all: its probes meet each of the four closed quadrants.

    Quirk: if some pixel of the canvas has all its probes outside, the original's morphology routine returns its border
    sentinel there, and the generator reads that as "nothing available" for the angle. At 32 and 64 this leaves only
    seeds that start towards the upper left.
    """
    dy, dx = probes[:, 0], probes[:, 1]
    return all(bool(((sy * dy >= 0) & (sx * dx >= 0)).any()) for sy in (1, -1) for sx in (1, -1))


def _cells(stack: Bytes, stride: int, least: int) -> Cells:
    half = stack.shape[-1] // 2
    offsets, values = [], []
    for square in stack:
        y, x = np.nonzero(square >= least)
        offsets.append((y - half) * stride + (x - half))
        values.append(square[y, x])
    return Cells(_padded_rows(offsets), _padded_rows(values))


def _joined(first: Cells, second: Cells, shift_by: int) -> Cells:
    return Cells(
        np.concatenate((first.offsets, second.offsets + shift_by), axis=1),
        np.concatenate((first.values, second.values), axis=1),
    )


def _padded_rows(rows: list[NDArray[Number]]) -> NDArray[Number]:
    width = max(len(row) for row in rows)
    return np.stack([np.pad(row, (0, width - len(row)), mode="edge") for row in rows])


@lru_cache(maxsize=16)
def _tables(
    size: int,
    padding: int,
    seed_distance: int,
    length: int,
    margin: int,
    thickness: float,
    line_width: int,
    continuity: float,
    antialias: int,
) -> Tables:
    radius = length + margin
    half = radius + math.ceil(thickness)
    border = max(half + margin + 2, radius + length)
    stride = size + 2 * border

    degrees = np.array([math.radians(degree) for degree in DEGREES])
    ring = ring_offsets(radius)
    onward = np.arctan2(ring[:, 0], ring[:, 1])
    angles = np.concatenate((onward, degrees))
    # Later dashes are drawn backwards from their far end, seeds forwards from their tail.
    drawn_angles = np.concatenate(([flip(float(theta)) for theta in onward], degrees))
    strokes, footprints = kernels(
        drawn_angles, length=length, line_width=line_width, margin=margin, half=half, antialias=antialias
    )
    spread = dilate(np.pad(footprints, ((0, 0), (margin, margin), (margin, margin))), margin)

    seed_prints = footprints[len(ring) :]
    probes = tuple(probe_offsets(square, length, margin) for square in seed_prints)
    viable = np.array([is_viable(offsets) for offsets in probes])
    low = np.array([2 * seed_distance - offsets.min(0) for offsets in probes])
    high = np.array([size - 2 * seed_distance - offsets.max(0) for offsets in probes])
    first = np.flatnonzero(viable & (low < high).all(1))
    if not len(first):
        raise ValueError(
            f"no first target fits: size {size} leaves a square of side {size - 4 * seed_distance} beyond twice the "
            f"seed_distance {seed_distance}, smaller than a dash in every viable direction"
        )

    back = np.array([flip(float(theta)) for theta in degrees])
    occupancy = np.zeros((stride, stride), np.uint8)
    canvas = occupancy[border : border + size, border : border + size]
    canvas[:] = 255
    canvas[padding : size - padding, padding : size - padding] = 0
    dilated = np.full((stride, stride), 255, np.uint8)
    dilated[border : border + size, border : border + size] = dilate(canvas, margin)

    hit = _cells(footprints, stride, COLLISION - 255)
    ring_flat = ring[:, 0] * stride + ring[:, 1]
    return Tables(
        size=size,
        border=border,
        stride=stride,
        margin=margin,
        half=half,
        ring_radius=radius,
        candidates=len(ring),
        angles=angles,
        ring=ring,
        ring_flat=ring_flat,
        ring_in_dilated=ring_flat + stride * stride,
        weights=bend_weights(angles, onward, continuity),
        step=(length + 2 * margin) * _directions(angles),
        head=length * _directions(degrees),
        back=radius * _directions(back),
        strokes=strokes,
        footprints=footprints,
        hit=Cells(hit.offsets, (COLLISION - hit.values.astype(np.int64)).astype(np.uint8)),
        mark=_joined(_cells(footprints, stride, 1), _cells(spread, stride, 1), stride * stride),
        probes=probes,
        probes_flat=_padded_rows([offsets[:, 0] * stride + offsets[:, 1] for offsets in probes]),
        viable=viable,
        first_low=low,
        first_high=high,
        first=first,
        blank=np.concatenate((occupancy.ravel(), dilated.ravel())),
        free=1 - np.arange(256) / 255,
    )


def _directions(angles: Floats) -> Floats:
    # math.sin and numpy's vectorised sine may differ in the last bit, and the quirk of `shift` depends on that bit.
    return np.array([(math.sin(theta), math.cos(theta)) for theta in angles])
