"""Sliding window with gaps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.memory import reserve
from sparseflash.patterns.pattern import Bools, Pattern, checked_int


class Offsets(Pattern):
    """Base of patterns that depend on k - q alone, given by the offsets k - q that are allowed."""

    def offsets(self, limit: int) -> Ints:
        """The allowed k - q of at most ``limit`` tokens either way."""
        raise NotImplementedError

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        # Offsets nearer to each other than a block touch the same blocks: one interval serves them all.
        last = grid.q_offset + grid.q_len
        offsets = np.unique(self.offsets(max(last, grid.kv_len, grid.kv_len - grid.q_offset, 1)))
        if not offsets.size:
            return grid.expand(offsets, offsets, offsets)
        breaks = np.flatnonzero(np.diff(offsets) > grid.bk)
        low = offsets[np.append(0, breaks + 1)]
        high = offsets[np.append(breaks, offsets.size - 1)]
        reserve(grid.rows * low.size, 80)
        rows = np.repeat(grid.all_rows(), low.size)
        first = (grid.q_start(grid.all_rows())[:, None] + low).ravel()
        end = (grid.q_last(grid.all_rows())[:, None] + high).ravel()
        return grid.expand_positions(rows, first, end)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints:
        return grid.k_start(cols) - grid.q_start(rows)


@dataclass(frozen=True, repr=False)
class Dilated(Offsets):
    """See :func:`dilated`."""

    window: int
    dilation: int
    name = "dilated"

    def allows(self, q: Ints, k: Ints) -> Bools:
        gap = q - k
        near, on_step = np.abs(gap) <= self.window * self.dilation, gap % self.dilation == 0
        return np.asarray(near & on_step)

    def offsets(self, limit: int) -> Ints:
        steps = min(self.window, limit // self.dilation)
        reserve(2 * steps + 1, 32)
        return np.arange(-steps, steps + 1, dtype=np.int64) * self.dilation


def dilated(window: int, dilation: int) -> Pattern:
    """``abs(q - k) <= window * dilation`` and ``(q - k) % dilation == 0``.

    Dilated sliding window of Beltagy et al., "Longformer" (2020), section 3.1.

    Args:
        window: keys seen on either side.
        dilation: distance between them; 1 is ``local(window)``.

    Raises:
        TypeError: window or dilation is not an int.
        ValueError: window is negative or dilation below 1.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.dilated(1, 3).compile(5, block=16).to_dense().astype(int)
        array([[1, 0, 0, 1, 0],
               [0, 1, 0, 0, 1],
               [0, 0, 1, 0, 0],
               [1, 0, 0, 1, 0],
               [0, 1, 0, 0, 1]])
    """
    return Dilated(checked_int("dilated", "window", window, 0), checked_int("dilated", "dilation", dilation, 1))
