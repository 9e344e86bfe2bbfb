"""Torch's flash kernel on strips of block rows: where it is used, and that each way to call it gives the same."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels import cpu_fused, cpu_strips
from sparseflash.patterns import Pattern
from tests.oracle import Case, check, ours, random_case

pytestmark = pytest.mark.skipif(not cpu_fused.AVAILABLE, reason="this torch has no flash attention kernel on a CPU")


def without_dlse(case: Case) -> Case:
    return dataclasses.replace(case, dlse=torch.zeros_like(case.dlse))


@pytest.mark.parametrize(
    ("pattern", "lengths", "dtype"),
    [
        (P.causal(), (1100, 1100), torch.float32),  # more than one tall strip of 64 rows
        (P.full(), (300, 407), torch.bfloat16),
        (P.local(300) | P.strided(64), (640, 640), torch.bfloat16),
        (P.causal() - P.local(100), (512, 400), torch.float32),  # rows that see nothing
        (P.prefix(300), (530, 530), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [(16, 16), (16, 24)], ids=["one head dim", "two head dims"])
@pytest.mark.parametrize("only_out", [True, False], ids=["dout", "dout and dlse"])
def test_strips_of_every_kind_are_masked_dense_attention(
    pattern: Pattern, lengths: tuple[int, int], dtype: torch.dtype, dims: tuple[int, int], only_out: bool
) -> None:
    case = random_case(0, 1, 1, 2, *lengths, *dims, dtype)
    case = without_dlse(case) if only_out else case
    mask = pattern.compile(lengths, block=16)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("LONGEST", 32), ("LONGEST_TALL", 512), ("GATHERED", 1), ("HELD", 1), ("QUERIES_HELD", 1), ("KEYS_HELD", 1)],
)
def test_small_bites_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    case = without_dlse(random_case(1, 2, 2, 2, 1200, 1200, 16, 16, torch.float32))
    mask = (P.causal() & (P.local(700) | P.strided(96))).compile(1200, block=16)
    monkeypatch.setattr(cpu_strips if hasattr(cpu_strips, name) else cpu_fused, name, value)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("pattern", [P.local(500), P.causal(), P.full()], ids=str)
def test_keys_read_in_place_and_gathered_ones_give_the_same(monkeypatch: pytest.MonkeyPatch, pattern: Pattern) -> None:
    case = without_dlse(random_case(2, 1, 2, 1, 1024, 1024, 16, 16, torch.float32))
    mask = pattern.compile(1024, block=16)
    in_place = ours(case, mask, "cpu")
    monkeypatch.setattr(cpu_fused._Keys, "direct", lambda keys, tall: False)
    for a, b in zip(in_place, ours(case, mask, "cpu"), strict=True):
        torch.testing.assert_close(a, b)


def test_dirty_keys_in_long_rows_leave_no_trace() -> None:
    clean = random_case(3, 1, 1, 1, 1024, 1024, 16, 16, torch.float32)
    mask = (P.local(400) - P.where(lambda q, k: (k % 7 == 3) & (q >= 0))).compile(1024, block=16)
    unseen = torch.arange(1024) % 7 == 3
    clean, dirty = (
        dataclasses.replace(clean, **{n: getattr(clean, n).masked_fill(unseen[:, None], fill) for n in ("k", "v")})
        for fill in (0.0, float("nan"))
    )
    for want, got in zip(ours(clean, mask, "cpu"), ours(dirty, mask, "cpu"), strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize(
    ("features", "fused"),
    [
        ({}, True),
        ({"sinks": torch.zeros(1)}, True),
        ({"softcap": 2.0}, False),
        ({"alibi_slopes": torch.ones(1)}, False),
        ({"dropout_p": 0.5, "seed": 1}, False),
    ],
    ids=["plain", "sinks", "softcap", "alibi", "dropout"],
)
def test_features_alone_keep_off_torchs_kernel(
    monkeypatch: pytest.MonkeyPatch, features: dict[str, Any], fused: bool
) -> None:
    met = []

    def spy(name: str) -> Callable[..., Any]:
        call = getattr(cpu_fused, name)

        def noting(*arguments: Any) -> Any:
            met.append(name)
            return call(*arguments)

        return noting

    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu_fused, name, spy(name))
    q = torch.randn(1, 1, 40, 16, requires_grad=True)
    sf.attention(q, q, q, P.causal(), **features).sum().backward()
    assert met == (["forward", "backward"] if fused else [])


def test_without_torchs_kernel_the_other_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(4, 1, 2, 2, 200, 230, 16, 16, torch.float32)
    mask = P.local(50).compile((200, 230), block=32)
    fused = ours(case, mask, "cpu")
    monkeypatch.setattr(cpu_fused, "AVAILABLE", False)
    for a, b in zip(fused, ours(case, mask, "cpu"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_an_expanded_cotangent_is_read_as_it_is_meant() -> None:
    case = random_case(6, 2, 2, 1, 300, 300, 16, 16, torch.float32)
    mask = P.local(50).compile(300, block=32)

    def gradients(dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = case.leaves()
        return torch.autograd.grad(sf.attention(q, k, v, mask), (q, k, v), dout)

    one = torch.ones(())
    for a, b in zip(gradients(one.expand(case.dout.shape)), gradients(torch.ones(case.dout.shape)), strict=True):
        assert torch.equal(a, b)


@given(st.integers(0, 1 << 16), st.integers(1, 150), st.integers(1, 40), st.sampled_from([16, 64, 128, 256]))
def test_strips_hold_each_block_once(seed: int, rows: int, width: int, size: int) -> None:
    generator = np.random.default_rng(seed)
    letters = np.repeat(generator.choice([0, 1, 1, 2, 3], (rows, -(-width // 5))), 5, 1)[:, :width].astype(np.int64)
    letters[: rows // 2, : width // 2] = 1
    found = np.zeros_like(letters)
    for strips in cpu_strips.cut(letters.copy(), (size, size)):
        assert (np.diff(strips.cols) > 0).all()
        for first, cols in zip(strips.rows, strips.cols, strict=True):
            assert not found[first : first + strips.tall, cols].any()
            found[first : first + strips.tall, cols] = 1
        if strips.tiles is not None:
            assert strips.tall == 1
            found[strips.rows[:, None], strips.cols] += strips.tiles + 1
    assert (found == letters).all()


@given(st.lists(st.integers(0, 5), max_size=30))
def test_even_runs_cover_a_list_in_order(steps: list[int]) -> None:
    values = np.cumsum(np.array([0, *steps], np.int64))
    runs = list(cpu_strips.evenly(values))
    assert [i for first, last in runs for i in range(first, last)] == list(range(len(values)))
    assert all(len(set(np.diff(values[first:last]).tolist())) <= 1 for first, last in runs)


def test_two_threads_give_the_same_every_time() -> None:
    case = random_case(5, 1, 2, 1, 700, 700, 16, 16, torch.float32)
    mask = (P.local(100) | P.butterfly(unit=16)).compile(700, block=16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first = ours(case, mask, "cpu")
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, ours(case, mask, "cpu"), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_window_costs_about_its_share_of_dense_attention() -> None:
    q = torch.randn(1, 2, 4096, 64)
    mask = P.local(512).compile(4096, block=128)
    table = sf.lookup(mask)

    def seconds(call: Callable[[], object]) -> float:
        begun = time.process_time()
        call()
        return time.process_time() - begun

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        # Interleaved, so that what else the machine does meets both; benchmarks/README.md has the figures.
        pairs = [
            (seconds(lambda: sf.attention(q, q, q, table)), seconds(lambda: F.scaled_dot_product_attention(q, q, q)))
            for _ in range(6)
        ]
    finally:
        torch.set_num_threads(threads)
    ours_best, dense_best = (min(times) for times in zip(*pairs, strict=True))
    assert dense_best * mask.density / ours_best >= 0.4
