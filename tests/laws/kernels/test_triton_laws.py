"""The laws of attention, checked on the Triton launchers: exactness, empty rows, poison, determinism."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sparseflash.kernels.triton import tiles as triton_tiles
from sparseflash.kernels.triton.common import grid_of, matrix
from tests.laws.kernels.harness import DEVICE, DTYPES, KINDS, Problem, Results, check, random_mask, run

pytestmark = pytest.mark.interpreted


def masks(kinds: list[str], N: int, M: int, unit: int = 16, seed: int = 0) -> np.ndarray:
    """Stacked token masks [P, N, M]."""
    rng = np.random.default_rng(seed)
    return np.stack([random_mask(rng, N, M, kind, unit) for kind in kinds])


def exact(problem: Problem, steps: tuple[int, int] | None = None) -> Results:
    """Run a problem and hold it against float64."""
    tensors = problem.make()
    got = run(problem, tensors, steps)
    check(problem, got, tensors)
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str) -> None:
    exact(Problem(masks([kind], 39, 53), (16, 32), Hq=1, Hkv=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype: torch.dtype) -> None:
    exact(Problem(masks(["codes"], 50, 71, 32), (32, 32), Hq=1, Hkv=1, D=64, DV=64, dtype=dtype))


@pytest.mark.parametrize(
    ("block", "steps"),
    [
        ((16, 16), (16, 16)),
        ((16, 64), (16, 32)),
        ((64, 16), (32, 16)),
        ((32, 64), (16, 32)),
        ((64, 64), (64, 32)),
        ((128, 32), (32, 32)),
        ((32, 256), (32, 128)),
    ],
)
def test_a_step_divides_the_block(block: tuple[int, int], steps: tuple[int, int]) -> None:
    N, M = (40 if size < 128 else 140 for size in block)
    exact(Problem(masks(["codes"], N, M, 32), block, Hq=1, Hkv=1), steps)


@pytest.mark.parametrize("steps", [(16, 32), (32, 16)], ids=str)
def test_tiles_in_the_natural_order(steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As all but sm_90 and the other tests here read them."""
    monkeypatch.setattr(triton_tiles, "FRAGMENTED", ())
    exact(Problem(masks(["codes"], 40, 140, 32), (32, 64), Hq=1, Hkv=1), steps)


@pytest.mark.parametrize(
    ("D", "DV"), [(16, 24), (40, 16), (72, 128), (128, 64), (96, 88), (8, 160), (80, 8), (192, 24)]
)
def test_head_dims(D: int, DV: int) -> None:
    exact(Problem(masks(["empty rows"], 33, 35), (32, 32), Hq=1, Hkv=1, D=D, DV=DV))


def test_groups_of_heads_with_a_pattern_each() -> None:
    m = masks(["causal", "noise", "empty rows"], 20, 33)
    exact(Problem(m, (32, 32), B=2, Hq=4, Hkv=2, pattern_of=[[0, 1, 2, 0], [2, 1, 1, 0]]))


@pytest.mark.parametrize("pattern_of", [[[0, 1]], [[1], [0]]], ids=["by head", "by sample"])
def test_a_pattern_per_head_or_per_sample(pattern_of: list[list[int]]) -> None:
    exact(Problem(masks(["local", "documents"], 20, 33), (16, 32), B=2, Hq=2, Hkv=1, pattern_of=pattern_of))


@pytest.mark.parametrize(("N", "M"), [(1, 40), (40, 1), (0, 5), (5, 0), (17, 64)])
def test_lengths(N: int, M: int) -> None:
    exact(Problem(masks(["dense"], N, M), (16, 32), Hq=2, Hkv=1))


def test_without_a_cotangent_of_lse() -> None:
    exact(Problem(masks(["noise"], 33, 20), (16, 16), Hq=1, Hkv=1, with_dlse=False))


def test_tensors_in_any_layout() -> None:
    problem = Problem(masks(["causal"], 25, 25), (32, 32), Hq=2, Hkv=1)
    plain = problem.make()
    expected = run(problem, plain)
    rows_first = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for n, t in plain.items()}
    # Rows of 17 elements: no two start at the same alignment.
    odd = {n: torch.cat([t, t[..., :1]], -1)[..., :-1] if t.ndim == 4 else t for n, t in plain.items()}
    # Columns that are not contiguous are copied.
    spread = {n: t.repeat_interleave(2, -1)[..., ::2] if t.ndim == 4 else t for n, t in plain.items()}
    for tensors in (rows_first, odd, spread):
        assert not tensors["q"].is_contiguous()
        for x, y in zip(run(problem, tensors), expected, strict=True):
            assert torch.equal(x, y)


def test_a_rerun_is_bitwise_equal_and_full_blocks_may_be_called_partial() -> None:
    problem = Problem(masks(["causal"], 33, 33), (16, 16), Hq=1, Hkv=1)
    tensors = problem.make()
    for x, y in zip(run(problem, tensors), run(problem, tensors), strict=True):
        assert torch.equal(x, y)
    exact(replace(problem, all_partial=True))


def test_queries_that_see_nothing() -> None:
    problem = Problem(masks(["empty rows"], 40, 40), (16, 16), Hq=1, Hkv=1)
    dead = torch.from_numpy(~problem.mask[0].any(-1)).to(DEVICE)
    tensors = problem.make()
    expected = run(problem, tensors)
    tensors["dout"] = tensors["dout"].masked_fill(dead[:, None], 1e30)
    tensors["dlse"] = tensors["dlse"].masked_fill(dead, float("nan"))
    got = run(problem, tensors)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert (got.out[0, 0][dead] == 0).all()
    assert (got.dq[0, 0][dead] == 0).all()
    assert (got.lse[0, 0][dead] == float("-inf")).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the poison itself
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_that_no_query_sees_may_hold_anything(poison: float) -> None:
    mask = masks(["noise"], 40, 70)
    unseen = np.zeros(70, bool)
    unseen[[0, 5, 31, 33, 47, 69, *range(16, 24)]] = True
    mask[:, :, unseen] = False
    problem = Problem(mask, (32, 32), Hq=2, Hkv=1)
    gone = torch.from_numpy(unseen).to(DEVICE)
    tensors = problem.make()
    expected = run(problem, tensors)
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(gone[:, None], poison)
    got = run(problem, tensors)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert (got.dk[:, :, gone] == 0).all()
    assert (got.dv[:, :, gone] == 0).all()


# No shrinking: the interpreter is too slow for it.
@settings(max_examples=6, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_anything_goes_together(data: st.DataObject) -> None:
    draw = data.draw
    N, M = draw(st.integers(1, 48), label="N"), draw(st.integers(1, 48), label="M")
    B, Hkv, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)), label="B, Hkv, group")
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), label="kinds")
    pattern = st.integers(0, len(kinds) - 1)
    by_sample, by_head = draw(st.booleans(), label="by sample"), draw(st.booleans(), label="by head")
    row = st.lists(pattern, min_size=Hkv * group if by_head else 1, max_size=Hkv * group if by_head else 1)
    size = st.sampled_from([16, 32, 64])
    head_dim = st.sampled_from([16, 24, 32, 40, 64])
    problem = Problem(
        masks(kinds, N, M, seed=draw(st.integers(0, 99), label="seed")),
        draw(st.tuples(size, size), label="block"),
        B=B,
        Hq=Hkv * group,
        Hkv=Hkv,
        D=draw(head_dim, label="D"),
        DV=draw(head_dim, label="DV"),
        dtype=draw(st.sampled_from(DTYPES), label="dtype"),
        pattern_of=draw(st.lists(row, min_size=B if by_sample else 1, max_size=B if by_sample else 1)),
        transposed=draw(st.booleans(), label="transposed"),
        with_dlse=draw(st.booleans(), label="dlse"),
    )
    exact(problem, draw(st.none() | st.just((16, 16)), label="steps"))


@triton.jit
def _addresses(x_ptr, to_ptr, head, stride_h, row, stride_n, UNIT: tl.constexpr):
    start = matrix(x_ptr, head * 0, head, 0, stride_h, UNIT)
    at = grid_of(start, row, stride_n, UNIT, 2, 16).to(tl.int64) - x_ptr.to(tl.int64)
    tl.store(to_ptr + tl.arange(0, 2)[:, None] * 16 + tl.arange(0, 16)[None, :], at)


def test_addresses_past_2_to_the_31_elements() -> None:
    x = torch.zeros(1, dtype=torch.float16, device=DEVICE)
    at = torch.zeros((2, 16), dtype=torch.int64, device=DEVICE)
    head, row, stride_h, stride_n = 60, 1_000_000, 1 << 28, 4096
    _addresses[(1,)](x, at, head, stride_h // 8, row, stride_n // 8, 8)
    start = head * stride_h + row * stride_n
    assert start > 1 << 32
    columns = torch.arange(16)
    assert torch.equal(at.cpu(), 2 * (start + torch.stack([columns, stride_n + columns])))
