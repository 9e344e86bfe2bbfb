"""A slow second reading of the rules: it replays ground truth on whole canvases with scipy and plain loops."""

import math
from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from sparseflash.pathfinder.contours import Lanes
from sparseflash.pathfinder.distractors import DistractorSearch
from sparseflash.pathfinder.geometry import Geometry
from sparseflash.pathfinder.scene import Contour, Truth, make, searches
from sparseflash.pathfinder.strokes import Bytes, Ints, flip, kernels
from sparseflash.pathfinder.tables import tables_for

Point = tuple[int, int]
GEOMETRIES = {
    "32": Geometry.lra(32),
    "64-easy": Geometry.lra(64, "easy"),
    "128": Geometry.lra(128, "intermediate"),
    "256": Geometry.lra(256),
    "96/6": Geometry.curriculum(96, 6),
    "48/2": Geometry.curriculum(48, 2),
}


def shift(point: Point, theta: float, distance: float) -> Point:
    return math.ceil(point[0] + distance * math.sin(theta)), math.ceil(point[1] + distance * math.cos(theta))


def dilation(occupancy: Bytes, margin: int) -> Bytes:
    y, x = np.mgrid[-margin : margin + 1, -margin : margin + 1]
    result: Bytes = ndimage.maximum_filter(occupancy, footprint=y * y + x * x <= margin * margin, mode="constant")
    return result


@lru_cache(maxsize=4096)
def footprint_square(geometry: Geometry, margin: int, theta: float) -> Bytes:
    half = geometry.paddle_length + margin + math.ceil(geometry.paddle_thickness)
    _, footprints = kernels(
        np.array([theta]),
        length=geometry.paddle_length,
        line_width=geometry.line_width,
        margin=margin,
        half=half,
        antialias=geometry.antialias,
    )
    footprint: Bytes = footprints[0]
    return footprint


class Replay:
    """Occupancy built dash by dash; every rule that a dash must have met is asserted."""

    def __init__(self, truth: Truth) -> None:
        self.geometry, self.margin = truth.geometry, truth.margin
        self.size = truth.geometry.size
        self.occupancy = np.full((self.size, self.size), 255, np.uint8)
        inner = slice(truth.geometry.padding, self.size - truth.geometry.padding)
        self.occupancy[inner, inner] = 0
        self.after_targets = self.occupancy
        self.targets(truth)
        self.after_targets = self.occupancy.copy()
        for distractor in truth.distractors:
            self.distractor(distractor)

    def placed(self, point: Point, theta: float) -> Bytes:
        square = footprint_square(self.geometry, self.margin, theta)
        half = square.shape[0] // 2
        canvas = np.zeros((self.size + 2 * half,) * 2, np.uint8)
        canvas[point[0] : point[0] + 2 * half + 1, point[1] : point[1] + 2 * half + 1] = square
        return canvas[half : half + self.size, half : half + self.size]

    def commit(self, footprint: Bytes) -> None:
        self.occupancy = np.maximum(self.occupancy, footprint)

    def seed(self, contour: Contour) -> tuple[Point, Bytes]:
        tail = contour.tips[0]
        theta = float(contour.angles[0])
        assert math.isclose(math.degrees(theta), round(math.degrees(theta)), abs_tol=1e-9)
        length = self.geometry.paddle_length
        head = shift(tail, theta, length)
        pivot = shift(head, flip(theta), length + self.margin)
        assert all(0 <= c < self.size for c in (*head, *pivot))
        return pivot, self.placed(tail, theta)

    def extend(self, contour: Contour, k: int, pivot: Point, pending: Bytes) -> tuple[Point, Bytes]:
        """Dash k of a contour: checks it, commits dash k - 1, returns the new pivot and pending footprint."""
        length, m = self.geometry.paddle_length, self.margin
        before, theta = float(contour.angles[k - 1]), float(contour.angles[k])
        pivot = shift(pivot, before, length + 2 * m)
        radius = length + m
        ring = set()
        for step in range(math.ceil(2 * math.pi * radius)):
            y = pivot[0] + radius * math.sin(step / radius)
            x = pivot[1] + radius * math.cos(step / radius)
            if 0 <= y < self.size and 0 <= x < self.size:
                ring.add((math.floor(y), math.floor(x)))
        y, x = contour.pixels[k].tolist()
        assert (y, x) in ring
        assert math.isclose(theta, math.atan2(y - pivot[0], x - pivot[1]), abs_tol=1e-12)
        bend = min(abs(theta - before), 2 * math.pi - abs(theta - before))
        assert self.geometry.continuity * bend < math.pi / 2
        assert dilation(self.occupancy, m)[y, x] < 255
        footprint = self.placed((y, x), flip(theta))
        assert (self.occupancy.astype(int) + footprint).max() < 459
        self.commit(pending)
        return pivot, footprint

    def targets(self, truth: Truth) -> None:
        one, two = truth.targets
        s = self.geometry.seed_distance
        offset = np.subtract(two.tips[0], one.tips[0])
        assert abs(np.hypot(*offset) - s) <= math.sqrt(0.5) + 1e-9
        state_one, state_two = self.seed(one), self.seed(two)
        for k in range(1, self.geometry.contour_length):
            state_one = self.extend(one, k, *state_one)
            state_two = self.extend(two, k, *state_two)
        self.commit(state_two[1])

    def distractor(self, contour: Contour) -> None:
        y, x = contour.tips[0]
        theta = float(contour.angles[0])
        square = footprint_square(self.geometry, self.margin, theta)
        reach, half = self.geometry.paddle_length + self.margin, square.shape[0] // 2
        for dy in range(-reach - 1, reach):
            for dx in range(-reach - 1, reach):
                if square[half + dy, half + dx] == 255:
                    assert self.occupancy[y + dy + 1, x + dx + 1] < 77
        state = self.seed(contour)
        for k in range(1, self.geometry.distractor_length):
            state = self.extend(contour, k, *state)
        self.commit(state[1])


@pytest.mark.parametrize("name", GEOMETRIES)
def test_replay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dash obeys the rules, and the maps after targets and after distractors are exactly the oracle's."""
    before: list[Bytes] = []
    after: list[Bytes] = []
    place = DistractorSearch.place

    def recorded(
        self: DistractorSearch, maps: Bytes, count: int, length: int, rng: np.random.Generator
    ) -> list[tuple[Ints, Ints]]:
        before.append(self.tables.canvas(maps)[0].copy())
        found = place(self, maps, count, length, rng)
        after.append(self.tables.canvas(maps)[0].copy())
        return found

    monkeypatch.setattr(DistractorSearch, "place", recorded)
    for index in range(4):
        truth = make(GEOMETRIES[name], 3, index)
        replay = Replay(truth)
        np.testing.assert_array_equal(before[index], replay.after_targets)
        np.testing.assert_array_equal(after[index], replay.occupancy)
        assert (truth.label == 1) == any(set(truth.markers) <= set(target.tips) for target in truth.targets)


@pytest.mark.parametrize(("size", "margin"), [(32, 1), (64, 1), (128, 2), (128, 3), (256, 3)])
def test_dilated_map_follows_every_commit(size: int, margin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry.lra(size)
    tables = tables_for(geometry, margin)
    checked = 0
    commit = Lanes.commit

    def verified(self: Lanes, pixel: Ints, state: Ints) -> None:
        nonlocal checked
        commit(self, pixel, state)
        for lane in np.unique(pixel // self.span)[:3]:
            maps = self.maps(int(lane))
            np.testing.assert_array_equal(tables.canvas(maps)[1], dilation(tables.canvas(maps)[0], margin))
            checked += 1

    monkeypatch.setattr(Lanes, "commit", verified)
    pairs, distractors = searches(geometry, margin)
    rng = np.random.default_rng(size)
    pairs._round(16, rng)
    maps = tables.blank.copy()
    placed = distractors.place(maps, 6, 4, rng)
    assert checked > 20
    assert placed
