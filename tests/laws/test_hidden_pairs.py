"""Law 9 for pairs: where a mask hides a key from a query, what either holds does not matter to the other.

While operands are finite that is so of every result, however large they are and also where products overflow. NaN and
inf in queries and keys are kept from `out` and `lse` as well. But where a result is a sum of an operand with weights
that are 0 for hidden pairs, a NaN or inf in it may reach all that share a block of the mask with it: 0 * NaN is NaN.
These sums are out of v, dq of k, dk of q, dv of dout. Runs on every backend, as the attention laws do.
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
from sparseflash.patterns import BlockMask
from sparseflash.reference import dropout_mask
from tests.laws.backend import BACKEND, DEVICE
from tests.laws.test_attention_laws import Drawn, drawn
from tests.oracle import Case, Features, check, eager, ours, random_case

# Interpreted, kernels are numpy, which warns of what is asked of them here.
pytestmark = [pytest.mark.interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

OPERANDS = "q", "k", "v", "dout", "dlse"
HUGE = {torch.float16: 6e4, torch.bfloat16: 3e38, torch.float32: 3e38}


def reach(operand: str, bad: torch.Tensor, sees: torch.Tensor, block: tuple[int, int] | None) -> list[torch.Tensor]:
    """Which rows of out, lse, dq, dk, dv may depend on the `bad` [B, H, tokens] rows of an operand.

    `sees` [B, Hq, N, M] is the mask; with a block, sums with weights of 0 count too.
    """
    group = sees.shape[1] // bad.shape[1] if operand in ("k", "v") else 0
    nobody = torch.zeros_like(sees[..., 0])
    near = sees if block is None else stored(sees, block[0], 1)

    def keys(pairs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (pairs & rows.unsqueeze(-1)).any(2)  # [B, Hq, M]

    if operand in ("k", "v"):
        columns = bad.repeat_interleave(group, 1).unsqueeze(2)
        rows, wide = ((pairs & columns).any(3) for pairs in (sees, near))
        if operand == "k":
            return [rows, rows, wide, keys(sees, rows), keys(sees, rows)]
        return [wide, nobody, wide, keys(sees, wide), keys(sees, nobody)]
    seen, blocks = keys(sees, bad), keys(sees if block is None else stored(sees, *block), bad)
    if operand == "q":
        return [bad, bad, bad, blocks, seen]
    return [nobody, nobody, bad, seen, blocks if operand == "dout" else keys(sees, nobody)]


def stored(sees: torch.Tensor, bq: int, bk: int) -> torch.Tensor:
    """The pairs of blocks bq x bk in which some pair is visible."""
    (N, M), like = sees.shape[2:], sees.float()
    padded = torch.nn.functional.pad(like, (0, -M % bk, 0, -N % bq))
    blocks = padded.unflatten(3, (-1, bk)).unflatten(2, (-1, bq)).amax((3, 5))
    return torch.gt(blocks.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :N, :M], 0)


def check_what_is_out_of_reach(
    d: Drawn, mask: BlockMask, case: Case, operand: str, where: tuple[int, int], value: float
) -> None:
    """One row of an operand, or one number of it where the value is not finite, becomes `value`."""
    truth = torch.from_numpy(mask.to_dense())
    sees = truth.expand(*case.q.shape[:3], case.k.shape[2])
    group = case.q.shape[1] // case.k.shape[1]
    x = getattr(case, operand).clone()
    head, token = where[0] % x.shape[1], where[1] % x.shape[2]
    x[-1, head, token] = value
    bad = torch.zeros(x.shape[:3], dtype=torch.bool)
    bad[-1, head, token] = True
    results = ours(dataclasses.replace(case, **{operand: x}), mask, BACKEND)
    touched = reach(operand, bad, sees, None if math.isfinite(value) else mask.block)
    exact = eager(case.to(torch.float64), truth)
    for i in (3, 4):
        touched[i] = touched[i].unflatten(1, (-1, group)).any(2)
    known = []
    everything = torch.ones((), dtype=torch.bool)  # of sinks and bias, which others share
    for name, got, want, lost in zip(case.names, results, exact, [*touched, everything, everything], strict=False):
        lost = lost if name in ("lse", "dsinks", "dbias") else lost.unsqueeze(-1)
        known.append(torch.where(lost, want, got.double()))
    check(case, truth, known)
    if math.isnan(value):
        # And nothing is hidden from those that see it.
        if operand in ("k", "v"):
            met = sees & bad.repeat_interleave(group, 1).unsqueeze(2)
            if operand == "v" and case.features.dropout_p:  # a dropped pair takes no value
                met = met & dropout_mask(tuple(sees.shape), case.features.dropout_p, case.features.seed)
            rows = met.any(3)
        else:
            rows = bad & sees.any(3)
        assert results[2][rows].isnan().all() or operand == "dlse"
        if operand in ("q", "k", "v"):
            assert results[0][rows].isnan().all()
        if operand in ("q", "k"):
            assert results[1][rows].isnan().all()


@given(drawn(), st.sampled_from(OPERANDS), st.tuples(st.integers(0, 3), st.integers(0, 500)), st.data())
def test_law_9_hidden_pairs_leave_no_trace(d: Drawn, operand: str, where: tuple[int, int], data: st.DataObject) -> None:
    huge = HUGE[d.dtype]
    values = [huge, -huge, math.nan, math.inf, -math.inf] if operand != "dlse" else [1e30, math.nan]
    mask, case = d.mask(), d.case()
    check_what_is_out_of_reach(d, mask, case, operand, where, data.draw(st.sampled_from(values), label="value"))


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-40])
@pytest.mark.parametrize(
    "features",
    [Features(), Features(softcap=2.0), Features(alibi_slopes=torch.tensor([0.1]), sinks=torch.tensor([1.0]))],
    ids=["plain", "softcap", "alibi and sinks"],
)
def test_without_a_scale_all_that_is_seen_weighs_the_same(scale: float, features: Features) -> None:
    mask = (P.causal() & P.local(9)).compile(40, block=16)
    for dtype in (torch.float32, torch.float16):
        case = random_case(2, 1, 1, 1, 40, 40, 16, 16, dtype)
        if features.sinks is not None:
            features = dataclasses.replace(features, sinks=features.sinks.to(dtype))
        case = dataclasses.replace(case, scale=scale, features=features)
        results = ours(case, mask, BACKEND)
        check(case, torch.from_numpy(mask.to_dense()), results)
        if scale == 0:
            assert not results[2].any()
            assert not results[3].any()


def test_a_learned_temperature_may_start_at_zero() -> None:
    case = random_case(3, 1, 1, 1, 40, 40, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    mask = P.causal().compile(40, block=16)
    truth = torch.from_numpy(mask.to_dense()).to(DEVICE)
    temperature = torch.zeros((), device=DEVICE, requires_grad=True)
    out = sf.attention(case.q * temperature, case.k, case.v, mask, scale=1.0, backend=BACKEND)
    (got,) = torch.autograd.grad(out, temperature, case.dout)
    want = sf.reference.attention(case.q * temperature, case.k, case.v, truth, scale=1.0)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(got, torch.autograd.grad(want, temperature, case.dout)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("values", "cotangents"), [(1e25, 1.0), (1e-25, 1.0), (1.0, 1e28), (1e10, 1e20), (1.0, 1e-20)])
@pytest.mark.parametrize("spread", [1.0, 20.0], ids=["near", "far"])
def test_values_and_cotangents_of_any_size(values: float, cotangents: float, spread: float) -> None:
    mask = (P.local(30) | P.strided(7)).compile(70, block=32)
    case = random_case(4, 1, 2, 1, 70, 70, 16, 16, torch.float32)
    # Scores of 30 and -30 in turn with the heads: no overflow by themselves, with these values one.
    shifted = case.k + spread * torch.tensor([1.5, -1.5])[:, None, None]
    case = dataclasses.replace(
        case, q=case.q.abs(), k=shifted, v=case.v * values, dout=case.dout * cotangents, scale=0.1
    )
    case = dataclasses.replace(case, dlse=torch.zeros_like(case.dlse))
    truth = torch.from_numpy(mask.to_dense())
    results = ours(case, mask, BACKEND)
    assert all(x.isfinite().all() for x in results)
    check(case, truth, results)


def test_a_cap_makes_any_score_finite() -> None:
    case = random_case(5, 1, 1, 1, 40, 40, 16, 16, torch.float32)
    k = case.k.clone()
    k[:, :, 20:] = 3e38
    case = dataclasses.replace(case, k=k, q=case.q.abs(), features=Features(softcap=5.0))
    mask = P.causal().compile(40, block=16)
    out, lse, dq, *_ = ours(case, mask, BACKEND)
    want = eager(case.to(torch.float64), torch.from_numpy(mask.to_dense()))
    torch.testing.assert_close(out.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
    assert dq[:, :, :20].isfinite().all()


@pytest.mark.parametrize("scale", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_bad_future_key_does_not_reach_earlier_queries_that_decode(scale: float, bad: float) -> None:
    case = random_case(7, 1, 1, 2, 40, 40, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    k = case.k.clone()
    k[:, :, 38:] = bad
    q = case.q[:, :, -4:]
    got = sf.decode(q, k, case.v, P.causal(), lengths=40, scale=scale, backend=BACKEND)
    seen = torch.ones(4, 40, dtype=torch.bool, device=DEVICE).tril(36)
    want = sf.reference.attention(q.double(), case.k.double(), case.v.double(), seen, scale=scale)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(got[:, :, :2].double(), want[:, :, :2], rtol=1e-5, atol=1e-5)
