"""Softcap, ALiBi, sinks and dropout at the public face: errors, compiled graphs, transforms, and closed forms.

With SPARSEFLASH_TEST_BACKEND=triton and a GPU, compiled graphs and other dtypes run on it (``make gpu``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sparseflash as sf
from sparseflash import patterns as P
from tests.laws.backend import DEVICE
from tests.oracle import random_case, random_features

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"scale": 3e38}, ValueError, "scale must be at most 1.7e\\+38.*got 3e\\+38; multiply q instead"),
    ({"softcap": 0}, ValueError, "softcap must be positive, and.*got 0; None leaves scores uncapped"),
    ({"softcap": float("nan")}, ValueError, "softcap must be positive.*got nan"),
    ({"softcap": 1e-45, "scale": 1.0}, ValueError, "softcap must be positive.*got 1e-45"),
    ({"softcap": 3e38}, ValueError, "softcap must be positive.*got 3e\\+38"),
    ({"softcap": True}, TypeError, "softcap must be a number or None, got True"),
    ({"alibi_slopes": [1.0, 2.0]}, TypeError, "alibi_slopes must be a float32 tensor, got list"),
    ({"alibi_slopes": torch.ones(2).double()}, TypeError, "alibi_slopes must be a float32 tensor, got torch.float64"),
    ({"alibi_slopes": torch.ones(3)}, ValueError, r"alibi_slopes must be \[2\] or \[1, 2\] for q .* got \(3,\)"),
    ({"alibi_slopes": torch.ones(2, device="meta")}, ValueError, "alibi_slopes must lie on cpu with q, got meta"),
    ({"alibi_slopes": torch.ones(2, requires_grad=True)}, ValueError, r"no gradient.*alibi_slopes.detach\(\)"),
    ({"bias": 0.5}, TypeError, "bias must be a tensor or None, got 0.5"),
    ({"bias": torch.ones(1, 1, 32, 32).bool()}, TypeError, r"got torch.bool; a mask is given as mask: .*from_dense"),
    ({"bias": torch.ones(2, 3).double()}, TypeError, r"bias must be torch.float32 for.*float64; give bias.to"),
    ({"bias": torch.ones(2, 3).half()}, TypeError, "must be torch.float32 for q of torch.float32, got torch.float16"),
    ({"bias": torch.ones(2, 4)}, ValueError, r"\[2 or 1, 2 R \+ 1\], an odd width.*got \(2, 4\); .*bias\[None, None\]"),
    ({"bias": torch.ones(3, 3)}, ValueError, r"bias must be \[1, 2 or 1, 32 or 1, 32 or 1\].*got \(3, 3\)"),
    ({"bias": torch.ones(2, 32, 32)}, ValueError, r"got \(2, 32, 32\); one of pairs .* dims: bias\[None\]"),
    ({"bias": torch.ones(32)}, ValueError, r"got \(32,\); one .* has four dims: bias\[None, None, None\]"),
    ({"bias": torch.ones(1, 2, 31, 32)}, ValueError, r"for q \(1, 2, 32, 16\) and k .*got \(1, 2, 31, 32\)$"),
    ({"bias": torch.ones(2, 3, device="meta")}, ValueError, "bias must lie on cpu with q, got meta"),
    ({"bias": torch.ones(2, 3).to_sparse()}, ValueError, "bias must be a dense tensor"),
    ({"sinks": 1.0}, TypeError, "sinks must be a floating tensor, got float"),
    ({"sinks": torch.ones(2, dtype=torch.int64)}, TypeError, "sinks must be a floating tensor, got torch.int64"),
    ({"sinks": torch.ones(1, 2)}, ValueError, r"sinks must be \[2\], one a query head.*got \(1, 2\)"),
    ({"sinks": torch.ones(2, device="meta")}, ValueError, "sinks must lie on cpu with q, got meta"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, got 1.0"),
    ({"dropout_p": -0.1}, ValueError, "got -0.1"),
    ({"dropout_p": "half"}, TypeError, "dropout_p must be a number, got 'half'"),
    ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed must be an int, an int64 tensor or None, got 0.5"),
    ({"dropout_p": 0.1, "seed": 1 << 63}, ValueError, "seed must fit in 64 bits with a sign, got 9223372036854775808"),
    ({"dropout_p": 0.1, "seed": torch.ones(1)}, TypeError, r"without dims, got torch.float32 of shape \(1,\)"),
    ({"dropout_p": 0.1, "seed": torch.ones((), dtype=torch.int64, device="meta")}, ValueError, "seed must lie on cpu"),
    ({"deterministic": 1}, TypeError, "deterministic must be True or False, got 1"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD, ids=[c[2] for c in BAD])
def test_errors(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    q = torch.zeros(1, 2, 32, 16)
    with pytest.raises(kind, match=message):
        sf.attention(q, q, q, **arguments)


ON: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": "head"},
    "sinks": {"sinks": 1.0},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": "pairs shared"},
    "bias of queries": {"bias": "queries", "sinks": 1.0},
    "bias of distances": {"bias": "near distances"},
    "all": {"softcap": 3.0, "alibi": "sample", "sinks": 1.0, "dropout_p": 0.3, "bias": "keys"},
}


def on_the_device(x: torch.Tensor) -> torch.Tensor:
    return x.to(DEVICE)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("on", ON.values(), ids=ON)
def test_compiles_into_one_graph(on: dict[str, Any]) -> None:
    torch._dynamo.reset()
    case = random_features(random_case(1, 2, 1, 2, 40, 40, 16, 16, torch.float32), 1, **on).mapped(on_the_device)
    leaves = case.leaves()

    def layer(leaves: list[torch.Tensor]) -> torch.Tensor:
        q, k, v = leaves[:3]
        out: torch.Tensor = sf.attention(q * 2, k, v, P.causal(), **case.arguments(leaves))
        return out.sin()

    plain, graph = layer(leaves), torch.compile(layer, fullgraph=True)(leaves)
    torch.testing.assert_close(graph, plain)
    gradients = [torch.autograd.grad(out.sum(), leaves) for out in (plain, graph)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_one_graph_serves_every_seed_and_offset() -> None:
    torch._dynamo.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def layer(q: torch.Tensor, table: sf.LookupTable, seed: torch.Tensor) -> torch.Tensor:
        return sf.attention(q, q, q, table, alibi_slopes=slopes, dropout_p=0.5, seed=seed)

    q, slopes = torch.randn(1, 2, 30, 16, device=DEVICE), torch.tensor([0.5, 0.1], device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for offset in (3, 4, 5, 6, 7):
        table = sf.lookup(P.local(9).compile(30, block=16, q_offset=offset), DEVICE)
        seed = torch.tensor(offset, device=DEVICE)
        assert torch.equal(compiled(q, table, seed), layer(q, table, seed))
    assert graphs <= 2, "the offset becomes a run-time number when it first changes"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_draws_a_new_seed_at_each_call() -> None:
    torch._dynamo.reset()
    q = torch.randn(1, 2, 30, 16, device=DEVICE)
    layer = torch.compile(lambda q: sf.attention(q, q, q, dropout_p=0.5), fullgraph=True)
    torch.manual_seed(0)
    first, second = layer(q), layer(q)
    torch.manual_seed(0)
    assert torch.equal(first, layer(q))
    assert not torch.equal(first, second)


def test_autocast_casts_q_k_v_and_changes_nothing_else() -> None:
    case = random_features(random_case(3, 1, 2, 1, 50, 50, 16, 16, torch.float32), 3, **ON["all"])
    case = case.mapped(on_the_device)
    results = []
    for enabled in (False, True):
        leaves = case.leaves()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            q, k, v = leaves[:3]
            if not enabled:
                q, k, v = (x.bfloat16() for x in (q, k, v))
            out = sf.attention(q, k, v, P.causal(), **case.arguments(leaves))
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_deterministic_is_what_happens_anyway() -> None:
    q = torch.randn(1, 2, 100, 16)
    assert torch.equal(sf.attention(q, q, q, deterministic=True), sf.attention(q, q, q))


def test_sinks_may_have_another_dtype() -> None:
    case = random_features(random_case(3, 1, 2, 1, 50, 50, 16, 16, torch.bfloat16), 3, sinks=1.0).mapped(on_the_device)
    sinks = case.features.sinks
    assert sinks is not None
    outs = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        leaf = sinks.to(dtype).requires_grad_()
        out = sf.attention(case.q, case.k, case.v, sinks=leaf)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
        assert gradient.dtype == dtype
        outs.append(out)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", ["pairs", "keys", "near distances"])
def test_one_graph_serves_every_length_with_a_bias(form: str) -> None:
    torch._dynamo.reset()
    count, pattern = CompileCounterWithBackend("aot_eager"), P.causal() & P.local(40)

    def layer(q: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sf.attention(q, q, q, pattern, bias=bias)

    graph = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
    frames = set()
    for tokens in (300, 64, 2, 513):
        case = random_features(random_case(tokens, 2, 2, 1, tokens, tokens, 16, 16, torch.float32), 0, bias=form)
        assert case.features.bias is not None
        leaf, other = (case.features.bias.clone().requires_grad_() for _ in range(2))
        out, expected = graph(case.q, leaf), layer(case.q, other)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(x.sin().sum(), y)[0] for x, y in ((out, leaf), (expected, other))))
        frames.add(count.frame_count)
    assert len(frames) == 1, frames


@pytest.mark.parametrize("form", ["pairs by head", "keys", "queries", "near distances"])
def test_transforms_of_a_bias(form: str) -> None:
    case = random_features(random_case(0, 1, 2, 1, 30, 30, 8, 8, torch.float64), 0, bias=form, sinks=1.0)
    bias, sinks = case.features.bias, case.features.sinks
    assert bias is not None

    def loss(bias: torch.Tensor) -> torch.Tensor:
        out, lse = sf.attention(case.q, case.k, case.v, P.local(9), bias=bias, sinks=sinks, return_lse=True)
        return out.square().sum() + lse.cos().sum()

    leaf = bias.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(bias), want)
    several = torch.stack([bias, bias * 0, bias])
    found = torch.func.vmap(torch.func.grad(loss))(several)
    torch.testing.assert_close(found[0], want)
    torch.testing.assert_close(found[1], torch.func.grad(loss)(bias * 0))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(loss, (bias,), (bias,))
    if form != "queries":  # whose gradient is a few operators of torch
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(first.sum(), leaf)


def test_a_bias_may_require_its_gradient_alone() -> None:
    case = random_features(random_case(4, 2, 2, 1, 40, 40, 16, 16, torch.float32), 4, bias="pairs shared")
    bias = case.features.bias
    assert bias is not None
    leaf, (q, k, v) = bias.clone().requires_grad_(), (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    (alone,) = torch.autograd.grad(sf.attention(case.q, case.k, case.v, bias=leaf).sum(), leaf)
    *_, together = torch.autograd.grad(sf.attention(q, k, v, bias=leaf).sum(), (q, k, v, leaf))
    assert torch.equal(alone, together)
    without = torch.autograd.grad(sf.attention(q, k, v, bias=bias).sum(), (q, k, v))
    assert all(x.isfinite().all() for x in without)


def test_features_in_closed_form() -> None:
    """Two keys, scores by hand: 6 and 0, capped at 4, with two biases of distances, beside a sink of 1."""
    q, k = torch.tensor([6.0]).reshape(1, 1, 1, 1), torch.tensor([1.0, 0.0]).reshape(1, 1, 2, 1)
    v = torch.tensor([[10.0], [20.0]]).reshape(1, 1, 2, 1)
    slopes, sinks = torch.tensor([0.5]), torch.tensor([1.0])
    bias = torch.tensor([-7.0, 0.25, 0.75])  # of distances -1, 0 and 1
    out, lse = sf.attention(
        q, k, v, scale=1.0, softcap=4.0, alibi_slopes=slopes, bias=bias[None], sinks=sinks, return_lse=True
    )
    scores = np.array([4 * math.tanh(6 / 4) - 0.5 * 1 - 7, 0.25])  # the query stands at position 1
    weights = np.exp(scores)
    assert math.isclose(float(lse), math.log(weights.sum()), rel_tol=1e-6)
    assert math.isclose(float(out), (weights @ [10, 20]) / (weights.sum() + math.e), rel_tol=1e-6)


def test_the_mask_decides_where_queries_stand() -> None:
    q = torch.randn(1, 2, 8, 16)
    slopes = torch.tensor([0.25, -0.5])
    near, far = (
        sf.attention(q, q, q, P.full().compile(8, block=16, q_offset=o), alibi_slopes=slopes, return_lse=True)[1]
        for o in (100, 110)
    )
    # Every key lies before every query: ten positions more are one factor for all keys of a head.
    torch.testing.assert_close(far, near - 10 * slopes[:, None])


def test_large_offsets_are_exact_enough() -> None:
    q = torch.randn(1, 1, 8, 16)
    table = sf.lookup(P.full().compile(8, block=16, q_offset=1 << 38))
    _, lse = sf.attention(q, q, q, table, alibi_slopes=torch.tensor([2.0**-30]), return_lse=True)
    _, plain = sf.attention(q, q, q, return_lse=True)
    torch.testing.assert_close(lse, plain - 2.0**8, rtol=1e-6, atol=1e-4)
