"""Compiling says what it would take before it takes it."""

from __future__ import annotations

import time

import numpy as np
import pytest

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from tests.limits import little_memory

HUGE: list[tuple[Pattern, tuple[int, int], int]] = [
    (P.random_blocks(1_000_000, unit=1), (65_536, 65_536), 128),
    (P.causal(), (1 << 34, 1 << 40), 128),
    (P.full(), (1 << 40, 1 << 40), 16),
    (P.dilated(1 << 33, 2), (1 << 34, 1 << 34), 128),
    (P.global_tokens(1 << 33), (1 << 33, 1 << 33), 128),
    (P.global_tokens(1 << 23), (1 << 23, 1 << 23), 16),
    (P.fixed(1, 1, unit=16), (1 << 24, 1 << 24), 16),
    (P.axial((4096, 4096)), (1 << 24, 1 << 24), 16),
    (P.causal() | P.random_blocks(4096, unit=1), (1 << 20, 1 << 20), 128),
    (P.where(lambda q, k: q == k), (1 << 36, 128), 16),
    (P.per_head(*(P.local(n) for n in range(2000))), (1 << 20, 1 << 20), 16),
    (P.per_sample(*(P.local(n) for n in range(2000))), (1 << 20, 1 << 20), 16),
]


@pytest.mark.parametrize(("pattern", "lengths", "block"), HUGE, ids=lambda value: str(value)[:40])
def test_what_would_not_fit_is_refused_with_the_number_and_at_once(
    pattern: Pattern, lengths: tuple[int, int], block: int
) -> None:
    started = time.perf_counter()
    with little_memory(1024), pytest.raises(ValueError, match=r"entries would take about [\d.,e+]+ GB.*max_bytes"):
        pattern.compile(lengths, block=block)
    assert time.perf_counter() - started < 20


def test_the_bound_is_an_argument() -> None:
    pattern = P.random_blocks(50, unit=1)
    with pytest.raises(ValueError, match=r"random_blocks.*over 4,096 x 4,096 tokens.*204,800 entries"):
        pattern.compile(4096, max_bytes=1 << 20)
    assert pattern.compile(4096).nnz == pattern.compile(4096, max_bytes=1 << 40).nnz


def test_random_blocks_take_memory_for_what_is_stored() -> None:
    """Whether cells are in a draw is asked one draw at a time: 16 GB before, 0.2 GB now."""
    with little_memory(1024):
        mask = P.random_blocks(300, unit=16).compile(65_536, block=16)
    assert mask.nnz == 300 * 4096
    assert np.array_equal(mask.row_counts, np.full((1, 4096), 300))
