"""The CPU backend's builds: every level that this machine runs and the plain one obey the laws alike."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash import reference
from sparseflash.kernels.cpu import levels, native
from sparseflash.kernels.layout import BlockLists
from tests.laws import test_attention_laws as attention
from tests.laws import test_decode as decoding
from tests.oracle import Features, check, ours, random_case, random_features

BUILDS = [*(level.name for level in levels.runnable(native.capabilities()) if level.library.exists()), native.PLAIN]


@lru_cache
def loaded(build: str) -> native.Library | None:
    """A build by its name; None for the plain one."""
    for level in levels.LEVELS:
        if level.name == build:
            return native.Library(level.library, build)
    return None


@pytest.fixture(params=BUILDS)
def build(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each build in turn serves all calls of a test."""
    with native.using(loaded(request.param)):
        yield request.param


def test_a_kernel_was_built() -> None:
    """Else all other tests of this backend would only try the plain one."""
    assert native.missing() is None
    assert len(BUILDS) > 1


@pytest.mark.parametrize("name", BUILDS)
@given(attention.drawn())
def test_every_build_is_masked_dense_attention(name: str, d: attention.Drawn) -> None:
    mask, case = d.mask(), d.case()
    with native.using(loaded(name)):
        check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("name", BUILDS)
@given(decoding.drawn())
def test_every_build_decodes_the_rows_of_masked_dense_attention(name: str, d: decoding.Drawn) -> None:
    with native.using(loaded(name)):
        law: Callable[[decoding.Drawn], None] = vars(decoding.test_decoding_is_the_rows_of_masked_dense_attention)[
            "hypothesis"
        ].inner_test
        law(d)


@pytest.mark.parametrize(
    ("dim", "v_dim"), [(1, 1), (7, 9), (8, 576), (24, 40), (33, 16), (96, 96), (256, 128), (576, 512)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_head_dim(build: str, dim: int, v_dim: int, dtype: torch.dtype) -> None:
    case = random_case(dim, 1, 1, 2, 70, 83, dim, v_dim, dtype)
    mask = (P.local(30) | P.strided(16)).compile((70, 83), block=(32, 16))
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("block", [(16, 256), (256, 16), (64, 128), (128, 32)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_block(build: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    everything = Features(2.0, torch.tensor([0.1, 0.3]), torch.tensor([0.5, -1.0]).to(dtype), 0.2, 7)
    for features in (Features(), everything):
        case = replace(random_case(1, 2, 1, 2, 530, 601, 32, 24, dtype), features=features)
        mask = (P.causal() & (P.local(200) | P.global_tokens(20))).compile((530, 601), block=block)
        case = replace(case, q_offset=mask.q_offset)
        check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("factor", [1.0, 30.0, 1000.0])
def test_scores_past_the_range_of_their_exponential(build: str, factor: float) -> None:
    case = random_case(7, 1, 2, 1, 200, 200, 16, 16, torch.float32)
    case = replace(case, q=case.q * factor)
    mask = P.local(60).compile(200, block=16)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("size", [1e6, 1e9, 1e12, 1e20, 1e34])
def test_huge_scores_give_the_key_of_the_largest(build: str, size: float) -> None:
    """Scores whose rounding alone is more than an exponential of float32 holds."""
    case = random_case(7, 1, 2, 1, 200, 200, 16, 16, torch.float32)
    mask = P.local(60).compile(200, block=16)
    q, k, v = (x.clone().requires_grad_() for x in (case.q * size, case.k, case.v))
    out, lse = sf.attention(q, k, v, mask, return_lse=True)
    exact, log_sum = reference.attention(
        q.double(), k.double(), v.double(), torch.from_numpy(mask.to_dense()), return_lse=True
    )
    torch.testing.assert_close(out, exact.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, log_sum.float(), atol=0, rtol=1e-6)
    table = sf.lookup(P.causal().compile(200, block=16))
    new = sf.decode(q.detach()[:, :, -3:], k.detach(), v.detach(), table, lengths=200)
    rows = reference.attention(q.double(), k.double(), v.double(), torch.ones(200, 200).tril().bool())
    assert isinstance(rows, torch.Tensor)
    torch.testing.assert_close(new, rows[:, :, -3:].float(), atol=1e-5, rtol=1e-5)
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)) if size < 1e30 else ():
        assert gradient.isfinite().all()


def test_huge_scores_that_nobody_sees_do_no_harm(build: str) -> None:
    case = random_case(8, 1, 1, 1, 64, 64, 16, 16, torch.float32)
    case = replace(case, k=torch.where(torch.arange(64)[:, None] % 2 == 0, case.k, case.k * 1e30))
    mask = P.where(lambda q, k: (k % 2 == 0) & (q >= 0)).compile(64, block=32)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dirty_keys_that_nobody_sees_leave_no_trace(build: str, dtype: torch.dtype) -> None:
    clean = random_case(3, 1, 1, 1, 1024, 1024, 16, 16, dtype)
    mask = (P.local(400) - P.where(lambda q, k: (k % 7 == 3) & (q >= 0))).compile(1024, block=64)
    unseen = (torch.arange(1024) % 7 == 3)[:, None]
    clean, dirty = (
        replace(clean, k=clean.k.masked_fill(unseen, x), v=clean.v.masked_fill(unseen, x)) for x in (0.0, torch.nan)
    )
    for want, got in zip(ours(clean, mask, "cpu"), ours(dirty, mask, "cpu"), strict=True):
        assert torch.equal(got, want)


def test_queries_that_see_nothing_may_be_anything(build: str) -> None:
    case = random_case(3, 1, 2, 1, 96, 96, 16, 16, torch.bfloat16)
    mask = P.where(lambda q, k: (q % 3 > 0) & (k >= 0)).compile(96, block=32)
    blind = torch.arange(96) % 3 == 0
    rough = case.q.masked_fill(blind[:, None], torch.nan)
    (out, lse), (same, its) = (sf.attention(q, case.k, case.v, mask, return_lse=True) for q in (case.q, rough))
    assert torch.equal(out, same)
    assert torch.equal(lse, its)
    assert not out[:, :, blind].any()
    assert (lse[:, :, blind] == -torch.inf).all()


@pytest.mark.parametrize("keys", [4096, 65536, 262144])
def test_long_rows_round_little(build: str, keys: int) -> None:
    """As little as torch's attention, whose blocks are longer."""
    if build == native.PLAIN and keys > 65536:
        pytest.skip("the plain build takes a minute for it")
    case = random_case(2, 1, 1, 1, 64, keys, 64, 64, torch.float32)
    exact = F.scaled_dot_product_attention(case.q.double(), case.k.double(), case.v.double())

    def error(out: torch.Tensor) -> float:
        return float((out - exact).square().mean().sqrt())

    theirs = error(F.scaled_dot_product_attention(case.q, case.k, case.v))
    assert error(sf.attention(case.q, case.k, case.v)) <= 1.5 * theirs


def test_long_sums_of_many_queries_round_little() -> None:
    """A key that all of 65,536 queries see: sums are taken a block at a time."""
    case = random_case(2, 1, 1, 1, 65536, 65536, 16, 16, torch.float32)
    mask = P.global_tokens(16) | P.local(8)
    q, k, v = case.leaves()
    dk, dv = torch.autograd.grad(sf.attention(q, k, v, mask), (k, v), case.dout)
    with native.using(None):
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(sf.attention(exact[0], exact[1], exact[2], mask), exact[1:], case.dout.double())
    for got, right in zip((dk, dv), want, strict=True):
        assert float((got - right).abs().max() / right.abs().max()) < 4e-6


def test_an_expanded_cotangent_is_read_as_it_is_meant(build: str) -> None:
    case = random_case(6, 2, 2, 1, 300, 300, 16, 16, torch.float32)
    mask = P.local(50).compile(300, block=32)

    def gradients(dout: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = case.leaves()
        return torch.autograd.grad(sf.attention(q, k, v, mask), (q, k, v), dout)

    one = torch.ones(())
    for a, b in zip(gradients(one.expand(case.dout.shape)), gradients(torch.ones(case.dout.shape)), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_planned_of_a_table_lives_as_long_as_it() -> None:
    library = native.library()
    assert library is not None
    table = sf.lookup(P.local(100).compile(300, block=16))
    rows, columns = (side._replace(ranges=side.ranges.clone()) for side in (table.rows, table.columns))

    def plan(rows: BlockLists, columns: BlockLists | None = None) -> native._Plan:
        assert library is not None
        return native._plan(library, rows, columns, table.tiles, table.pattern_of, table.block)

    one = plan(rows)
    assert one is plan(rows)
    both = plan(rows, columns)
    assert one.held["turned"] is both.held["turned"]
    assert both is plan(rows, columns) is plan(rows)
    other = plan(rows, columns._replace(partial_tiles=columns.partial_tiles.clone()))
    assert other is not both
    assert other.held["turned"] is one.held["turned"]
    assert other is not plan(rows._replace(partial_tiles=rows.partial_tiles.clone()))
    gone = [weakref.ref(found) for found in (plan(rows, columns), one, both, other)]
    del rows, columns, one, both, other
    gc.collect()
    assert [found() for found in gone] == [None] * 4


@pytest.mark.alone
def test_sparse_attention_costs_less_than_its_share_of_dense_attention() -> None:
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
    assert dense_best * mask.density / ours_best >= 0.8


def chosen(value: str) -> subprocess.CompletedProcess[str]:
    """What a process says with a value of the environment variable."""
    say = "from sparseflash.kernels.cpu import native; print(getattr(native.library(), 'name', native.missing()))"
    environment = os.environ | {native.VARIABLE: value}
    return subprocess.run([sys.executable, "-c", say], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses_the_build() -> None:
    assert chosen(BUILDS[0]).stdout.strip() == BUILDS[0]
    assert "SPARSEFLASH_CPU=plain" in chosen("plain").stdout
    refused = chosen("z80")
    assert refused.returncode == 1
    assert "SPARSEFLASH_CPU must be 'plain' or one of" in refused.stderr


def test_a_library_of_something_else_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    with pytest.raises(native.UnusableError, match="cannot be loaded"):
        native.Library(broken, "broken")


def damaged(**changes: torch.Tensor) -> Callable[[], object]:
    """A call with a table whose rows, or else itself, have other tensors."""
    table = sf.lookup((P.causal() & P.local(30)).compile(64, block=16))
    q, k, v = torch.randn(3, 1, 2, 64, 8).unbind(0)
    if "pattern_of" not in changes:
        changed = replace(table, rows=table.rows._replace(**changes))
    else:
        changed = replace(table, pattern_of=changes["pattern_of"])
    return lambda: sf.attention(q, k, v, changed)


def test_what_a_table_names_is_looked_at_before_it_is_read() -> None:
    table = sf.lookup((P.causal() & P.local(30)).compile(64, block=16))
    rows = table.rows
    ranges = rows.ranges.clone()
    ranges[0, 1, 3] += 1 << 20
    ahead = rows.partial_indices.clone()
    ahead[rows.ranges[0, 0, 2]] = 1 << 20
    before = rows.partial_indices.clone()
    before[rows.ranges[0, 0, 2]] = -1
    tile = rows.partial_tiles.clone()
    tile[rows.ranges[0, 0, 2]] = 99
    for call, words in (
        (damaged(ranges=ranges), "entries that it does not have"),
        (damaged(ranges=ranges - 1), "entries that it does not have"),
        (damaged(partial_indices=ahead), "do not fit each other, or the table"),
        (damaged(partial_indices=before), "blocks or tiles that it does not have"),
        (damaged(partial_tiles=tile), "blocks or tiles that it does not have"),
        (damaged(order=rows.order + 1), "rows that it does not have"),
        (damaged(pattern_of=table.pattern_of + 1), "patterns that it does not have"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_gradients_in_torch_are_equal_at_any_number_of_threads() -> None:
    case = random_features(random_case(3, 1, 2, 4, 256, 256, 32, 32, torch.float32), 3, bias="keys by sample")
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 4, 4):
            torch.set_num_threads(count)
            with native.using(None):
                results.append(ours(case, None, "cpu")[3:])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for want, got in zip(results[0], result, strict=True):
            torch.testing.assert_close(got, want)
    for want, got in zip(*results[1:], strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("name", ["dout", "out", "lse", "k", "rows"])
def test_the_operator_refuses_operands_that_do_not_fit(name: str) -> None:
    """Whoever calls it directly has had nothing checked before."""
    table = sf.lookup(P.causal().compile(64, block=16))
    q, k, v, dout, out = torch.randn(5, 1, 2, 64, 8).unbind(0)
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": torch.zeros(1, 2, 64), "rows": q}
    given[name] = given[name][:, :, :40]
    if name == "rows":
        given |= {key: given[key][:, :, :40] for key in ("q", "dout", "out", "lse")}
    del given["rows"]
    tensors = [*table.rows.tensors(), *table.columns.tensors(), *table.tiles.tensors(), table.pattern_of]
    rest = None, tensors, table.block, "", "cpu", False, 0.3, None, None, 0, 0.0, None
    with pytest.raises(ValueError, match=r"must be|do not fit|is not for"):
        torch.ops.sparseflash.attention_backward(
            given["dout"], None, given["q"], given["k"], given["v"], given["out"], given["lse"], *rest
        )


def test_a_level_that_nobody_has_run_serves_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "machine", lambda: "x86_64")
    everything = dict.fromkeys({need for level in levels.LEVELS for need in level.needs}, True)
    names = [level.name for level in levels.runnable(everything)]
    assert names == ["x86-64-v3", "x86-64-v4", "x86-64-v4-bf16"]
    assert [level.name for level in levels.runnable(everything, "x86-64-amx")] == [*names, "x86-64-amx"]
