"""Images and labels in memory: ``generate`` and ``generate_with_truth``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from sparseflash.pathfinder.distance import match_table, resolve, seed_word
from sparseflash.pathfinder.geometry import Geometry, whole_number
from sparseflash.pathfinder.render import render
from sparseflash.pathfinder.scene import DistanceMatch, Truth, make
from sparseflash.pathfinder.strokes import Bytes, Ints
from sparseflash.pathfinder.tables import tables_for
from sparseflash.pathfinder.workers import run_tasks

_TASK = 32  # images


def generate(
    size: int = 256,
    count: int = 8,
    seed: int = 0,
    *,
    level: str = "hard",
    start: int = 0,
    geometry: Geometry | None = None,
    match_distance: bool = False,
    workers: int = 1,
) -> tuple[Bytes, Ints]:
    """Pathfinder images ``start`` .. ``start + count - 1`` of a seed, and their labels.

    Two long dashed contours, several short ones and two discs on black; the label says whether the discs are on the
    two ends of one contour. Image i depends on (seed, geometry, i) alone: neither ``count`` nor ``workers`` changes
    it, and a split of generated data is a range of indices.

    The task is that of Linsley et al. 2018, *Learning long-range spatial dependencies with horizontal gated recurrent
    units*; the parameters are those of Tay et al. 2021, *Long Range Arena* (128 is Path-X). The random numbers are
    not those of the original generator: the distribution is the same, the images are not.

    Args:
        size: side H of an LRA preset: 32, 64, 128 or 256 pixels.
        count: number of images.
        seed: below 2**32.
        level: easy, intermediate or hard: contours of 6, 9 or 14 dashes.
        start: index of the first image.
        geometry: replaces ``size`` and ``level``; see ``Geometry.curriculum`` and ``dataclasses.replace``.
        match_distance: redraw pairs so that the distance between the markers does not depend on the label (not part
            of the LRA task). First estimates the distances of about 8,000 pairs, once per process: this takes
            seconds, but minutes for the hard level at 64.
        workers: number of processes. More than one needs a script guarded by ``if __name__ == "__main__":``.

    Returns:
        Images uint8 [count, H, H], row-major, y downwards, and labels int64 [count], 0 or 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, or ``size`` contradicts ``geometry``.
        RuntimeError: a worker died, or the geometry yields no pairs of contours.

    Example:
        >>> from sparseflash import pathfinder
        >>> images, labels = pathfinder.generate(size=256, count=2, seed=0)
        >>> images.shape, images.dtype.name, labels.shape
        ((2, 256, 256), 'uint8', (2,))
    """
    chosen = resolve(size, level, geometry)
    images, labels, _ = _collect(chosen, count, seed, start, match_distance, workers)
    return images, labels


def generate_with_truth(
    size: int = 256,
    count: int = 8,
    seed: int = 0,
    *,
    level: str = "hard",
    start: int = 0,
    geometry: Geometry | None = None,
    match_distance: bool = False,
    workers: int = 1,
) -> tuple[Bytes, Ints, list[Truth]]:
    """The images and labels of :func:`generate`, and the ground truth of each image.

    Args:
        size: as for :func:`generate`.
        count: as for :func:`generate`.
        seed: as for :func:`generate`.
        level: as for :func:`generate`.
        start: as for :func:`generate`.
        geometry: as for :func:`generate`.
        match_distance: as for :func:`generate`.
        workers: as for :func:`generate`.

    Returns:
        Images uint8 [count, H, H], labels int64 [count], and ``count`` :class:`Truth` objects: markers, tips and
        (pixel, angle) lists of every contour, margin, attempts. ``contour_strokes`` and ``curve_targets`` draw from
        them.

    Raises:
        TypeError, ValueError, RuntimeError: as for :func:`generate`.

    Example:
        >>> from sparseflash import pathfinder
        >>> _, labels, truths = pathfinder.generate_with_truth(32, 1)
        >>> truths[0].label == int(labels[0]), len(truths[0].targets[0].pixels)
        (True, 14)
    """
    chosen = resolve(size, level, geometry)
    return _collect(chosen, count, seed, start, match_distance, workers)


def draw(
    geometry: Geometry, seed: int, indices: Sequence[int] | Ints, match_distance: bool = False
) -> tuple[Bytes, Ints, list[Truth]]:
    """Like :func:`generate_with_truth`, for any indices in any order, in this process.

    Args:
        geometry: the distribution.
        seed: below 2**32.
        indices: of the images, at least one, each below 2**32.
        match_distance: as for :func:`generate`.

    Example:
        >>> from sparseflash.pathfinder import Geometry
        >>> images, labels, truths = draw(Geometry.lra(32), 0, [7, 3])
        >>> images.shape, (images[0] == generate(32, 1, start=7)[0][0]).all().item()
        ((2, 32, 32), True)
    """
    images, truths = _draw_images(geometry, seed_word("seed", seed), prepare(geometry, match_distance), indices)
    return images, np.array([truth.label for truth in truths], np.int64), truths


def prepare(geometry: Geometry, match_distance: bool) -> DistanceMatch | None:
    """Build what tasks of a geometry need; an impossible geometry fails here, before any task starts."""
    for margin in geometry.paddle_margins:
        tables_for(geometry, margin)
    return match_table(geometry) if match_distance else None


def index_range(start: object, count: object, least: int) -> range:
    """Image indices ``start`` .. ``start + count - 1``, each one word of a seed sequence."""
    first, number = whole_number("start", start, 0), whole_number("count", count, least)
    if first + number > 1 << 32:
        raise ValueError(f"start + count must not exceed 2**32, got {first} + {number}")
    return range(first, first + number)


def _collect(
    geometry: Geometry, count: int, seed: int, start: int, match_distance: bool, workers: int
) -> tuple[Bytes, Ints, list[Truth]]:
    indices, seed, workers = index_range(start, count, 0), seed_word("seed", seed), whole_number("workers", workers, 1)
    match = prepare(geometry, match_distance)
    images = np.empty((len(indices), geometry.size, geometry.size), np.uint8)
    labels = np.empty(len(indices), np.int64)
    truths: list[Truth] = []
    step = max(1, min(_TASK, -(-len(indices) // workers)))
    tasks = [indices[at : at + step] for at in range(0, len(indices), step)]
    for drawn, drawn_truths in run_tasks(partial(_draw_images, geometry, seed, match), tasks, workers):
        rows = slice(len(truths), len(truths) + len(drawn))
        images[rows] = drawn
        labels[rows] = [truth.label for truth in drawn_truths]
        truths += drawn_truths
    return images, labels, truths


def _draw_images(
    geometry: Geometry, seed: int, match: DistanceMatch | None, indices: Sequence[int] | Ints
) -> tuple[Bytes, list[Truth]]:
    truths = [make(geometry, seed, int(index), match) for index in indices]
    return np.stack([render(truth) for truth in truths]), truths
