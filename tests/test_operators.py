"""The registered operators under torch's own checks, and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sparseflash as sf
import sparseflash.ops  # registers torch.ops.sparseflash
from sparseflash import patterns as P
from sparseflash.kernels.layout import Score
from tests.oracle import random_case

PATTERN = P.causal() & P.local(20)


def arguments(requires_grad: bool, features: bool) -> tuple[object, ...]:
    case = random_case(0, 1, 2, 2, 64, 64, 16, 24, torch.float32)
    table = sf.lookup(PATTERN.compile(64, block=16))
    q, k, v = (x.requires_grad_(requires_grad) for x in (case.q, case.k, case.v))
    sinks = torch.randn(4).requires_grad_(requires_grad) if features else None
    score = Score(0.25, 2.0, torch.rand(4), 0, 0.2, torch.tensor(3)) if features else Score(0.25)
    rows, columns, tiles = list(table.rows), list(table.columns), list(table.tiles)
    return q, k, v, sinks, rows, columns, tiles, table.pattern_of, *table.block, "cpu", *score


@pytest.mark.parametrize("features", [False, True])
def test_opcheck_forward(features: bool) -> None:
    torch.library.opcheck(torch.ops.sparseflash.attention.default, arguments(True, features))


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("with_dlse", [True, False])
def test_opcheck_backward(with_dlse: bool, features: bool) -> None:
    inputs = arguments(False, features)
    out, lse = torch.ops.sparseflash.attention(*inputs)
    dlse = torch.ones_like(lse) if with_dlse else None
    torch.library.opcheck(
        torch.ops.sparseflash.attention_backward.default,
        (torch.ones_like(out), dlse, *inputs[:3], out, lse, *inputs[4:]),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("kind", ["pattern", "mask", "table", "none"])
def test_compiles_into_one_graph(kind: str) -> None:
    mask = PATTERN.compile(64, block=16)
    given: Any = {"pattern": PATTERN, "mask": mask, "table": sf.lookup(mask), "none": None}[kind]
    torch._dynamo.reset()

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = sf.attention(q * 2, k, v, given)
        return out.sin()

    case = random_case(1, 1, 2, 2, 64, 64, 16, 16, torch.float32)
    operands = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    plain, graph = layer(*operands), torch.compile(layer, fullgraph=True)(*operands)
    torch.testing.assert_close(graph, plain)
    gradients = [torch.autograd.grad(out.sum(), operands) for out in (plain, graph)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_again_for_another_length(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    pattern = P.local(5)
    graph = torch.compile(lambda q: sf.attention(q, q, q, pattern), fullgraph=True, dynamic=dynamic)
    for tokens in (64, 96, 50):
        q = random_case(0, 1, 1, 1, tokens, tokens, 16, 16, torch.float32).q
        torch.testing.assert_close(graph(q), sf.attention(q, q, q, pattern))


def test_second_derivatives_are_refused() -> None:
    case = random_case(5, 1, 1, 1, 20, 20, 16, 16, torch.float32)
    q = case.q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sf.attention(q, case.k, case.v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.sum().backward()


def test_a_table_made_in_inference_mode_serves_training() -> None:
    mask = P.local(7).compile(50, block=16)
    case = random_case(2, 1, 1, 1, 50, 50, 16, 16, torch.float32)
    with torch.inference_mode():
        sf.attention(case.q, case.k, case.v, mask)
    q = case.q.clone().requires_grad_()
    sf.attention(q, case.k, case.v, mask).sum().backward()
    assert q.grad is not None


def test_autocast_around_the_call_changes_nothing() -> None:
    case = random_case(3, 1, 1, 1, 50, 50, 16, 16, torch.float32)
    q = case.q.clone().requires_grad_()
    plain = sf.attention(q, case.k, case.v, PATTERN)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sf.attention(q, case.k, case.v, PATTERN)
        (gradient,) = torch.autograd.grad(cast.sum(), q)
    assert torch.equal(plain, cast)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), q)[0])


def test_tables_and_masks_are_cached() -> None:
    mask = PATTERN.compile(64, block=16)
    assert PATTERN.compile(64, block=16) is mask
    assert (P.causal() & P.local(20)).compile((64, 64), block=(16, 16)) is mask
    assert sf.lookup(mask) is sf.lookup(mask, torch.device("cpu"))
    same_content = ~~mask
    assert sf.lookup(same_content) is sf.lookup(mask)
