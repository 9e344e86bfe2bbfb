"""The helpers of scores and dropout inside kernels: tanh's accuracy, and bits equal to those of the CPU."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from sparseflash.kernels import dropout
from sparseflash.kernels.launch import Configuration, Launch
from sparseflash.kernels.layout import Score
from sparseflash.kernels.triton import forward as triton_forward
from sparseflash.kernels.triton.score import head_key, keep_mask, row_keys, tanh
from sparseflash.reference import dropout_mask
from tests.laws.kernels.harness import DEVICE, Problem, random_mask

pytestmark = pytest.mark.interpreted


@triton.jit
def _tanh(x_ptr, to_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(to_ptr + at, tanh(tl.load(x_ptr + at)))


def test_tanh_is_near_to_a_few_units_in_the_last_place() -> None:
    sizes = torch.cat([torch.logspace(-30, 1.5, 2048), torch.linspace(0.55, 0.7, 1024), torch.linspace(0, 12, 1020)])
    x = torch.cat([sizes, -sizes, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e30, -1e30, 1e-40, 88.0])])
    x = x[: 1 << 13].to(DEVICE)
    got = torch.empty_like(x)
    _tanh[(1,)](x, got, x.numel())
    want = x.double().tanh()
    error = (got.double() - want).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * want.abs() + 2**-149).all()
    assert torch.equal(got.sign(), want.sign().float())


@triton.jit
def _bits(seed_ptr, to_ptr, first_row, first_key, index, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    rows, keys = tl.arange(0, ROWS), tl.arange(0, KEYS)
    drawn = keep_mask(
        row_keys(head_key(seed_ptr, index), first_row + rows)[:, None], (first_key + keys)[None, :], threshold
    )
    tl.store(to_ptr + rows[:, None] * KEYS + keys[None, :], drawn.to(tl.int32))


@pytest.mark.parametrize("seed", [0, 7, -1, -(1 << 50) + 3, (1 << 63) - 1])
def test_bits_are_those_of_the_cpu(seed: int) -> None:
    limit = dropout.threshold(0.37)
    for index, row, key in ((0, 0, 0), (5, 100, 32), (70_000, 1 << 20, (1 << 24) + 9)):
        got = torch.empty((32, 64), dtype=torch.int32, device=DEVICE)
        _bits[(1,)](torch.tensor(seed, device=DEVICE), got, row, key, index, limit, 32, 64)
        rows = dropout.row_keys(torch.tensor(seed), torch.tensor(index), torch.arange(row, row + 32))
        want = dropout.keep_mask(rows[:, None], torch.arange(key, key + 64), limit)
        assert torch.equal(got.cpu().bool(), want)


@pytest.mark.parametrize("steps", [(16, 16), (32, 16), (16, 32)])
def test_bits_do_not_depend_on_the_steps(steps: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = Configuration(*[Launch(*steps, warps=4, stages=1)] * 3)
    monkeypatch.setattr(triton_forward, "configuration", lambda *_, **__: chosen)
    problem = Problem(random_mask(np.random.default_rng(0), 33, 32, "dense")[None], (32, 32), DV=32)
    rows, _, tiles, pattern_of, block = problem.tables()
    zeros = torch.zeros((1, 2, 33, 16), device=DEVICE)
    v = torch.eye(32, device=DEVICE).expand(1, 2, 32, 32)
    score = Score(1.0, dropout=0.5, seed=torch.tensor(9))
    out, _ = triton_forward.forward(zeros, zeros[:, :, :32], v, rows, tiles, pattern_of, block, score)
    assert torch.equal((out > 0).cpu(), dropout_mask((1, 2, 33, 32), 0.5, 9))
