"""The two target contours: attempts until one pair is complete.

One attempt of the specification: fresh maps; seed C1; seed C2; for k = 1 .. N-1 extend C1, then C2; any failure ends
the attempt. Attempts run as lanes, in rounds of growing size: one in 8 (at 256) to one in 4,000 (at 64) succeeds.

* Seed C1: an angle of 360, failing if it is not viable; the tail uniform over the rectangle in which all probes keep
  2s from the border. Attempts at angles that cannot start are not run, only counted: if v of 360 angles can start,
  the number of dead attempts before each live one is geometric. The distribution is the same, at a twelfth of the work
  (at 32).
* Seed C2: any angle, the tail at distance s from C1's in a direction of whole degrees, rounded half to even. Quirk:
  no collision test at all, not even against C1.
* Quirk: at the end C2's last footprint is committed and C1's never is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.pathfinder.contours import DRAWS, Contours, Lanes, extend, seed_contours
from sparseflash.pathfinder.strokes import Bytes, Ints
from sparseflash.pathfinder.tables import Tables


class NoPairError(RuntimeError, ValueError):
    """The geometry practically never yields a pair of contours."""


MAX_ATTEMPTS = 20_000_000
"""Failed attempts after which a geometry counts as impossible; the hardest LRA preset needs 4,000 per pair."""

_ROUND_BYTES = 1 << 23  # of the maps of all lanes


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """n complete pairs: canvas pixels int64 [n, 2, N, 2] and states int64 [n, 2, N], the seeds first."""

    pixels: Ints
    states: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """One complete pair, the number of attempts, and the maps for the distractors."""

    pixels: Ints  # [2, N, 2]
    states: Ints  # [2, N]
    attempts: int
    maps: Bytes  # a view, valid until the next search


class PairSearch:
    """Draws pairs. Owns the maps of its lanes, so that many images need one allocation."""

    def __init__(self, tables: Tables, seed_distance: int, length: int) -> None:
        self.tables, self.seed_distance, self.length = tables, seed_distance, length
        self.max_lanes = 1 << int(np.clip(np.log2(_ROUND_BYTES / tables.blank.size), 4, 9))
        self.lanes = Lanes.empty(tables, self.max_lanes)
        self.start_share = len(tables.first) / len(tables.viable)

    def one(self, rng: np.random.Generator) -> Pair:
        """The next pair.

        Raises:
            RuntimeError: ``MAX_ATTEMPTS`` attempts failed.
        """
        tried, count = 0, max(8, self.max_lanes // 16)
        while True:
            winners, pixels, states = self._round(count, rng)
            if len(winners):
                lane = int(winners[0])
                tried += lane + 1
                # The step that completed the pair left both last dashes pending.
                last = pixels[1, -1, lane : lane + 1]
                self.lanes.commit(last, states[1, -1, lane : lane + 1])
                dead = rng.negative_binomial(tried, self.start_share) if self.start_share < 1 else 0
                canvas_pixels = self.tables.pixel(pixels[:, :, lane] - lane * self.lanes.span)
                return Pair(canvas_pixels, states[:, :, lane].copy(), tried + int(dead), self.lanes.maps(lane))
            tried += count
            self._give_up(tried)
            count = min(2 * count, self.max_lanes)

    def many(self, count: int, rng: np.random.Generator) -> Pairs:
        """``count`` independent pairs, for statistics of positions; all survivors of a round are used."""
        kept_pixels: list[Ints] = []
        kept_states: list[Ints] = []
        found = idle = 0
        while found < count:
            winners, pixels, states = self._round(self.max_lanes, rng)
            idle = 0 if len(winners) else idle + self.max_lanes
            self._give_up(idle)
            cells = pixels[:, :, winners] - winners * self.lanes.span
            kept_pixels.append(self.tables.pixel(np.moveaxis(cells, -1, 0)))
            kept_states.append(np.moveaxis(states[:, :, winners], -1, 0))
            found += len(winners)
        return Pairs(np.concatenate(kept_pixels)[:count], np.concatenate(kept_states)[:count])

    def _give_up(self, tried: int) -> None:
        if tried / self.start_share > MAX_ATTEMPTS:
            raise NoPairError(
                f"no pair of {self.length}-dash contours in {MAX_ATTEMPTS:,} attempts on a canvas of side "
                f"{self.tables.size}: use shorter contours or a larger canvas"
            )

    def _round(self, count: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
        """``count`` attempts at once: the lanes that completed, ascending; cells and states int64 [2, N, count]."""
        lanes, length = self.lanes, self.length
        lanes.reset(count, self.tables.blank)
        pixels = np.zeros((2, length, count), np.int64)
        states = np.zeros((2, length, count), np.int64)
        one, two = self._seeds(count, rng)
        for k in range(length):
            if k:
                one, keep = extend(lanes, one, rng)
                two, keep = extend(lanes, two[keep], rng)
                one = one[keep]
            for which, contour in enumerate((one, two)):
                pixels[which, k, contour.lane] = contour.pixel
                states[which, k, contour.lane] = contour.state
            if not len(one.lane):
                break
        return one.lane, pixels, states

    def _seeds(self, count: int, rng: np.random.Generator) -> tuple[Contours, Contours]:
        tables = self.tables
        lane = np.arange(count)
        degree = tables.first[rng.integers(len(tables.first), size=count)]
        tail = rng.integers(tables.first_low[degree], tables.first_high[degree])
        # Geometry keeps 2s beyond a dash's reach, so this head and pivot are always on the canvas. The redraw that the
        # specification allows for an off-canvas seed cannot happen here.
        one, inside = seed_contours(tables, lane, tail, degree)
        assert len(inside) == count

        seeded: list[Contours] = []
        for _ in range(DRAWS):
            toward = np.radians(rng.integers(360, size=len(lane)))
            offset = self.seed_distance * np.stack((np.sin(toward), np.cos(toward)), axis=-1)
            degree = rng.integers(360, size=len(lane))
            second, inside = seed_contours(tables, lane, np.rint(tail[lane] + offset).astype(np.int64), degree)
            seeded.append(second[inside])
            lane = np.delete(lane, inside)
            if not len(lane):
                break
        two = _joined(seeded)
        return one[two.lane], two


def _joined(parts: list[Contours]) -> Contours:
    """Concatenate parts with distinct lanes, lanes ascending."""
    if len(parts) == 1:
        return parts[0]
    whole = Contours(
        np.concatenate([part.lane for part in parts]),
        np.concatenate([part.pivot for part in parts]),
        np.concatenate([part.state for part in parts]),
        np.concatenate([part.pixel for part in parts]),
    )
    return whole[np.argsort(whole.lane)]
