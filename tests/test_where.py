"""Predicates: written for numpy or torch, scanned in bounded memory, with advice on what would be linear."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparseflash import patterns as P
from sparseflash.patterns import advice, progress
from sparseflash.patterns.advice import SlowScan, faster_form

DOCUMENT = torch.arange(300) // 37
RANDOM = np.random.default_rng(0).random((64, 64)) < 0.2


@pytest.mark.parametrize(
    "fn",
    [
        lambda q, k: (q // 37 == k // 37) & (k <= q),
        lambda q, k: torch.logical_and(DOCUMENT[q] == DOCUMENT[k], q >= k),
        lambda q, k: (DOCUMENT[q] == DOCUMENT[k]).logical_and(torch.ge(q, k)),
        lambda q, k: (DOCUMENT.numpy()[q] == DOCUMENT.numpy()[k]) & np.less_equal(k, q),
        lambda q, k: q.float().div(37).floor().eq(k.div(37, rounding_mode="floor")) & (k <= q),
    ],
    ids=["operators", "torch function", "torch on positions", "numpy", "tensor methods"],
)
def test_numpy_and_torch_predicates_mean_the_same(fn: Callable[[Any, Any], Any]) -> None:
    expected = (P.documents([37] * 9) & P.causal()).compile(300, block=64)
    assert P.where(fn).compile(300, block=64) == expected


def test_an_error_in_the_predicate_is_the_user_s_own() -> None:
    def misspelt(q: Any, k: Any) -> Any:
        return q.shapee == k

    with pytest.raises(AttributeError, match="shapee"):
        P.where(misspelt).compile(20, block=16)
    with pytest.raises(TypeError, match="must give booleans for arrays of positions, got float32"):
        P.where(lambda q, k: torch.rand(3)).compile(20, block=16)


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda q, k: abs(q - k) % 9 < 3, "depends on q - k alone"),
        (lambda q, k: (abs(q // 16 - k // 16) < 99) & (q % 16 < k % 16), "no structure was found"),
        (
            lambda q, k: RANDOM[q // 16 % 64, k // 16 % 64],
            "constant in cells of 16 tokens: from_blocks(array, unit=16)",
        ),
        (lambda q, k: q // 64 == 3 * k // 64, "% of the blocks: a Pattern subclass with candidates"),
        (lambda q, k: (q * k) % 5 == 1, "no structure was found"),
    ],
    ids=["offsets", "repeats along block diagonals", "cells", "few blocks", "none"],
)
@pytest.mark.parametrize("at_once", [1, 3, 4096])
def test_a_long_scan_says_what_would_make_it_linear(
    fn: Callable[[Any, Any], Any], words: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advice, "TILES_AT_ONCE", at_once)
    with pytest.warns(SlowScan) as caught:
        P.where(lambda q, k: fn(q, k)).compile(4096, block=16)
    assert words in str(caught[0].message)
    with pytest.warns(SlowScan):
        (P.causal() & P.where(lambda q, k: fn(q, k))).compile(4096, block=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        P.where(lambda q, k: fn(q, k)).compile(2048, block=16)  # short scans are nobody's trouble


@pytest.mark.parametrize(("terminal", "seconds", "shown"), [(True, 2, True), (False, 2, False), (True, 0, False)])
def test_a_bar_on_a_terminal_for_what_takes_long(
    terminal: bool, seconds: int, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, bars = itertools.count(step=seconds), []

    def bar(rest: Iterator[int], what: str, *, total: int, completed: int, **_: object) -> Iterator[int]:
        bars.append((what, total, completed))
        yield from rest

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: terminal)))
    monkeypatch.setattr("rich.progress.track", bar)
    assert list(progress.track(range(2, 7), "looking")) == [2, 3, 4, 5, 6]
    assert bars == ([("looking", 5, 1)] if shown else [])


def test_two_blocks_a_side_are_enough_to_see_a_structure() -> None:
    assert "depends on q - k alone" in faster_form(P.local(3).compile(32, block=16))
    assert "depends on q - k alone" not in faster_form(P.local(3).compile(16, block=16))
    # What only the last block shows, and what only the corner.
    last = P.where(lambda q, k: (abs(q - k) < 5) & ((q < 48) | (k < 48)))
    assert "depends on q - k alone" not in faster_form(last.compile(64, block=16))
    corner = P.where(lambda q, k: (abs(q - k) < 5) | ((q >= 48) & (k < 16) & (q % 2 == 0)))
    assert "depends on q - k alone" not in faster_form(corner.compile(64, block=16))
    nothing = P.from_blocks(np.zeros((4, 4), bool), unit=16)
    assert "depends on q - k alone" not in faster_form(nothing.compile(64, block=16))
    assert "depends on q - k alone" not in faster_form(P.local(3).compile(64, block=(16, 32)))


@pytest.mark.filterwarnings("ignore::sparseflash.patterns.advice.SlowScan")
def test_a_scan_takes_memory_for_what_is_stored_only() -> None:
    tracemalloc.start()
    mask = P.where(lambda q, k: abs(q - k) < 100).compile(16384, block=64)  # 65,536 blocks, 268 million pairs
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask == P.local(99).compile(16384, block=64)
    assert peak < 150e6


@pytest.mark.filterwarnings("ignore::sparseflash.patterns.advice.WastefulPattern")
def test_a_pattern_of_all_blocks_is_compared_in_portions() -> None:
    """Listing the 4 million blocks of strided(16) at once would take 34 MB an array."""
    tracemalloc.start()
    mask = P.strided(16).compile(1 << 18)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mask.nnz == 2048 * 2048
    assert mask.token_density == 1 / 16
    assert peak < 2 * 34e6
