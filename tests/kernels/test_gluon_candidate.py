"""The Gluon forward kernel: its source with stand-ins that keep the hazards of the hardware, and compiled on a GPU."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; not for the interpreter", allow_module_level=True)

from sparseflash.kernels import candidates
from sparseflash.kernels.candidates import GluonLaunch, gluon_forward
from sparseflash.kernels.launch import table_key
from sparseflash.kernels.layout import Score
from sparseflash.kernels.triton import forward as triton_forward
from sparseflash.kernels.triton import tiles as triton_tiles
from tests.kernels.gluon_emulator import Emulated, Machine, in_rings
from tests.laws.kernels import harness
from tests.laws.kernels.harness import KINDS, Problem, poisoned, random_mask

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
LAUNCH = GluonLaunch(64, 64, 4, 2)


@pytest.fixture(
    autouse=True,
    params=["stand-ins", pytest.param("GPU", marks=pytest.mark.skipif(not HOPPER, reason="no GPU of sm_90"))],
)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What runs the kernel."""
    monkeypatch.setattr(harness, "DEVICE", "cuda" if request.param == "GPU" else "cpu")
    return str(request.param)


def only_by_stand_ins(machine: str) -> None:
    if machine == "GPU":
        pytest.skip("looks into what the stand-ins saw")


def launched(
    problem: Problem, tensors: dict[str, torch.Tensor], at: GluonLaunch = LAUNCH, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, Emulated]:
    """Output, lse and what the stand-ins saw."""
    rows, _, tiles, pattern_of, block = problem.tables()
    kernel = Emulated()
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    with ExitStack() as stack:
        stack.enter_context(poisoned())
        key = table_key(q.device, max(q.shape[-1], v.shape[-1]), q.dtype)
        attempt = partial(gluon_forward.attempt, {key: at})
        run = stack.enter_context(mock.patch.object(candidates, "forward", side_effect=attempt))
        if q.device.type == "cpu":
            stack.enter_context(mock.patch.object(triton_tiles, "family", return_value="sm_90"))
            stack.enter_context(mock.patch.multiple(gluon_forward, gluon_kernel=kernel, in_rings=in_rings))
            stack.enter_context(mock.patch.object(gluon_forward, "multiprocessors", return_value=1))
        out, lse = triton_forward.forward(q, k, v, rows, tiles, pattern_of, block, Score(problem.scale), sinks)
    assert run.called
    return out, lse, kernel


def check(problem: Problem, at: GluonLaunch = LAUNCH, tensors: dict[str, torch.Tensor] | None = None) -> Emulated:
    """Output and lse by the tolerance law."""
    tensors = tensors or problem.make()
    out, lse, kernel = launched(problem, tensors, at)
    harness.check(problem, (out, lse), tensors)
    return kernel


def problem(kinds: tuple[str, ...], N: int, M: int, block: tuple[int, int], **more: Any) -> Problem:
    rng = np.random.default_rng(1)
    mask = np.stack([random_mask(rng, N, M, kind, 32) for kind in kinds])
    usual: dict[str, Any] = {"Hq": 1, "Hkv": 1, "D": 32, "DV": 32, "dtype": torch.bfloat16}
    return Problem(mask, block, **(usual | more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str, dtype: torch.dtype) -> None:
    check(problem((kind,), 150, 290, (64, 64), dtype=dtype))


@pytest.mark.parametrize(
    ("block", "at"),
    [
        ((128, 128), LAUNCH),
        ((64, 256), LAUNCH._replace(BN=128, stages=3)),
        ((128, 64), LAUNCH._replace(BM=128, warps=8, stages=4)),
        ((256, 128), LAUNCH._replace(BM=128, BN=128, warps=8)),
    ],
    ids=str,
)
def test_steps_and_stages(block: tuple[int, int], at: GluonLaunch) -> None:
    check(problem(("codes",), 300, 400, block), at)


@pytest.mark.parametrize(("D", "DV"), [(16, 64), (64, 16), (128, 128)])
def test_head_dims(D: int, DV: int) -> None:
    check(problem(("empty rows",), 70, 200, (64, 64), D=D, DV=DV))


@pytest.mark.parametrize(("N", "M"), [(1, 300), (300, 1), (64, 64), (65, 129)])
def test_lengths(N: int, M: int) -> None:
    check(problem(("dense",), N, M, (64, 64)))


def test_heads_samples_and_layouts() -> None:
    p = problem(("causal", "noise", "nothing"), 130, 200, (64, 64), B=2, Hq=4, Hkv=2, transposed=True)
    p.pattern_of = [[0, 1, 2, 0], [2, 1, 1, 0]]
    check(p)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_anything_goes_together(data: st.DataObject) -> None:
    draw = data.draw
    N, M = draw(st.integers(1, 300), label="N"), draw(st.integers(1, 300), label="M")
    B, Hkv, group = draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2)), label="B, Hkv, group")
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3), label="kinds")
    BM, BN = draw(st.sampled_from([64, 128]), label="BM"), draw(st.sampled_from([32, 64, 128]), label="BN")
    stages = draw(st.integers(2, 4), label="stages")
    block = draw(st.tuples(*(st.sampled_from([x for x in (64, 128, 256) if x >= step]) for step in (BM, BN))))
    row = st.lists(st.integers(0, len(kinds) - 1), min_size=Hkv * group, max_size=Hkv * group)
    head_dim = st.sampled_from([16, 32, 64])
    p = problem(
        tuple(kinds), N, M, block, B=B, Hq=Hkv * group, Hkv=Hkv,
        D=draw(head_dim, label="D"), DV=draw(head_dim, label="DV"),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16]), label="dtype"),
        pattern_of=draw(st.lists(row, min_size=B, max_size=B)), transposed=draw(st.booleans(), label="transposed"),
        all_partial=draw(st.booleans(), label="all partial"), seed=draw(st.integers(0, 99), label="seed"),
    )  # fmt: skip
    persistent = draw(st.sampled_from([0, 1, 3]), label="persistent")
    check(p, GluonLaunch(BM, BN, BM // 16, stages, persistent))


@pytest.mark.parametrize("programs", [1, 2, 7, 100])
@pytest.mark.parametrize("kind", ["causal", "empty rows", "nothing", "codes"])
def test_a_program_may_take_many_lines(kind: str, programs: int, machine: str) -> None:
    p = problem((kind,), 300, 200, (64, 64), Hq=2)
    p.Hkv = 2
    kernel = check(p, LAUNCH._replace(persistent=programs))
    if machine == "stand-ins":
        assert kernel.programs == min(programs, 2 * 5), "two heads of five block rows"


def test_only_the_blocks_of_the_table_are_computed(machine: str) -> None:
    only_by_stand_ins(machine)
    p = problem(("local",), 256, 256, (64, 64))
    kernel = check(p)
    rows = p.tables().rows
    stored = len(rows.partial_indices) + int((rows.ranges[..., 1] - rows.ranges[..., 0]).sum())
    assert kernel.products == 2 * stored, "two products for each block, and none past the last"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_that_no_query_sees_may_hold_anything(poison: float) -> None:
    p = problem(("noise",), 100, 200, (64, 64))
    p.mask[:, :, [0, 5, 31, 33, 130, *range(16, 24), 199]] = False
    gone = torch.from_numpy(~p.mask[0].any(0)).to(harness.DEVICE)
    tensors = p.make()
    expected = launched(p, tensors)[:2]
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(gone[:, None], poison)
    for x, y in zip(launched(p, tensors)[:2], expected, strict=True):
        assert torch.equal(x, y)


def test_sinks_take_their_share() -> None:
    p = problem(("empty rows",), 70, 100, (64, 64), Hq=2)
    p.Hkv = 2
    tensors = p.make()
    sinks = torch.tensor([0.5, -1.0], device=tensors["q"].device)
    out, lse, _ = launched(p, tensors, sinks=sinks)
    plain, same, _ = launched(p, tensors)
    assert torch.equal(lse, same)
    share = torch.sigmoid(lse - sinks[:, None])[..., None]
    torch.testing.assert_close(out.float(), plain.float() * share, rtol=1e-2, atol=1e-3)


class _Committed:
    """Stands for the committed kernel."""

    def __getitem__(self, grid: object) -> object:
        raise AssertionError("the committed kernel was launched")


@pytest.mark.parametrize("why", ["a step longer than the block", "split lines"])
def test_what_the_kernel_cannot_do_runs_elsewhere(why: str) -> None:
    p = problem(("dense",), 70, 300, (64, 64), longest=2) if "split" in why else problem(("dense",), 70, 100, (32, 64))
    committed = mock.patch.object(triton_forward, "forward_kernel", _Committed())
    with committed, pytest.raises(AssertionError, match="the committed kernel was launched"):
        launched(p, p.make())


@pytest.mark.parametrize("left_out", ["barrier", "fence"])
def test_the_stand_ins_notice_what_is_left_out(left_out: str, machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only_by_stand_ins(machine)
    settle = Machine.settle
    monkeypatch.setattr(Machine, "settle", lambda self, what: None if what == left_out else settle(self, what))
    p = problem(("noise",), 100, 400, (64, 64))
    with pytest.raises(AssertionError, match="barrier"):
        launched(p, p.make())


def test_the_stand_ins_notice_a_result_that_nobody_waited_for(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only_by_stand_ins(machine)
    finish = Machine.finish
    monkeypatch.setattr(Machine, "finish", lambda self, outstanding, deps: finish(self, outstanding + 1, deps))
    p = problem(("noise",), 100, 400, (64, 64))
    with pytest.raises(AssertionError, match="while its product is under way"):
        launched(p, p.make())


def test_values_of_keys_that_nobody_sees_have_to_be_cleaned(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    only_by_stand_ins(machine)
    p = problem(("noise",), 100, 400, (64, 64))
    p.mask[:, :, :8] = False
    tensors = p.make()
    tensors["v"][:, :, :8] = float("nan")
    assert launched(p, tensors)[0].isfinite().all()
    monkeypatch.setattr(gluon_forward, "_clean", SimpleNamespace(fn=lambda *_: None, arg_names=()))
    assert launched(p, tensors)[0].isnan().all()
