"""Growth of contours as a distribution: extensions, first seeds, tails of distractors."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from sparseflash.pathfinder.contours import Contours, Lanes, extend, seed_contours
from sparseflash.pathfinder.distractors import DistractorSearch
from sparseflash.pathfinder.geometry import Geometry
from sparseflash.pathfinder.scene import searches
from sparseflash.pathfinder.tables import DEGREES, shift, tables_for


def test_extension_follows_the_weights() -> None:
    """One extension in 10,000 equal lanes: frequencies of the pixels against (1 - D / 255) cos^2, with retries."""
    geometry = Geometry.lra(64)
    tables = tables_for(geometry, 1)
    count = 10_000
    lanes = Lanes.empty(tables, 1)
    lanes.reset(1, tables.blank)
    # An obstacle beside the path makes some draws collide and lowers some weights.
    lanes.commit(tables.flat(np.array([[33, 36]])), np.array([tables.candidates + 270]))
    one = lanes.maps(0).copy()
    lanes = Lanes.empty(tables, count)
    lanes.reset(count, one)
    degree = DEGREES.index(0)
    tails = np.tile([32, 30], (count, 1))
    contours, _ = seed_contours(tables, np.arange(count), tails, np.full(count, degree))
    grown, survivors = extend(lanes, contours, np.random.default_rng(0))

    pivot = np.ceil(contours.pivot[0] + 7 * np.array([math.sin(0.0), math.cos(0.0)])).astype(int)
    occupancy, near = tables.canvas(one)[0], tables.canvas(one)[1]
    weight, collides = np.zeros(38), np.zeros(38, bool)
    for j, (dy, dx) in enumerate(tables.ring.tolist()):
        y, x = pivot[0] + dy, pivot[1] + dx
        bend = abs(math.atan2(dy, dx))
        weight[j] = (1 - near[y, x] / 255) * math.cos(min(1.8 * bend, math.pi / 2)) ** 2
        square, half = tables.footprints[j].astype(int), tables.half
        window = occupancy[y - half : y + half + 1, x - half : x + half + 1]
        collides[j] = (square + window).max() >= 459
    weight /= weight.sum()
    lost = weight[collides].sum()
    assert 0.05 < lost < 0.95, lost
    expected = np.where(collides, 0, weight) * (1 + lost + lost**2)
    assert abs(len(survivors) / count - expected.sum()) < 5 * math.sqrt(0.25 / count)
    seen = Counter(grown.state.tolist())
    assert set(seen) <= set(np.flatnonzero(expected).tolist())
    common = np.flatnonzero(expected * count > 5)
    observed = np.array([seen[j] for j in common])
    fit = stats.chisquare(observed, expected[common] / expected[common].sum() * observed.sum())
    assert fit.pvalue > 1e-3
    # The seed, not the new dash, is in M now.
    lane = int(grown.lane[0])
    maps = lanes.maps(lane)
    assert tables.canvas(maps)[0][32, 32] == 255
    assert len(grown.lane) == len(survivors)


def test_far_pivots_fail_without_leaving_the_map() -> None:
    tables = tables_for(Geometry.lra(256), 3)
    lanes = Lanes.empty(tables, 4)
    lanes.reset(4, tables.blank)
    pivots = np.array([[-300, 10], [10, 900], [-1, -1], [255, 255]])
    lane = np.arange(4)
    contours = Contours(lane, pivots, np.full(4, tables.candidates), lane * lanes.span + 5000)
    grown, survivors = extend(lanes, contours, np.random.default_rng(0))
    assert len(survivors) == len(grown.lane) == 0


def test_axis_aligned_displacement_survives_near_the_origin() -> None:
    """The quirk of `shift`: 1e-16 lifts a small coordinate and is absorbed by a large one."""
    tables = tables_for(Geometry.lra(32), 1)
    leftward = next(j for j, (dy, dx) in enumerate(tables.ring.tolist()) if dy == 0 and dx < 0)
    step = tables.step[leftward]
    assert 0 < step[0] < 1e-15
    rows = np.array([[1, 20], [7, 20], [8, 20], [20, 20]])
    assert shift(rows, step).tolist() == [[2, 16], [8, 16], [8, 16], [20, 16]]


def test_first_seeds_are_uniform_over_their_rectangle() -> None:
    geometry = Geometry.lra(32)
    pairs, _ = searches(geometry, 1)
    tables, rng = pairs.tables, np.random.default_rng(0)
    tails: list[tuple[int, int]] = []
    for _ in range(20):
        one, two = pairs._seeds(512, rng)
        degree = one.state - tables.candidates
        tail = tables.pixel(one.pixel - one.lane * pairs.lanes.span)
        assert np.isin(degree, tables.first).all()
        assert ((tail >= tables.first_low[degree]) & (tail < tables.first_high[degree])).all()
        for point, d in zip(tail, degree.tolist(), strict=True):
            probed = point + tables.probes[d]
            assert probed.min() >= 14
            assert probed.max() < 18
        apart = tables.pixel(two.pixel - two.lane * pairs.lanes.span) - tail
        assert (np.abs(np.hypot(apart[:, 0], apart[:, 1]) - 7) < 0.72).all()
        same = degree == tables.first[3]
        tails += [(y, x) for y, x in tail[same].tolist()]
    low, high = tables.first_low[tables.first[3]], tables.first_high[tables.first[3]]
    cells = int(np.prod(high - low))
    counts = Counter(tails)
    assert len(counts) == cells
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize("size", [32, 256])
def test_distractor_tails_are_uniform_over_the_available(size: int) -> None:
    """Guessing (256) and listing (32) draw from the same set: pixels whose probes are all free."""
    tables = tables_for(Geometry.lra(size), Geometry.lra(size).paddle_margins[0])
    search = DistractorSearch(tables)
    degree = int(np.flatnonzero(tables.viable)[0])
    maps = np.full(tables.blank.size, 255, np.uint8)
    occupancy = tables.canvas(maps)[0]
    hole = slice(size // 2 - 13, size // 2 + 13)
    occupancy[hole, hole] = 0
    free = maps[: tables.stride**2].reshape(tables.stride, tables.stride) < 77
    inside = occupancy < 77
    allowed = {
        (y, x)
        for y in range(size)
        for x in range(size)
        if all(
            y + dy < 0 or y + dy >= size or x + dx < 0 or x + dx >= size or inside[y + dy, x + dx]
            for dy, dx in tables.probes[degree].tolist()
        )
    }
    rng = np.random.default_rng(1)
    seen = Counter()  # type: Counter[tuple[int, int]]
    for _ in range(6 * len(allowed)):
        tail = search._tail(free, degree, rng)
        assert tail is not None
        seen[(int(tail[0]), int(tail[1]))] += 1
    assert set(seen) <= allowed
    assert stats.chisquare([seen[cell] for cell in sorted(allowed)]).pvalue > 1e-3
    occupancy[:] = 255
    assert search._tail(maps[: tables.stride**2].reshape(tables.stride, tables.stride) < 77, degree, rng) is None
