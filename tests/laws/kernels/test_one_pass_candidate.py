"""A backward in one pass: the same laws but one, a rerun of it may give other bits."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels import candidates
from sparseflash.kernels.candidates import one_pass
from sparseflash.kernels.launch import Key, Launch
from sparseflash.kernels.layout import Score
from sparseflash.kernels.triton import backward as triton_backward
from sparseflash.kernels.triton import forward as triton_forward
from sparseflash.kernels.triton.common import in_tiles, tileable
from tests.laws.kernels.harness import DEVICE, DTYPES, KINDS, Problem, check, random_mask, run

pytestmark = [pytest.mark.interpreted, pytest.mark.tier2]


class _Launched:
    """Stands for a kernel that is not to be launched."""

    def __getitem__(self, grid: object) -> object:
        raise AssertionError("two passes were launched")


class _Everywhere(dict[Key, Launch]):
    """One launch under every key."""

    def __missing__(self, key: Key) -> Launch:
        return self["", 0, ""]

    def get(self, key: Key, default: object = None) -> Launch:
        return self[key]


@contextmanager
def in_one_pass(steps: tuple[int, int] = (16, 16), tma: bool = False) -> Iterator[None]:
    """Backwards run in one pass with these steps, and in no other."""
    at = Launch(*steps, warps=4, stages=2 if DEVICE == "cuda" else 1, tma=tma)

    def readable(wanted: bool, rows: int, *tensors: torch.Tensor) -> tuple[object, ...]:
        # The interpreter knows no reduction through descriptors: there, sums go through pointers.
        sums = len(tensors) == 1
        return in_tiles(wanted and not (sums and DEVICE == "cpu"), rows, *tensors)

    with (
        mock.patch.object(candidates, "backward", partial(one_pass.attempt, _Everywhere({("", 0, ""): at}))),
        mock.patch.object(one_pass, "in_tiles", readable),
        mock.patch.object(one_pass, "tileable", lambda *tensors: DEVICE == "cpu" or tileable(*tensors)),
        mock.patch.object(triton_backward, "keys_kernel", _Launched()),
    ):
        yield


def problem(kind: str, N: int, M: int, block: tuple[int, int], **more: object) -> Problem:
    mask = random_mask(np.random.default_rng(1), N, M, kind)[None]
    return Problem(mask, block, **({"Hq": 1, "Hkv": 1} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str, tma: bool) -> None:
    p = problem(kind, 39, 53, (16, 32))
    with in_one_pass(tma=tma):
        check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [(32, 32), (64, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_dtypes_steps_and_heads(steps: tuple[int, int], dtype: torch.dtype, tma: bool) -> None:
    more = {"B": 2, "Hq": 4, "Hkv": 2, "pattern_of": [[0, 0, 0, 0]] * 2, "transposed": True}
    p = problem("letters", 70, 140, (64, 64), D=32, DV=16, dtype=dtype, **more)
    with in_one_pass(steps, tma):
        check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.parametrize(("D", "DV"), [(16, 24), (40, 16), (72, 64), (8, 80)])
def test_head_dims(D: int, DV: int) -> None:
    p = problem("empty rows", 33, 35, (32, 32), D=D, DV=DV)
    with in_one_pass():
        check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.parametrize(("N", "M"), [(1, 40), (40, 1), (0, 5), (5, 0), (17, 64)])
def test_lengths(N: int, M: int) -> None:
    p = problem("dense", N, M, (16, 32))
    with in_one_pass():
        check(p, run(p, tensors := p.make()), tensors)


def test_patterns_by_head() -> None:
    rng = np.random.default_rng(0)
    mask = np.stack([random_mask(rng, 40, 70, kind) for kind in ("dense", "noise")])
    p = Problem(mask, (16, 16), Hq=4, Hkv=2, pattern_of=[[0, 1, 1, 0]])
    with in_one_pass():
        check(p, run(p, tensors := p.make()), tensors)


def test_two_passes_for_split_lines_and_features() -> None:
    split = replace(problem("dense", 40, 70, (16, 16)), longest=2)
    assert split.tables().columns.slots > 1
    with in_one_pass(), pytest.raises(AssertionError, match="two passes were launched"):
        run(split, split.make())
    p = replace(problem("letters", 40, 64, (32, 32)), Hq=2, Hkv=1)
    q, k, v, dout = (p.make()[name] for name in ("q", "k", "v", "dout"))
    rows, columns, tiles, pattern_of, block = p.tables()
    for score in (Score(0.3, softcap=2.0), Score(0.3, bias=torch.zeros(1, 5, device=DEVICE))):
        out, lse = triton_forward.forward(q, k, v, rows, tiles, pattern_of, block, score)
        with in_one_pass(), pytest.raises(AssertionError, match="two passes were launched"):
            triton_backward.backward(dout, None, q, k, v, out, lse, rows, columns, tiles, pattern_of, block, score)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the poison itself
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_keys_that_no_query_sees_may_hold_anything(poison: float) -> None:
    p = problem("noise", 40, 70, (32, 32))
    p.mask[:, :, [0, 5, 31, 33, 47, 69, *range(16, 24)]] = False
    gone = torch.from_numpy(~p.mask[0].any(0)).to(DEVICE)
    tensors = p.make()
    with in_one_pass():
        expected = run(p, tensors)
        for name in ("k", "v"):
            tensors[name] = tensors[name].masked_fill(gone[:, None], poison)
        got = run(p, tensors)
    check(p, expected, p.make())
    for name, x, y in zip(got._fields, got, expected, strict=True):
        if name == "dq" and DEVICE == "cuda":  # sums come in any order
            torch.testing.assert_close(x, y)
        else:
            assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # where lse is NaN, P is inf
def test_a_key_that_is_seen_and_not_finite_shows() -> None:
    p = problem("dense", 20, 33, (16, 16))
    tensors = p.make()
    tensors["k"][:, :, 7] = float("nan")
    with in_one_pass():
        got = run(p, tensors)
    assert got.dq.isnan().all()


def test_two_passes_where_a_deterministic_gradient_is_asked_for() -> None:
    q, k, v = torch.randn(3, 1, 2, 33, 16, device=DEVICE).requires_grad_().unbind(0)

    def backward(deterministic: bool) -> None:
        sf.attention(q, k, v, P.causal(), backend="triton", deterministic=deterministic).sum().backward()

    with in_one_pass():
        backward(False)
        with pytest.raises(AssertionError, match="two passes were launched"):
            backward(True)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(AssertionError, match="two passes were launched"):
                backward(False)
        finally:
            torch.use_deterministic_algorithms(before)
