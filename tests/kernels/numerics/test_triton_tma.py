"""What the kernels walk, read through tensor descriptors: the same laws, and the same bits."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from sparseflash.kernels import triton_backward, triton_forward
from sparseflash.kernels.launch import Configuration, Launch
from sparseflash.kernels.triton_common import in_tiles
from tests.kernels.numerics.harness import DEVICE, DTYPES, KINDS, Problem, Results, check, random_mask, run

STAGES = 2 if DEVICE == "cuda" else 1


@contextmanager
def launched(steps: tuple[int, int] = (16, 16), tma: bool = True) -> Iterator[list[bool]]:
    """All launches with these steps; the list tells of each kernel whether it was given descriptors."""
    chosen = Configuration(*[Launch(*steps, warps=4, stages=STAGES, tma=tma)] * 3)
    given: list[bool] = []

    def watched(wanted: bool, rows: int, *tensors: torch.Tensor) -> tuple[object, ...]:
        found = in_tiles(wanted, rows, *tensors)
        given.append(found[0] is not None)
        return found

    with mock.patch.multiple(triton_forward, configuration=lambda *_: chosen, in_tiles=watched):  # noqa: SIM117
        with mock.patch.multiple(triton_backward, configuration=lambda *_: chosen, in_tiles=watched):
            yield given


def problem(kind: str, N: int, M: int, block: tuple[int, int], **more: object) -> Problem:
    mask = random_mask(np.random.default_rng(1), N, M, kind)[None]
    return Problem(mask, block, **({"Hq": 1, "Hkv": 1} | more))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str) -> None:
    p = problem(kind, 39, 53, (16, 32))
    with launched() as given:
        check(p, run(p, tensors := p.make()), tensors)
    assert given == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [(32, 32), (64, 16), (16, 64)], ids=str)
def test_dtypes_steps_pieces_and_heads(steps: tuple[int, int], dtype: torch.dtype) -> None:
    more = {"B": 2, "Hq": 4, "Hkv": 2, "pattern_of": [[0, 0, 0, 0]] * 2, "transposed": True}
    p = problem("letters", 70, 140, (64, 64), D=32, DV=16, dtype=dtype, longest=1, **more)
    with launched(steps) as given:
        check(p, run(p, tensors := p.make()), tensors)
    assert all(given)


@pytest.mark.parametrize("width", [24, 40])
def test_widths_that_no_descriptor_takes_come_through_pointers(width: int) -> None:
    p = problem("letters", 40, 40, (16, 16), D=width, DV=width)
    with launched() as given:
        check(p, run(p, tensors := p.make()), tensors)
    assert given == [False] * 3


def test_rows_that_start_between_16_bytes_come_through_pointers() -> None:
    p = problem("letters", 40, 40, (16, 16), dtype=torch.float16)
    tensors = p.make()
    for name in "qkv":
        wide = torch.zeros(1, 1, 40, 20, dtype=torch.float16, device=DEVICE)  # 40 bytes a row
        wide[..., :16] = tensors[name]
        tensors[name] = wide[..., :16]
    with launched() as given:
        check(p, run(p, tensors), tensors)
    assert given == [False] * 3


@pytest.mark.skipif(DEVICE == "cuda", reason="two binaries may round differently")
def test_results_are_the_same_bit_for_bit() -> None:
    p = problem("letters", 40, 90, (32, 32), D=32)
    tensors = p.make()
    found: list[Results] = []
    for tma in (False, True):
        with launched((32, 16), tma=tma):
            found.append(run(p, tensors))
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the poison itself
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_that_no_query_sees_may_hold_anything(poison: float) -> None:
    p = problem("noise", 40, 70, (32, 32))
    unseen = [0, 5, 31, 33, 47, 69, *range(16, 24)]
    p.mask[:, :, unseen] = False
    tensors = p.make()
    with launched((32, 16)):
        clean = run(p, tensors)
        for name in ("k", "v"):
            tensors[name][:, :, unseen] = poison
        for x, y in zip(run(p, tensors), clean, strict=True):
            assert torch.equal(x, y)
