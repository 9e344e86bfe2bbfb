"""What the distance between the two markers reveals about the label, and how to remove that information.

In positive images the markers are about one contour length apart; in negative images their distances vary more. With
short contours the label can therefore be guessed without tracing. Each pair of targets gives two distances of either
kind. Matching and baseline use positions alone, so nothing is rendered.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sparseflash.pathfinder.geometry import Geometry, whole_number
from sparseflash.pathfinder.scene import DistanceMatch, searches, stream
from sparseflash.pathfinder.strokes import Floats

MATCH_PAIRS = 8192
_MATCH_BINS = 40
_RULE_BINS = 24

# Stream indices of this module start here, above those of images, which are below 2 ** 32.
_STREAM = 1 << 40


def distances(geometry: Geometry, which: int, pairs: int, seed: int, purpose: int) -> tuple[Floats, Floats]:
    """Marker distances of negative and of positive images, float64 [2 * pairs] each, for margin number ``which``."""
    rng = stream(geometry, seed, _STREAM + which, purpose)
    search, _ = searches(geometry, geometry.paddle_margins[which])
    pixels = search.many(pairs, rng).pixels
    tails, ends = pixels[:, :, 0], pixels[:, :, -1]
    apart = np.linalg.norm(tails - ends[:, ::-1], axis=-1).ravel()
    along = np.linalg.norm(tails - ends, axis=-1).ravel()
    return apart, along


@lru_cache(maxsize=16)
def match_table(geometry: Geometry, pairs: int = MATCH_PAIRS) -> DistanceMatch:
    """Acceptance probabilities min(p1, p0) / p_label over bins of equal mass, estimated once from ``pairs`` pairs.

    The estimate depends on the geometry alone. Each margin has an estimate of its own, because an image keeps its
    margin when its pair is redrawn.
    """
    edges, accept = [], []
    for which in range(len(geometry.paddle_margins)):
        kinds = distances(geometry, which, pairs, 0, 0)
        inner = _edges(np.concatenate(kinds), _MATCH_BINS)
        mass = np.stack([_mass(kind, np.ones(len(kind)), inner) for kind in kinds])
        edges.append(inner)
        accept.append(mass.min(0) / np.maximum(mass, 1e-12))
    return DistanceMatch(tuple(edges), tuple(accept))


def marker_distance_baseline(
    size: int = 256,
    level: str = "hard",
    *,
    geometry: Geometry | None = None,
    pairs: int = 2000,
    seed: int = 0,
    match_distance: bool = False,
) -> float:
    """Accuracy of the best rule that uses only the distance between the two markers.

    The rule (the likelier label in each of 24 distance bins) is learned from one set of ``pairs`` pairs and scored on
    another of the same size. Report it beside any accuracy on short contours: at 256 it is about 85, 77 and 63 % for
    contours of 6, 9 and 14 dashes.

    Args:
        size: side of an LRA preset: 32, 64, 128 or 256.
        level: easy, intermediate or hard.
        geometry: replaces ``size`` and ``level``.
        pairs: pairs of targets in each of the two sets; half as many for each of two margins.
        seed: of the two sets.
        match_distance: score images that are generated with ``match_distance=True``; about 50 %.

    Returns:
        Expected share of correct answers with balanced labels, 0..1. Its standard error is about
        ``0.35 / sqrt(pairs)``.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
        RuntimeError: the geometry yields no pairs.

    Example:
        >>> from sparseflash import pathfinder
        >>> easy = pathfinder.Geometry.curriculum(64, 3)
        >>> pathfinder.marker_distance_baseline(geometry=easy, pairs=400) > 0.6
        True
    """
    chosen = resolve(size, level, geometry)
    pairs = whole_number("pairs", pairs, 100)
    seed = seed_word("seed", seed)
    match = match_table(chosen) if match_distance else None
    train, test = (_weighted(chosen, pairs, seed, purpose, match) for purpose in (1, 2))
    inner = _edges(np.concatenate([kind for kind, _ in train]), _RULE_BINS)
    predicts_one = _mass(*train[1], inner) > _mass(*train[0], inner)
    right = [_mass(*kind, inner) for kind in test]
    return float((right[1][predicts_one].sum() + right[0][~predicts_one].sum()) / 2)


def resolve(size: int, level: str, geometry: Geometry | None) -> Geometry:
    """The geometry that the arguments of a public function select.

    Raises:
        TypeError: ``geometry`` is not a Geometry, ``size`` not a whole number, or ``level`` not a string.
        ValueError: unknown size or level, or ``size`` and ``geometry`` contradict each other.
    """
    if geometry is None:
        if not isinstance(level, str):
            raise TypeError(f"level must be a string, got {level!r}")
        return Geometry.lra(whole_number("size", size, 1), level)
    if not isinstance(geometry, Geometry):
        raise TypeError(f"geometry must be a pathfinder.Geometry, got {geometry!r}")
    if size not in (256, geometry.size):
        raise ValueError(f"size {size!r} contradicts the geometry's {geometry.size}; leave it out")
    return geometry


def seed_word(name: str, value: object) -> int:
    """``value`` as one 32-bit word of a seed sequence."""
    result = whole_number(name, value, 0)
    if result >= 1 << 32:
        raise ValueError(f"{name} must be below 2**32, got {value!r}")
    return result


Weighted = tuple[Floats, Floats]


def _weighted(
    geometry: Geometry, pairs: int, seed: int, purpose: int, match: DistanceMatch | None
) -> tuple[Weighted, Weighted]:
    """Distances and weights of negatives and positives; every margin and label has the same total weight."""
    margins = len(geometry.paddle_margins)
    parts: tuple[list[Weighted], list[Weighted]] = ([], [])
    for which in range(margins):
        for label, kind in enumerate(distances(geometry, which, -(-pairs // margins), seed, purpose)):
            weight = np.ones(len(kind)) if match is None else match.probability(which, label, kind)
            parts[label].append((kind, weight / weight.sum()))
    negatives, positives = (
        (np.concatenate([d for d, _ in part]), np.concatenate([w for _, w in part])) for part in parts
    )
    return negatives, positives


def _edges(values: Floats, bins: int) -> Floats:
    """Inner edges of bins of equal mass, float64 [bins - 1]."""
    result: Floats = np.quantile(values, np.arange(1, bins) / bins)
    return result


def _mass(values: Floats, weights: Floats, inner: Floats) -> Floats:
    """Share of the weight in each bin, float64 [len(inner) + 1]."""
    share = weights / weights.sum()
    result: Floats = np.bincount(np.searchsorted(inner, values), share, len(inner) + 1).astype(np.float64)
    return result
