"""The forward pass with products of the next step before the softmax of this one: the same laws."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

import numpy as np
import pytest
import torch

from sparseflash.kernels import triton_forward
from sparseflash.kernels.launch import Configuration, Launch
from sparseflash.kernels.layout import Score
from tests.kernels.numerics.harness import DEVICE, DTYPES, KINDS, Problem, check, random_mask, run


def launched(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int], *, ahead: bool) -> None:
    """All launches with these steps from here on."""
    at = Launch(*steps, warps=4, stages=1)
    chosen = Configuration(at._replace(ahead=ahead), at, at)
    monkeypatch.setattr(triton_forward, "configuration", lambda *_, **__: chosen)


def problem(kind: str, N: int, M: int, block: tuple[int, int], **more: object) -> Problem:
    mask = random_mask(np.random.default_rng(1), N, M, kind)[None]
    return Problem(mask, block, Hq=1, Hkv=1, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, (16, 16), ahead=True)
    p = problem(kind, 39, 53, (16, 32))
    check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [(32, 32), (64, 16), (16, 64)], ids=str)
def test_dtypes_steps_and_pieces(steps: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, steps, ahead=True)
    p = problem("letters", 70, 140, (64, 64), D=24, DV=40, dtype=dtype, longest=1)
    check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the poison itself
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_that_no_query_sees_may_hold_anything(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, (32, 16), ahead=True)
    p = problem("noise", 40, 70, (32, 32))
    unseen = [0, 5, 31, 33, 47, 69, *range(16, 24)]
    p.mask[:, :, unseen] = False
    tensors = p.make()
    clean = run(p, tensors)
    for name in ("k", "v"):
        tensors[name][:, :, unseen] = poison
    for x, y in zip(run(p, tensors), clean, strict=True):
        assert torch.equal(x, y)


@pytest.mark.skipif(DEVICE == "cuda", reason="two binaries may round differently: test_attention_features serves there")
def test_features_are_the_same_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem("letters", 40, 90, (32, 32))
    tensors = p.make()
    rows, _, tiles, pattern_of, block = p.tables()
    score = Score(p.scale, 5.0, torch.tensor([0.5]), 3, 0.3, torch.tensor(9))
    found = []
    for ahead in (False, True):
        launched(monkeypatch, (32, 16), ahead=ahead)
        q, k, v = (tensors[n] for n in "qkv")
        sinks = torch.tensor([0.25])
        found.append(triton_forward.forward(q, k, v, rows, tiles, pattern_of, block, score, sinks))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)
