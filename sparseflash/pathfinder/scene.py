"""The ground truth of an image from its random stream: what is drawn where, before any pixel is rendered.

Order of draws: label, margin, the pair of targets (repeated without limit; label and margin stay), distractors, origin
contour. With label 1 the discs are on both ends of the origin contour, with label 0 on one end of each target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sparseflash.pathfinder.distractors import DistractorSearch
from sparseflash.pathfinder.geometry import Geometry
from sparseflash.pathfinder.strokes import Floats, Ints
from sparseflash.pathfinder.tables import Tables, tables_for
from sparseflash.pathfinder.targets import PairSearch


@dataclass(frozen=True, slots=True, eq=False)
class Contour:
    """One dashed contour of n dashes.

    Attributes:
        pixels: int64 [n, 2], (y, x): the tail of the first dash, then the far end of each later one.
        angles: float64 [n], direction of travel in radians, (dy, dx) = (sin, cos), y downwards.
        states: int64 [n], the rows of the stroke table.
    """

    pixels: Ints
    angles: Floats
    states: Ints

    @property
    def tips(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Origin tip (tail of the first dash) and terminal tip (far end of the last)."""
        first, last = self.pixels[[0, -1]].tolist()
        return (first[0], first[1]), (last[0], last[1])


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Everything about one image.

    Attributes:
        geometry: the distribution it was drawn from.
        label: 1 if both markers are on the ends of one target, else 0.
        margin: this image's paddle margin m.
        attempts: attempts at a pair of targets, including dead ones (and those of rejected pairs if the marker
            distance is matched).
        origin: 0 or 1, the target whose origin tip carries a marker.
        targets: the two long contours.
        distractors: the short contours that fit.
    """

    geometry: Geometry
    label: int
    margin: int
    attempts: int
    origin: int
    targets: tuple[Contour, Contour]
    distractors: tuple[Contour, ...]

    @property
    def contours(self) -> tuple[Contour, ...]:
        """Targets first, then distractors."""
        return (*self.targets, *self.distractors)

    @property
    def markers(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(y, x) of the two markers: the origin tip of the origin contour, and a terminal tip."""
        end = self.origin if self.label else 1 - self.origin
        return self.targets[self.origin].tips[0], self.targets[end].tips[1]

    @property
    def marker_distance(self) -> float:
        """Euclidean distance between the two marker pixels."""
        return math.dist(*self.markers)

    @property
    def markers_on(self) -> tuple[int, ...]:
        """For each of ``contours``, how many markers are on its ends: 0, 1 or 2."""
        targets = (2 * (1 - self.origin), 2 * self.origin) if self.label else (1, 1)
        return targets + (0,) * len(self.distractors)


@dataclass(frozen=True, slots=True, eq=False)
class DistanceMatch:
    """Acceptance probabilities that make the marker distance independent of the label.

    Attributes:
        edges: for each margin of the geometry, the inner bin edges, float64 [bins - 1], pixels.
        accept: for each margin, the probability of keeping a pair of either label, float64 [2, bins].
    """

    edges: tuple[Floats, ...]
    accept: tuple[Floats, ...]

    def probability(self, which: int, label: int, distance: float | Floats) -> Floats:
        """Probability of keeping a pair with margin number ``which``, ``label`` and marker distance(s) ``distance``."""
        result: Floats = self.accept[which][label][np.searchsorted(self.edges[which], distance)]
        return result


def stream(geometry: Geometry, seed: int, index: int, *extra: int) -> np.random.Generator:
    """The random stream of image ``index``: SeedSequence((seed, size, length, index)) for an LRA preset.

    Any other geometry adds two words that identify it, so that no two tasks share a stream.
    """
    words = (seed, geometry.size, geometry.contour_length, index, *geometry.stream_words(), *extra)
    return np.random.default_rng(np.random.SeedSequence(words))


def label_and_margin(geometry: Geometry, rng: np.random.Generator) -> tuple[int, int]:
    """The first two draws of an image: its label, and the number of its margin in ``paddle_margins``."""
    return int(rng.integers(2)), int(rng.integers(len(geometry.paddle_margins)))


@lru_cache(maxsize=8)
def searches(geometry: Geometry, margin: int) -> tuple[PairSearch, DistractorSearch]:
    """The two searches of a geometry at one margin, with their maps."""
    tables = tables_for(geometry, margin)
    return PairSearch(tables, geometry.seed_distance, geometry.contour_length), DistractorSearch(tables)


def make(geometry: Geometry, seed: int, index: int, match: DistanceMatch | None = None) -> Truth:
    """Ground truth of image ``index``; depends on the arguments alone."""
    rng = stream(geometry, seed, index)
    label, which = label_and_margin(geometry, rng)
    margin = geometry.paddle_margins[which]
    pairs, distractor_search = searches(geometry, margin)
    attempts = 0
    origin: int | None = None
    while True:
        pair = pairs.one(rng)
        attempts += pair.attempts
        if match is None:
            break
        # With matched distances the origin contour decides the distance, so it is drawn before the distractors.
        origin = int(rng.integers(2))
        tail = pair.pixels[origin, 0].tolist()
        end = pair.pixels[origin if label else 1 - origin, -1].tolist()
        if rng.random() < match.probability(which, label, math.dist(tail, end)):
            break
    tables = pairs.tables
    distractors = distractor_search.place(pair.maps, geometry.num_distractors, geometry.distractor_length, rng)
    if origin is None:
        origin = int(rng.integers(2))
    first, second = (_contour(tables, pair.pixels[k], pair.states[k]) for k in range(2))
    return Truth(
        geometry=geometry,
        label=label,
        margin=margin,
        attempts=attempts,
        origin=origin,
        targets=(first, second),
        distractors=tuple(_contour(tables, pixels, states) for pixels, states in distractors),
    )


def _contour(tables: Tables, pixels: Ints, states: Ints) -> Contour:
    return Contour(pixels=pixels, angles=tables.angles[states], states=states)
