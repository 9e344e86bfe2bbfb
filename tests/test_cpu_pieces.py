"""The pieces in which a CPU works through a table, and that every way to work through them gives the same."""

from __future__ import annotations

import gc
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels import cpu, cpu_flash, cpu_operands, cpu_plan
from sparseflash.patterns import Pattern
from tests.oracle import Case, Features, check, ours, random_case
from tests.test_attention_laws import Drawn, drawn

SMALL = {"SCORES_AT_ONCE": 1 << 14, "FUSED_AT_ONCE": 1 << 14, "WINDOW_SCORES": 1 << 10, "TALL": 64, "WIDE": 32}
PARTS = SMALL | {"SCORES_AT_ONCE": 1 << 11}  # few rows of more than one entry fit


def without_dlse(case: Case) -> Case:
    return replace(case, dlse=torch.zeros_like(case.dlse))


def set_sizes(monkeypatch: pytest.MonkeyPatch, **sizes: int) -> None:
    for name, value in sizes.items():
        monkeypatch.setattr(cpu_plan if hasattr(cpu_plan, name) else cpu_operands, name, value)


@pytest.mark.parametrize(
    ("pattern", "lengths", "dtype"),
    [
        (P.causal(), (1100, 1100), torch.float32),
        (P.full(), (300, 407), torch.bfloat16),
        (P.local(300) | P.strided(64), (640, 640), torch.bfloat16),
        (P.causal() - P.local(100), (512, 400), torch.float32),  # rows that see nothing
        (P.prefix(300), (530, 530), torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [(16, 16), (16, 24)], ids=["one head dim", "two head dims"])
@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["as it is", "windows in parts"])
@pytest.mark.parametrize("only_out", [True, False], ids=["dout", "dout and dlse"])
def test_pieces_of_every_kind_are_masked_dense_attention(
    monkeypatch: pytest.MonkeyPatch,
    pattern: Pattern,
    lengths: tuple[int, int],
    dtype: torch.dtype,
    dims: tuple[int, int],
    sizes: dict[str, int],
    only_out: bool,
) -> None:
    set_sizes(monkeypatch, **sizes)
    case = random_case(0, 1, 1, 2, *lengths, *dims, dtype)
    case = without_dlse(case) if only_out else case
    mask = pattern.compile(lengths, block=16)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@given(drawn(), st.booleans())
def test_with_matrix_units_and_without_bf16_is_masked_dense_attention(d: Drawn, units: bool) -> None:
    d = replace(d, dtype=torch.bfloat16, v_dim=d.dim, features={})
    mask, case = d.mask(), d.case()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_flash, "AMX", units)  # torch's operator takes bf16 on any processor
        check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize(
    ("pattern", "sizes"),
    [
        (P.local(40), {}),
        (P.causal() - P.local(100), {}),  # rows that see nothing
        (P.local(40) | P.strided(64), {}),
        (P.causal() | P.strided(48), SMALL),
        (P.random_blocks(3, unit=16) & P.local(200), {}),
    ],
    ids=str,
)
def test_pieces_of_every_kind_on_matrix_units(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, sizes: dict[str, int]
) -> None:
    set_sizes(monkeypatch, **sizes)
    for units in (True, False):
        monkeypatch.setattr(cpu_flash, "AMX", units)
        for group, keys in ((1, 640), (2, 633)):
            case = random_case(0, 1, 2, group, 635, keys, 16, 16, torch.bfloat16)
            mask = pattern.compile((635, keys), block=16)
            check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SCORES_AT_ONCE", 1),
        ("WINDOW_SCORES", 1),
        ("WINDOW_SCORES", 1 << 40),
        ("TALL", 32),
        ("WIDE", 16),
        ("BAND", 1 << 40),
        ("KEYS_HELD", 1),
        ("SMALL", 0),
        ("SMALL", 1 << 40),
        ("TILES_HELD", 1),
        ("RECENT", 1),
    ],
)
def test_other_sizes_give_the_same(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    case = random_case(1, 2, 2, 2, 600, 600, 16, 16, torch.float32)
    mask = (P.causal() & (P.local(300) | P.strided(96))).compile(600, block=16)
    set_sizes(monkeypatch, **{name: value})
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("factor", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("sizes", [{}, PARTS], ids=["whole rows", "rows in parts"])
def test_scores_past_the_range_of_their_exponential(
    monkeypatch: pytest.MonkeyPatch, factor: float, sizes: dict[str, int]
) -> None:
    set_sizes(monkeypatch, **sizes)
    case = random_case(7, 1, 2, 1, 200, 200, 16, 16, torch.float32)
    case = replace(case, q=case.q * factor)
    mask = P.local(60).compile(200, block=16)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


def test_huge_scores_that_nobody_sees_do_no_harm() -> None:
    case = random_case(8, 1, 1, 1, 64, 64, 16, 16, torch.float32)
    keys = torch.where(torch.arange(64)[:, None] % 2 == 0, case.k, case.k * 1e30)
    case = replace(case, k=keys)
    mask = P.where(lambda q, k: (k % 2 == 0) & (q >= 0)).compile(64, block=32)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("sizes", [{}, SMALL], ids=["gathered", "in place"])
def test_dirty_keys_in_long_rows_leave_no_trace(monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int]) -> None:
    set_sizes(monkeypatch, **sizes)
    clean = random_case(3, 1, 1, 1, 1024, 1024, 16, 16, torch.float32)
    mask = (P.local(400) - P.where(lambda q, k: (k % 7 == 3) & (q >= 0))).compile(1024, block=16)
    unseen = torch.arange(1024) % 7 == 3
    clean, dirty = (
        replace(clean, **{n: getattr(clean, n).masked_fill(unseen[:, None], fill) for n in ("k", "v")})
        for fill in (0.0, float("nan"))
    )
    for want, got in zip(ours(clean, mask, "cpu"), ours(dirty, mask, "cpu"), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("units", [True, False])
def test_queries_that_see_nothing_may_be_anything(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    monkeypatch.setattr(cpu_flash, "AMX", units)
    case = random_case(3, 1, 2, 1, 96, 96, 16, 16, torch.bfloat16)
    mask = P.where(lambda q, k: (q % 3 > 0) & (k >= 0)).compile(96, block=32)
    blind = torch.arange(96) % 3 == 0
    rough = case.q.masked_fill(blind[:, None], torch.nan)
    (out, lse), (same, its) = (sf.attention(q, case.k, case.v, mask, return_lse=True) for q in (case.q, rough))
    assert torch.equal(out, same)
    assert torch.equal(lse, its)
    assert not out[:, :, blind].any()
    assert (lse[:, :, blind] == -torch.inf).all()


def test_an_expanded_cotangent_is_read_as_it_is_meant() -> None:
    case = random_case(6, 2, 2, 1, 300, 300, 16, 16, torch.float32)
    mask = P.local(50).compile(300, block=32)

    def gradients(dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = case.leaves()
        return torch.autograd.grad(sf.attention(q, k, v, mask), (q, k, v), dout)

    one = torch.ones(())
    for a, b in zip(gradients(one.expand(case.dout.shape)), gradients(torch.ones(case.dout.shape)), strict=True):
        torch.testing.assert_close(a, b)


def test_without_torchs_operator_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, **SMALL)
    case = without_dlse(random_case(4, 1, 2, 2, 200, 230, 16, 16, torch.float32))
    mask = P.causal().compile((200, 230), block=32)
    assert any(piece.tall for piece in planned(sf.lookup(mask)).pieces)
    fused = ours(case, mask, "cpu")
    monkeypatch.setattr(cpu_flash, "FLASH", False)
    for a, b in zip(fused, ours(case, mask, "cpu"), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def planned(table: sf.LookupTable, heads: int = 1, alone: bool = True, tall: bool = True) -> cpu_plan.Plan:
    at_once = cpu_plan.SCORES_AT_ONCE
    return cpu_plan.plan(table.rows, table.tiles, 0, table.block, *table.shape, heads, alone, tall, at_once)


@pytest.mark.parametrize(
    "pattern",
    [
        P.local(60),
        P.causal() & P.local(40),
        P.neighborhood((20, 32), 2),
        P.local(30) - P.where(lambda q, k: (k % 7 == 3) & (q >= 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(640, 640), (633, 640), (640, 470)], ids=str)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(
    "features", [Features(), Features(softcap=2.0, dropout_p=0.3, seed=5)], ids=["plain", "features"]
)
def test_bands_are_masked_dense_attention(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, lengths: tuple[int, int], group: int, features: Features
) -> None:
    if "neighborhood" in str(pattern):
        lengths = 640, 640
    mask = pattern.compile(lengths, block=16)
    pieces = planned(sf.lookup(mask), heads=group).pieces
    assert any(piece.step for piece in pieces)
    case = replace(random_case(2, 2, 1, group, *lengths, 16, 24, torch.float32), features=features)
    allowed = torch.from_numpy(mask.to_dense())
    check(case, allowed, ours(case, mask, "cpu"))
    set_sizes(monkeypatch, SCORES_AT_ONCE=1 << 12)
    check(case, allowed, ours(case, mask, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dirty_keys_in_bands_leave_no_trace(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(cpu_flash, "AMX", True)
    clean = random_case(3, 1, 1, 1, 512, 512, 16, 16, dtype)
    mask = (P.local(50) - P.where(lambda q, k: (k % 7 == 3) & (q >= 0))).compile(512, block=16)
    assert any(piece.step for piece in planned(sf.lookup(mask)).pieces)
    unseen = (torch.arange(512) % 7 == 3)[:, None]
    clean, dirty = (
        replace(clean, k=clean.k.masked_fill(unseen, x), v=clean.v.masked_fill(unseen, x)) for x in (0.0, torch.nan)
    )
    for want, got in zip(ours(clean, mask, "cpu"), ours(dirty, mask, "cpu"), strict=True):
        torch.testing.assert_close(got, want)


@given(
    st.integers(0, 1 << 16),
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([16, 64]),
    st.sampled_from([1, 1 << 12, 1 << 14, 1 << 20]),
    st.booleans(),
    st.sampled_from([0, 30, 100]),
)
def test_pieces_hold_each_block_once(
    seed: int, q_len: int, kv_len: int, size: int, scores: int, tall: bool, window: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_sizes(patch, SCORES_AT_ONCE=scores, WINDOW_SCORES=scores, TALL=2 * size, WIDE=size, BAND=2)
        generator = np.random.default_rng(seed)
        array = generator.random((-(-q_len // 8), -(-kv_len // 8))) < generator.choice([0.1, 0.5, 0.95])
        array[:, : int(generator.integers(0, array.shape[1] + 1))] |= tall
        pattern = P.local(window) if window else P.from_blocks(array, unit=8)
        mask = pattern.compile((q_len, kv_len), block=size, q_offset=0)
        table = sf.lookup(mask)
        plan = planned(table, tall=tall)
        seen = np.zeros((q_len, kv_len), int)
        tiles = cpu_operands.Masks(table.tiles, table.block, torch.float32)
        for piece in plan.pieces:
            assert tall or not piece.tall
            assert piece.short == (piece.rows[-1] * size + size > q_len)
            for part in piece.parts(2):
                assert part.entries <= 2
                keys = part.entries * size - (-kv_len % size if part.ends else 0)
                queries = min(size, q_len - int(piece.rows[0]) * size)
                scores_here = torch.zeros(1, 1, len(piece.rows), queries, keys)
                tiles.hide(scores_here, part)
                for row, cols, values in zip(
                    piece.rows, part.blocks().expand(len(piece.rows), -1), scores_here[0, 0], strict=True
                ):
                    tokens = (cols[:, None] * size + torch.arange(size)).flatten()[:keys].numpy()
                    seen[row * size : row * size + queries, tokens] += (values == 0).numpy()
        assert (seen == mask.to_dense()).all()
        met = {int(row) for piece in plan.pieces for row in piece.rows}
        assert sorted([*met, *plan.empty.tolist()]) == list(range(-(-q_len // size)))


def test_a_plan_lives_as_long_as_its_table() -> None:
    mask = P.local(100).compile(300, block=16)
    table = replace(sf.lookup(mask), rows=sf.lookup(mask).rows._replace(spans=sf.lookup(mask).rows.spans.clone()))
    plan = planned(table)
    assert planned(table) is plan
    assert planned(table, heads=2) is not plan
    other = replace(table, rows=table.rows._replace(tile=table.rows.tile.clone()))
    assert planned(other) is not plan
    gone = weakref.ref(planned(table))
    del table, other, plan
    gc.collect()
    assert gone() is None


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


def test_a_long_row_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch of scores is larger than it may be, or than one block of keys."""
    held: list[int] = []

    class Noted(cpu_operands.Scratch):
        def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
            if name in ("scores", "dp"):
                held.append(math.prod(shape))
            return super().__call__(name, *shape, dtype=dtype)

    monkeypatch.setattr(cpu, "Scratch", Noted)
    set_sizes(monkeypatch, **SMALL)
    case = replace(random_case(1, 1, 1, 1, 64, 2048, 16, 16, torch.float32), features=Features(softcap=20.0))
    mask = P.full().compile((64, 2048), block=16, q_offset=0)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))
    assert max(held) <= SMALL["SCORES_AT_ONCE"] < 16 * 2048
    assert len(held) >= 2 * 4 * 2  # of both passes, four rows in two parts
