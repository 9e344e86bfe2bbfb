"""Laws of an additive bias: its two forms are one, -inf hides a pair, and no memory of pairs is made for distances.

That attention with a bias is masked dense attention, beside every other feature, is law 5. Runs on every backend, as
the attention laws do.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels.bias import summed
from sparseflash.kernels.cpu import native
from tests.laws.backend import BACKEND, DEVICE
from tests.laws.test_attention_laws import Drawn, drawn
from tests.oracle import BIASES, Case, by_pair, check, ours, random_case, random_features

# Interpreted, kernels are numpy, which warns of what is asked of them here.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

FORMS = st.sampled_from(list(BIASES))


def biased(d: Drawn, form: str) -> Case:
    """The case with a bias of this form whatever was drawn."""
    return dataclasses.replace(d, features=d.features | {"bias": form}).case()


def with_bias(case: Case, bias: torch.Tensor) -> Case:
    return dataclasses.replace(case, features=dataclasses.replace(case.features, bias=bias))


def bias_of(case: Case) -> torch.Tensor:
    assert case.features.bias is not None
    return case.features.bias


@given(drawn(), FORMS, st.sampled_from([0.02, 0.4, 1.0]), st.integers(0, 1 << 16))
def test_minus_infinity_hides_a_pair(d: Drawn, form: str, share: float, seed: int) -> None:
    mask, case = d.mask(), biased(d, form)
    chosen = torch.rand(bias_of(case).shape, generator=torch.Generator().manual_seed(seed)) < share
    hiding = with_bias(case, bias_of(case).masked_fill(chosen, -torch.inf))
    truth = torch.from_numpy(mask.to_dense()) & (by_pair(hiding, bias_of(hiding)) != -torch.inf)
    results = ours(hiding, mask, BACKEND)
    assert not any(x.isnan().any() for x in results)
    check(hiding, truth, results)
    blind = ~truth.expand(*case.q.shape[:3], case.k.shape[2]).any(3)
    assert (results[0][blind] == 0).all()
    assert (results[1][blind] == -torch.inf).all()
    assert (results[2][blind] == 0).all()
    assert (results[-1][chosen] == 0).all()
    # Products that overflow, and cotangents of rows that see nothing, are hidden too.
    infinite = dataclasses.replace(hiding, dlse=hiding.dlse.masked_fill(blind, torch.nan))
    for want, got in zip(results, ours(infinite, mask, BACKEND), strict=True):
        assert torch.equal(want, got)


@given(drawn(), st.sampled_from(["pairs", "pairs by head", "pairs by sample", "pairs shared"]), st.data())
def test_a_bias_of_hidden_pairs_leaves_no_trace(d: Drawn, form: str, data: st.DataObject) -> None:
    mask, case = d.mask(), biased(d, form)
    value = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 6e4]), label="value")
    truth = torch.from_numpy(mask.to_dense()).expand(*case.q.shape[:3], case.k.shape[2])
    seen = summed(truth.double(), bias_of(case).shape) > 0
    results = ours(case, mask, BACKEND)
    hidden = ours(with_bias(case, bias_of(case).masked_fill(~seen, value)), mask, BACKEND)
    for want, got in zip(results, hidden, strict=True):
        assert torch.equal(want, got)
    assert (results[-1][~seen] == 0).all()


@given(drawn(), FORMS)
def test_nan_reaches_those_that_see_it(d: Drawn, form: str) -> None:
    d = dataclasses.replace(d, features={name: x for name, x in d.features.items() if name != "dropout_p"})
    mask, case = d.mask(), biased(d, form)
    bias = bias_of(case).clone()
    bias.view(-1)[d.seed % bias.numel()] = math.nan
    poisoned = with_bias(case, bias)
    truth = torch.from_numpy(mask.to_dense()).expand(*case.q.shape[:3], case.k.shape[2])
    met = (truth & by_pair(poisoned, bias).isnan()).any(3)
    out, lse, dq = ours(poisoned, mask, BACKEND)[:3]
    assert out[met].isnan().all()
    assert lse[met].isnan().all()
    assert dq[met].isnan().all()
    assert not lse[~met].isnan().any()


@given(drawn(), st.sampled_from(["near distances", "distances shared", "all distances"]))
def test_distances_are_pairs(d: Drawn, form: str) -> None:
    mask, case = d.mask(), biased(d, form)
    pairs = with_bias(case, by_pair(case, bias_of(case)).unsqueeze(0))
    for of_distances, of_pairs in zip(ours(case, mask, BACKEND)[:2], ours(pairs, mask, BACKEND)[:2], strict=True):
        assert torch.equal(of_distances, of_pairs)


@pytest.mark.parametrize("form", ["near distances", "all distances"])
def test_distances_are_summed_in_parts_where_memory_is_short(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_features(random_case(6, 1, 1, 2, 40, 70, 16, 16, torch.float32), 6, bias=form)
    mask = (P.local(20) | P.strided(5)).compile((40, 70), block=16)
    whole = ours(case, mask, BACKEND)
    if BACKEND == "triton":
        from sparseflash.kernels.triton import backward_bias

        monkeypatch.setattr(backward_bias, "MEMORY", 4 * 3 * bias_of(case).numel())
    monkeypatch.setattr(native, "SUMS", 4 * 3 * bias_of(case).numel())
    in_parts = ours(case, mask, BACKEND)
    check(case, torch.from_numpy(mask.to_dense()), in_parts)
    for want, got in zip(whole[:-1], in_parts[:-1], strict=True):
        assert torch.equal(want, got)


@pytest.mark.parametrize("form", ["pairs", "keys", "queries", "near distances"])
def test_strides_are_any(form: str) -> None:
    case = random_features(random_case(2, 2, 1, 2, 33, 47, 16, 16, torch.float32), 2, bias=form)
    case = case.mapped(lambda x: x.to(DEVICE))
    mask = P.local(20).compile((33, 47), block=16)
    bias = bias_of(case)
    turned = bias.transpose(-1, -2).contiguous().transpose(-1, -2)
    apart = torch.stack([bias, bias], -1)[..., 0]
    results = []
    for given_bias in (bias, turned, apart):
        leaf = given_bias.detach().requires_grad_()
        out = sf.attention(case.q, case.k, case.v, mask, bias=leaf, backend=BACKEND)
        results.append((out, *torch.autograd.grad(out, leaf, case.dout)))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("form", list(BIASES))
def test_what_is_expanded_has_the_gradient_of_what_it_is(form: str) -> None:
    case = random_features(random_case(3, 2, 1, 2, 20, 37, 16, 16, torch.float32), 3, bias=form)
    case = case.mapped(lambda x: x.to(DEVICE))
    mask = P.local(9).compile((20, 37), block=16)
    bias = bias_of(case)
    whole = (2, 2, 20, 37) if bias.dim() == 4 else (2, bias.shape[1])
    results = []
    for expand in (False, True):
        leaf = bias.detach().requires_grad_()
        out = sf.attention(case.q, case.k, case.v, mask, bias=leaf.expand(whole) if expand else leaf, backend=BACKEND)
        results.append((out, *torch.autograd.grad(out, leaf, case.dout)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)
