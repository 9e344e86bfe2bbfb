"""Growing contours on occupancy maps, many independent attempts side by side.

One attempt is a *lane*: it has its own occupancy map M and dilated map D. An extension of n lanes is a handful of
gathers over [n, candidates] and [n, cells]. Lanes that fail are removed from the index arrays; their maps are not
moved. Lanes are independent and identically distributed, so "the first lane that succeeds" has the same distribution as
trying one after another.

Dilation distributes over the maximum. D therefore stays the dilation of M if each commit writes the footprint to M and
the dilated footprint to D. Parts outside the canvas affect no result: D is 255 there and near the blocked frame anyway,
and the colliding cells of a dash are connected, so they meet the blocked frame before they leave the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.pathfinder.strokes import Bools, Bytes, Ints
from sparseflash.pathfinder.tables import Tables, shift

DRAWS = 3
"""Draws of a dash (and of an off-canvas seed) before the contour fails: max_paddle_retrial 2, plus the first."""
MIN_WEIGHT = 1e-4


@dataclass(slots=True)
class Lanes:
    """Maps of many lanes in one flat uint8 array: lane i owns ``[i * span, (i + 1) * span)``, M and then D."""

    tables: Tables
    cells: Bytes

    @classmethod
    def empty(cls, tables: Tables, count: int) -> Lanes:
        return cls(tables, np.empty(count * tables.blank.size, np.uint8))

    @property
    def span(self) -> int:
        return self.tables.blank.size

    def reset(self, count: int, maps: Bytes) -> None:
        """Copy one lane's maps, uint8 [span], into the first ``count`` lanes."""
        self.cells.reshape(-1, self.span)[:count] = maps

    def maps(self, lane: int) -> Bytes:
        """View of one lane's maps, uint8 [span]."""
        return self.cells[lane * self.span : (lane + 1) * self.span]

    def commit(self, pixel: Ints, state: Ints) -> None:
        """M <- max(M, footprint of ``state`` at ``pixel``), D likewise; ``pixel`` holds cells of distinct lanes."""
        index = pixel[:, None] + self.tables.mark.offsets.take(state, 0)
        self.cells[index] = np.maximum(self.cells.take(index), self.tables.mark.values.take(state, 0))


@dataclass(slots=True)
class Contours:
    """One growing contour in each of n lanes.

    ``lane`` is the lane's number, ``pivot`` int64 [n, 2] its canvas position, ``state`` the direction of travel and
    ``pixel`` the cell (in ``Lanes``) where the newest dash is drawn. The newest dash is *pending*: its footprint
    enters M only when the next dash of the same contour is placed.
    """

    lane: Ints
    pivot: Ints
    state: Ints
    pixel: Ints

    def __getitem__(self, keep: Ints) -> Contours:
        return Contours(self.lane.take(keep), self.pivot.take(keep, 0), self.state.take(keep), self.pixel.take(keep))


def seed_contours(tables: Tables, lane: Ints, tail: Ints, degree: Ints) -> tuple[Contours, Ints]:
    """Contours of one dash from tails int64 [n, 2] and degree indices, and the indices of those on the canvas.

    A seed dash starts at its tail and follows its angle; head = shift(tail, angle, L), pivot = shift(head,
    opposite angle, L + m), so that the pivot lies m pixels behind the tail. Head and pivot must be on the canvas.
    """
    head = shift(tail, tables.head[degree])
    pivot = shift(head, tables.back[degree])
    inside = _both_true((head >= 0) & (head < tables.size) & (pivot >= 0) & (pivot < tables.size))
    pixel = lane * tables.blank.size + tables.flat(tail)
    return Contours(lane, pivot, degree + tables.candidates, pixel), inside


def extend(lanes: Lanes, contours: Contours, rng: np.random.Generator) -> tuple[Contours, Ints]:
    """Add one dash to every contour. Returns the surviving contours and their indices in ``contours``.

    1. The pivot moves one period L + 2m along the direction of travel.
    2. Candidates are the pixels of the ring around it that lie on the canvas (D is 255 elsewhere).
    3. Their weights are (1 - D / 255) * cos^2(min(c * bend, pi / 2)); a sum below 1e-4 is a failure.
    4. Up to three times a pixel is drawn in proportion; its footprint, drawn back towards the pivot, must nowhere
       reach 459 together with M.
    5. The footprint of the *previous* dash is committed, and the new one becomes pending. Quirk: M therefore never
       holds the newest dash of a contour, and dashes k of two targets are never tested against each other.
    """
    tables = lanes.tables
    pivot = shift(contours.pivot, tables.step.take(contours.state, 0))
    # Beyond this reach every candidate is off the canvas or on its blocked frame, and the gathers would leave the map.
    reach = tables.border - tables.ring_radius
    alive = _both_true((pivot >= -reach) & (pivot < tables.size + reach))
    if not len(alive):
        return contours[alive], alive
    base = (contours.lane * lanes.span + tables.flat(pivot)).take(alive)
    near = lanes.cells.take(base[:, None] + tables.ring_in_dilated)
    weights = tables.free.take(near) * tables.weights.take(contours.state.take(alive), 0)
    cumulative = weights.cumsum(1)
    possible = (cumulative[:, -1] >= MIN_WEIGHT).nonzero()[0]
    if len(possible) < len(alive):
        alive, base, cumulative = alive.take(possible), base.take(possible), cumulative.take(possible, 0)

    chosen = np.full(len(alive), -1)
    unplaced = np.arange(len(alive))
    for _ in range(DRAWS):
        if not len(unplaced):
            break
        sums = cumulative.take(unplaced, 0)
        target = rng.random(len(unplaced)) * sums[:, -1]
        # A target equal to a cumulative sum picks the next pixel. random() < 1 keeps the product below the total.
        pick = (sums <= target[:, None]).sum(1)
        cells = (base.take(unplaced) + tables.ring_flat.take(pick))[:, None] + tables.hit.offsets.take(pick, 0)
        collides = (lanes.cells.take(cells) >= tables.hit.values.take(pick, 0)).any(1)
        chosen[unplaced] = np.where(collides, -1, pick)
        unplaced = unplaced[collides]
    placed = (chosen >= 0).nonzero()[0]
    alive, state = alive.take(placed), chosen.take(placed)
    if len(alive):
        lanes.commit(contours.pixel.take(alive), contours.state.take(alive))
    pixel = base.take(placed) + tables.ring_flat.take(state)
    return Contours(contours.lane.take(alive), pivot.take(alive, 0), state, pixel), alive


def _both_true(pairs: Bools) -> Ints:
    """Indices of the rows of bool [n, 2] that are true in both columns."""
    return (pairs[:, 0] & pairs[:, 1]).nonzero()[0]
