"""The registered operators under torch's own checks, and torch.compile."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from torch._dynamo.testing import CompileCounterWithBackend

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.functional.operators import MaskArguments
from sparseflash.kernels.layout import Score
from sparseflash.tables.packing import Header, pack, unpack
from tests.oracle import random_case

PATTERN = P.causal() & P.local(20)


def arguments(requires_grad: bool, features: bool, kind: str) -> tuple[object, ...]:
    case = random_case(0, 1, 2, 2, 64, 64, 16, 24, torch.float32)
    table = sf.lookup(PATTERN.compile(64, block=16))
    mask = {"tensors": MaskArguments.of(table), "packed": MaskArguments.packed(table)}.get(kind)
    mask = mask or MaskArguments.named(PATTERN, (16, 16))
    q, k, v = (x.requires_grad_(requires_grad) for x in (case.q, case.k, case.v))
    sinks = torch.randn(4).requires_grad_(requires_grad) if features else None
    bias = torch.randn(1, 4, 1, 64).requires_grad_(requires_grad) if features else None
    score = Score(0.25, 2.0, torch.rand(4), 0, 0.2, torch.tensor(3)) if features else Score(0.25)
    return q, k, v, sinks, bias, *mask, "cpu", False, *score[:-1]


MASKS = pytest.mark.parametrize(
    ("kind", "features"), [("tensors", False), ("tensors", True), ("packed", True), ("named", True)]
)


@MASKS
def test_opcheck_forward(kind: str, features: bool) -> None:
    torch.library.opcheck(torch.ops.sparseflash.attention.default, arguments(True, features, kind))


@MASKS
@pytest.mark.parametrize("with_dlse", [True, False])
def test_opcheck_backward(with_dlse: bool, kind: str, features: bool) -> None:
    inputs = arguments(False, features, kind)
    out, lse = torch.ops.sparseflash.attention(*inputs)
    dlse = torch.ones_like(lse) if with_dlse else None
    given = torch.ones_like(out), dlse, *inputs[:3], out, lse, *inputs[4:]
    torch.library.opcheck(torch.ops.sparseflash.attention_backward.default, given)
    if features:
        *mask, backend, _deterministic = given[8:13]
        of_bias = *given[:8], *mask, backend, *given[13:]
        torch.library.opcheck(torch.ops.sparseflash.attention_bias_backward.default, of_bias)


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


def agrees(graph: Any, tokens: int, mask: P.Pattern | sf.BlockMask | None, *given: object) -> None:
    """The compiled attention and its gradient are those of the mask."""
    case = random_case(0, 2, 2, 2, tokens, tokens, 16, 16, torch.float32)
    q, k, v = case.q, case.k, case.v
    leaf, other = q.clone().requires_grad_(), q.clone().requires_grad_()
    out, expected = graph(leaf, k, v, *given), sf.attention(other, k, v, mask)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), y)[0] for x, y in ((out, leaf), (expected, other))))


LENGTHS = (300, 64, 2, 513, 2500)  # torch.compile sets lengths of 1 apart
NAMED = [
    P.causal() & P.local(40),
    P.per_head(*[P.local(5), P.full()] * 2),
    P.where(lambda q, k: (q + k) % 3 == 0),
    P.from_blocks(np.tri(40, dtype=bool), unit=64),
    None,
]


@pytest.mark.parametrize("mask", NAMED, ids=str)
def test_one_graph_of_a_pattern_serves_every_length(mask: P.Pattern | None) -> None:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(lambda q, k, v: sf.attention(q, k, v, mask), backend=count, fullgraph=True, dynamic=True)
    frames = set()
    for tokens in LENGTHS:
        agrees(graph, tokens, mask)
        frames.add(count.frame_count)
    assert len(frames) == 1, frames


MASKS_OF: list[Callable[[int], P.Pattern]] = [
    lambda n: P.causal(),
    lambda n: P.full(),
    lambda n: P.documents([n // 2, n - n // 2]),
    lambda n: P.causal() & P.local(9) | P.global_tokens(2),  # heavy rows, split
    lambda n: P.per_head(P.local(3), P.butterfly(unit=16), P.full(), P.causal()),
]


def test_one_graph_serves_every_mask_of_every_length() -> None:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(sf.attention, backend=count, fullgraph=True, dynamic=True)
    frames = set()
    for tokens in LENGTHS:
        for block in (64, (16, 128)) if tokens < 1000 else (64,):
            for mask_of in MASKS_OF:
                mask = mask_of(tokens)
                agrees(graph, tokens, mask.compile(tokens, block=block), sf.lookup(mask.compile(tokens, block=block)))
                frames.add(count.frame_count)
    assert len(frames) == 1, frames


def test_a_graph_told_no_lengths_learns_that_they_change() -> None:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    pattern = P.local(5)
    graph = torch.compile(lambda q, k, v: sf.attention(q, k, v, pattern), backend=count, fullgraph=True)
    frames = []
    for tokens in (64, 96, 50, 200):
        agrees(graph, tokens, pattern)
        frames.append(count.frame_count)
    assert frames[1:] == [frames[1]] * 3, frames


def test_a_graph_refuses_a_mask_that_does_not_fit_when_it_runs() -> None:
    torch._dynamo.reset()
    graph = torch.compile(sf.attention, backend="eager", fullgraph=True, dynamic=True)
    case = random_case(0, 2, 2, 2, 60, 60, 16, 16, torch.float32)
    q, k, v = case.q, case.k, case.v
    with pytest.raises(ValueError, match=r"for \(q_len, kv_len\) = \(61, 61\), q and k have \(60, 60\) tokens"):
        graph(q, k, v, sf.lookup(P.causal().compile(61)))
    with pytest.raises(ValueError, match="for 3 query heads, q has 4"):
        graph(q, k, v, sf.lookup(P.per_head(*[P.causal()] * 2, P.full()).compile(60)))


@pytest.mark.tier2
@given(
    st.lists(arrays(np.int32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)), max_size=17, min_size=17)
)
def test_a_packed_table_is_unpacked_again(parts: list[NDArray[np.int32]]) -> None:
    header = Header(3, 1 << 40, 16, 256, -7)
    buffer, layout = pack(header, parts, torch.device("cpu"))
    found, contents = unpack(buffer, layout)
    assert found == header
    assert min(layout) >= 2
    for part, tensor in zip(parts, contents.flat, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), part)
        assert tensor.storage_offset() % 32 == 0
    assert unpack(buffer, list(layout))[1] is contents
    alive = weakref.ref(buffer)
    del buffer, contents, tensor
    gc.collect()
    assert alive() is None


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


def test_autocast_casts_the_operands_and_changes_nothing_else() -> None:
    case = random_case(3, 1, 1, 1, 50, 50, 16, 16, torch.float32)
    q = case.q.clone().requires_grad_()
    plain = sf.attention(q.bfloat16(), case.k.bfloat16(), case.v.bfloat16(), PATTERN)
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_a_graph_is_for_the_very_mask() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 1, 64, 16)
    graph = torch.compile(sf.attention, backend="eager", fullgraph=True)
    for mask in (P.local(5), P.local(9), P.local(5), P.local(5).compile(64), P.local(9).compile(64)):
        torch.testing.assert_close(graph(q, q, q, mask), sf.attention(q, q, q, mask))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_a_pattern_made_inside_of_a_compiled_function_is_refused() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 1, 64, 16)
    graph = torch.compile(lambda q: sf.attention(q, q, q, P.local(5)), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"a Local was made inside of a compiled function"):
        graph(q)
