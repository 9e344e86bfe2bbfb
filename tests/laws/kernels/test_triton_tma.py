"""What the kernels walk, read through tensor descriptors: the same laws, and the same bits."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

from sparseflash.kernels import launch
from sparseflash.kernels.launch import Configuration, Launch
from sparseflash.kernels.triton import backward as triton_backward
from sparseflash.kernels.triton import forward as triton_forward
from sparseflash.kernels.triton.common import in_tiles, tileable
from tests.laws.kernels.harness import DEVICE, DTYPES, KINDS, Problem, Results, check, random_mask, run

pytestmark = [pytest.mark.interpreted, pytest.mark.tier2]

STAGES = 2 if DEVICE == "cuda" else 1


@contextmanager
def launched(steps: tuple[int, int] = (16, 16), tma: bool = True) -> Iterator[list[bool]]:
    """All launches with these steps; the list tells of each kernel whether it was given descriptors."""
    at = Launch(*steps, warps=4, stages=STAGES)
    with_tma, without = (Configuration(*[at._replace(tma=on)] * 3) for on in (tma, False))
    given: list[bool] = []

    def watched(wanted: bool, rows: int, *tensors: torch.Tensor) -> tuple[object, ...]:
        found = in_tiles(wanted, rows, *tensors)
        given.append(found[0] is not None)
        return found

    def chosen(*_: object, tma: bool, **__: object) -> Configuration:
        return with_tma if tma else without

    with mock.patch.multiple(triton_forward, configuration=chosen, in_tiles=watched):  # noqa: SIM117
        with mock.patch.multiple(triton_backward, configuration=chosen, in_tiles=watched):
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
def test_dtypes_steps_splits_and_heads(steps: tuple[int, int], dtype: torch.dtype) -> None:
    more = {"B": 2, "Hq": 4, "Hkv": 2, "pattern_of": [[0, 0, 0, 0]] * 2, "transposed": True}
    p = problem("codes", 70, 140, (64, 64), D=32, DV=16, dtype=dtype, longest=1, **more)
    with launched(steps) as given:
        check(p, run(p, tensors := p.make()), tensors)
    assert all(given)


@pytest.mark.parametrize("width", [24, 40])
def test_widths_that_no_descriptor_takes_come_through_pointers(width: int) -> None:
    p = problem("codes", 40, 40, (16, 16), D=width, DV=width)
    with launched() as given:
        check(p, run(p, tensors := p.make()), tensors)
    assert given == [False] * 3


def test_rows_that_start_between_16_bytes_come_through_pointers() -> None:
    p = problem("codes", 40, 40, (16, 16), dtype=torch.float16)
    tensors = p.make()
    for name in "qkv":
        wide = torch.zeros(1, 1, 40, 20, dtype=torch.float16, device=DEVICE)  # 40 bytes per row
        wide[..., :16] = tensors[name]
        tensors[name] = wide[..., :16]
    with launched() as given:
        check(p, run(p, tensors), tensors)
    assert given == [False] * 3


def test_what_descriptors_can_read() -> None:
    x = torch.zeros(2, 40, 3, 32, dtype=torch.float16, device=DEVICE).transpose(1, 2)
    assert tileable(x, x.contiguous(), x[:, :, 8:], x[:1])
    for odd in (x[..., :24], x[..., 4:20], x[:, :, :0], x[:, :1].expand(-1, 3, -1, -1)):
        assert not tileable(x, odd)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes what is committed for it anyway")
@pytest.mark.parametrize("longest", [None, 1], ids=["whole lines", "splits"])
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (32, 128), (128, 64), (256, 128)], ids=str)
@pytest.mark.parametrize("dims", [(32, 32), (64, 128), (128, 128), (40, 24)], ids=str)
def test_what_is_committed_for_sm_90(dims: tuple[int, int], block: tuple[int, int], longest: int | None) -> None:
    """The launches that a Hopper GPU takes, in the interpreter."""
    p = problem("codes", 150, 140, block, D=dims[0], DV=dims[1], dtype=torch.float16, longest=longest)
    with mock.patch.object(launch, "family", return_value="sm_90"):
        check(p, run(p, tensors := p.make()), tensors)


@pytest.mark.skipif(DEVICE == "cuda", reason="two binaries may round differently")
def test_results_are_the_same_bit_for_bit() -> None:
    p = problem("codes", 40, 90, (32, 32), D=32)
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
