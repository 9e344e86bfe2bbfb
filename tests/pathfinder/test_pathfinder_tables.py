"""Kernels, viable angles and candidates against the specification and against Pillow."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from sparseflash.pathfinder.geometry import LADDER, LEVELS, Geometry
from sparseflash.pathfinder.strokes import Bytes, disc, flip, lanczos_reduce, marker
from sparseflash.pathfinder.tables import DEGREES, Tables, ring_offsets, tables_for

CASES = [(32, 1), (64, 1), (128, 2), (128, 3), (256, 3)]


def tables(size: int, margin: int) -> Tables:
    return tables_for(Geometry.lra(size), margin)


@pytest.mark.parametrize(
    ("size", "margin", "dead"),
    [
        (32, 1, set(DEGREES) - set(range(-150, -120))),
        (64, 1, set(DEGREES) - set(range(-180, -135)) - set(range(-134, -84))),
        (128, 2, set(range(-59, -53))),
        (128, 3, set[int]()),
        (256, 3, set[int]()),
    ],
)
def test_viable_angles(size: int, margin: int, dead: set[int]) -> None:
    viable = tables(size, margin).viable
    assert {degree for degree, alive in zip(DEGREES, viable, strict=True) if not alive} == dead


@pytest.mark.parametrize(("radius", "samples", "pixels"), [(3, 19, 18), (6, 38, 38), (7, 44, 41), (8, 51, 49)])
def test_candidate_counts(radius: int, samples: int, pixels: int) -> None:
    assert math.ceil(2 * math.pi * radius) == samples
    points = {
        (math.floor(radius * math.sin(k / radius)), math.floor(radius * math.cos(k / radius))) for k in range(samples)
    }
    assert len(points) == pixels
    assert {(y, x) for y, x in ring_offsets(radius).tolist()} == points


def pillow_kernels(geometry: Geometry, margin: int, theta: float) -> tuple[Bytes, Bytes]:
    """Stroke and footprint built step by step with Pillow's own line and Lanczos."""
    a, length = geometry.antialias, geometry.paddle_length
    half = length + math.ceil(geometry.paddle_thickness) + margin
    centre, side = half * a, 2 * half * a + 1
    end_y = math.ceil(centre + length * a * math.sin(theta))
    end_x = math.ceil(centre + length * a * math.cos(theta))
    picture = Image.new("L", (side, side))
    ImageDraw.Draw(picture).line((centre, centre, end_x, end_y), fill=255, width=round(geometry.paddle_thickness * a))
    reach = margin * a
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    fat = ndimage.maximum_filter(np.asarray(picture), footprint=y * y + x * x <= reach * reach, mode="constant")
    shape, lanczos = (2 * half + 1, 2 * half + 1), Image.Resampling.LANCZOS
    return np.asarray(picture.resize(shape, lanczos)), np.asarray(Image.fromarray(fat).resize(shape, lanczos))


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_kernels_equal_pillow(size: int, margin: int) -> None:
    table, geometry = tables(size, margin), Geometry.lra(size)
    for state, theta in enumerate(table.angles.tolist()):
        drawn = flip(theta) if state < table.candidates else theta
        stroke, footprint = pillow_kernels(geometry, margin, drawn)
        np.testing.assert_array_equal(table.strokes[state], stroke)
        np.testing.assert_array_equal(table.footprints[state], footprint)


def test_lanczos_equals_pillow_on_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (61, 45), dtype=np.uint8)
    for shape in ((31, 23), (20, 45), (61, 7)):
        expected = np.asarray(Image.fromarray(noise).resize((shape[1], shape[0]), Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(lanczos_reduce(noise, shape), expected)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_marker_crop_equals_full_and_pillow(size: int) -> None:
    geometry = Geometry.lra(size)
    positions = [(0, 0), (1, size - 1), (size // 2, size // 3), (size - 3, 4), (geometry.padding, size // 2)]
    for y, x in positions:
        a, radius = geometry.antialias, geometry.marker_radius
        crop, (top, left) = marker(y, x, size=size, radius=radius, antialias=a)
        full, corner = marker(y, x, size=size, radius=radius, antialias=a, full=True)
        i, j = np.mgrid[: size * a, : size * a]
        big = np.where((i - y * a) ** 2 + (j - x * a) ** 2 <= (radius * a) ** 2, 255, 0).astype(np.uint8)
        direct = np.asarray(Image.fromarray(big).resize((size, size), Image.Resampling.LANCZOS))
        assert corner == (0, 0)
        np.testing.assert_array_equal(full, direct)
        placed = np.zeros_like(full)
        placed[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        np.testing.assert_array_equal(placed, full)


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_cells_are_the_kernels(size: int, margin: int) -> None:
    table = tables(size, margin)
    area = table.stride**2
    for state in range(0, len(table.angles), 7):
        blank = np.zeros(2 * area, np.uint8)
        centre = table.flat(np.array([size // 2, size // 2]))
        blank[centre + table.mark.offsets[state]] = table.mark.values[state]
        footprint, spread = blank.reshape(2, table.stride, table.stride)
        at, half = table.border + size // 2, table.half
        window = slice(at - half, at + half + 1)
        np.testing.assert_array_equal(footprint[window, window], table.footprints[state])
        assert footprint.sum(dtype=int) == table.footprints[state].sum(dtype=int)
        y, x = np.mgrid[-margin : margin + 1, -margin : margin + 1]
        expected = ndimage.maximum_filter(footprint, footprint=y * y + x * x <= margin * margin, mode="constant")
        np.testing.assert_array_equal(spread, expected)


@pytest.mark.parametrize(("size", "margin"), CASES)
def test_colliding_cells_are_connected(size: int, margin: int) -> None:
    """Why nothing off the canvas can decide: a connected blob that reaches out there crosses the blocked ring."""
    table = tables(size, margin)
    eight = np.ones((3, 3))
    for state, footprint in enumerate(table.footprints):
        assert ndimage.label(footprint >= 204, eight)[1] == 1, state


def test_disc_is_euclidean() -> None:
    assert len(disc(3)) == 29
    assert set(disc(1)) == {(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)}


@pytest.mark.parametrize(
    ("level", "length", "counts"),
    [("easy", 2, (10, 11, 17, 15)), ("intermediate", 3, (6, 7, 11, 10)), ("hard", 4, (5, 5, 8, 7))],
)
def test_lra_levels(level: str, length: int, counts: tuple[int, ...]) -> None:
    for size, count in zip((32, 64, 128, 256), counts, strict=True):
        geometry = Geometry.lra(size, level)
        assert (geometry.contour_length, geometry.folder) == (LEVELS[level][1], LEVELS[level][0])
        assert (geometry.distractor_length, geometry.num_distractors) == (length, count)
        assert geometry.stream_words() == ()


def test_ladder_shares_the_256_dash() -> None:
    rungs = [(g.size, g.contour_length, g.seed_distance, g.padding, g.num_distractors) for g in LADDER]
    assert rungs == [
        (64, 3, 12, 1, 2),
        (64, 4, 10, 1, 2),
        (96, 6, 14, 1, 3),
        (128, 9, 14, 1, 4),
        (160, 14, 24, 1, 4),
        (192, 14, 20, 8, 5),
        (256, 14, 27, 22, 7),
    ]
    assert LADDER[-1] == Geometry.lra(256, "hard")
    assert len({g.stream_words() for g in LADDER}) == len(LADDER)
    small = Geometry.curriculum(48, 2)
    assert (small.seed_distance, small.distractor_length, small.num_distractors) == (8, 1, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"paddle_thickness": 0.7}, ValueError, "whole number"),
        ({"padding": 0}, ValueError, "padding"),
        ({"paddle_margins": ()}, ValueError, "margin"),
        ({"paddle_margins": 3}, TypeError, "paddle_margins"),
        ({"contour_length": 1}, ValueError, "contour_length"),
        ({"contour_length": 6.0}, TypeError, "contour_length"),
        ({"continuity": math.nan}, ValueError, "continuity"),
        ({"seed_distance": 64}, ValueError, "exceed"),
        ({"seed_distance": 6}, ValueError, "seed_distance"),
        ({"num_distractors": -1}, ValueError, "num_distractors"),
        ({"marker_radius": "5"}, TypeError, "marker_radius"),
        ({"size": True}, TypeError, "size"),
    ],
)
def test_geometry_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        replace(Geometry.lra(256), **change)  # type: ignore[arg-type]


def test_impossible_canvas_is_refused() -> None:
    # Every dash is 14 pixels wide here; the seed square has side 2.
    with pytest.raises(ValueError, match="no first target fits"):
        tables_for(replace(Geometry.lra(256), size=62, seed_distance=15, padding=1), 3)
    for size, level in ((48, "hard"), (256, "harder")):
        with pytest.raises(ValueError, match=r"LRA sizes|level must"):
            Geometry.lra(size, level)
