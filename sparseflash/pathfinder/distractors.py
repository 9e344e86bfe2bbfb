"""The short contours, placed one after another in the space that the targets left.

Each distractor has up to five tries. A failed try changes nothing, so tries are independent and identical: they run as
lanes over copies of the same maps, and the first success counts. (On a large canvas one try runs alone first, since it
nearly always succeeds.) One try: one of 360 angles, a failure if it is not viable; a tail uniform over the available
pixels; ``length - 1`` extensions; then the pending footprint is committed too, so a finished distractor is fully in M.
A distractor whose tries all fail is omitted: at 32 and 64 fewer distractors than requested are normal.
"""

from __future__ import annotations

import numpy as np

from sparseflash.pathfinder.contours import DRAWS, Contours, Lanes, extend, seed_contours
from sparseflash.pathfinder.strokes import Bools, Bytes, Ints
from sparseflash.pathfinder.tables import BLOCKED, Tables

TRIES = 5
"""max_distractor_contour_retrial 4, plus the first."""
MIN_FREE = 0.01
"""A try fails if a smaller share of the canvas is unblocked."""

# Canvases of at least this side are mostly empty. A tail drawn from all pixels and kept if it is available is uniform
# over the available ones, and there cheaper than listing them.
_LARGE = 100
_GUESSES = 64
_GUESS_ROUNDS = 8


class DistractorSearch:
    """Places distractors; owns the maps of its five lanes."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.lanes = Lanes.empty(tables, TRIES)

    def place(self, maps: Bytes, count: int, length: int, rng: np.random.Generator) -> list[tuple[Ints, Ints]]:
        """Up to ``count`` distractors on ``maps`` (changed in place): their pixels [length, 2] and states [length]."""
        placed: list[tuple[Ints, Ints]] = []
        groups = (1, TRIES - 1) if self.tables.size >= _LARGE else (TRIES,)
        for _ in range(count):
            for tries in groups:
                distractor = self._first_success(maps, tries, length, rng)
                if distractor is not None:
                    placed.append(distractor)
                    break
        return placed

    def _first_success(
        self, maps: Bytes, tries: int, length: int, rng: np.random.Generator
    ) -> tuple[Ints, Ints] | None:
        tables, lanes = self.tables, self.lanes
        contours = self._seeds(maps, tries, rng)
        if contours is None:
            return None
        lanes.reset(tries, maps)
        pixels = np.zeros((length, tries), np.int64)
        states = np.zeros((length, tries), np.int64)
        for k in range(length):
            if k:
                contours, _ = extend(lanes, contours, rng)
                if not len(contours.lane):
                    return None
            pixels[k, contours.lane] = contours.pixel
            states[k, contours.lane] = contours.state
        winner = contours[np.zeros(1, np.int64)]
        lanes.commit(winner.pixel, winner.state)
        lane = int(winner.lane[0])
        maps[:] = lanes.maps(lane)
        return tables.pixel(pixels[:, lane] - lane * lanes.span), states[:, lane].copy()

    def _seeds(self, maps: Bytes, tries: int, rng: np.random.Generator) -> Contours | None:
        """The seeds of all tries that find one, lanes ascending."""
        tables, side = self.tables, self.tables.stride
        inner = slice(tables.border, tables.border + tables.size)
        # Probes outside the canvas are ignored, whatever commits wrote there.
        free = np.ones((side, side), bool)
        free[inner, inner] = tables.canvas(maps)[0] < BLOCKED
        if np.count_nonzero(free[inner, inner]) < MIN_FREE * tables.size**2:
            return None
        lanes: list[int] = []
        tails: list[Ints] = []
        degrees: list[int] = []
        for lane in range(tries):
            for _ in range(DRAWS):
                degree = int(rng.integers(360))
                tail = self._tail(free, degree, rng) if tables.viable[degree] else None
                if tail is None:
                    break
                _, inside = seed_contours(tables, np.zeros(1, np.int64), tail[None], np.array([degree]))
                if len(inside):
                    lanes.append(lane)
                    tails.append(tail)
                    degrees.append(degree)
                    break
        if not lanes:
            return None
        contours, _ = seed_contours(tables, np.array(lanes), np.stack(tails), np.array(degrees))
        return contours

    def _tail(self, free: Bools, degree: int, rng: np.random.Generator) -> Ints | None:
        """A pixel drawn uniformly from those with no probe on a blocked pixel; None if there is none.

        ``free`` is bool [stride, stride] and true outside the canvas, where probes are ignored.
        """
        tables = self.tables
        if tables.size >= _LARGE:
            flat, probes = free.ravel(), tables.probes_flat[degree]
            for _ in range(_GUESS_ROUNDS):
                tails = rng.integers(tables.size, size=(_GUESSES, 2))
                good = flat.take(tables.flat(tails)[:, None] + probes).all(1).nonzero()[0]
                if len(good):
                    guess: Ints = tails[good[0]]
                    return guess
        low, high = tables.border, tables.border + tables.size
        available = np.ones((tables.size, tables.size), bool)
        for dy, dx in tables.probes[degree].tolist():
            available &= free[low + dy : high + dy, low + dx : high + dx]
        cells = available.ravel().nonzero()[0]
        if not len(cells):
            return None
        cell = int(cells[rng.integers(len(cells))])
        return np.array(divmod(cell, tables.size))
