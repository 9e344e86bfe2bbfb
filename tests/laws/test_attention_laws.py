"""Laws 5 to 9: attention over tables is masked dense attention, whatever the blocks and features.

The same laws run on the CPU backend and on the Triton kernels (`backend.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.runs import FULL, Runs
from sparseflash.patterns.tiles import pack
from tests.laws.backend import BACKEND, BLOCKS, COMPILED, DEVICE, DIMS, DTYPES, INTERPRETED
from tests.oracle import BIASES, Case, Features, check, ours, random_case, random_features
from tests.strategies import WIDER, compiled_for, expressions, is_placed, leaves, per_head

pytestmark = pytest.mark.interpreted


@dataclass(frozen=True)
class Drawn:
    """Everything a call depends on."""

    pattern: Pattern
    heads: int
    group: int
    batch: int
    q_len: int
    kv_len: int
    block: tuple[int, int]
    q_offset: int | None
    dim: int
    v_dim: int
    dtype: torch.dtype
    seed: int
    features: dict[str, Any]
    transposed: bool

    def mask(self) -> BlockMask:
        if not is_placed(self.pattern, self.q_len, self.kv_len, self.q_offset):
            assume(False)
        return self.pattern.compile((self.q_len, self.kv_len), block=self.block, q_offset=self.q_offset)

    def case(self) -> Case:
        sizes = self.batch, self.heads, self.group, self.q_len, self.kv_len, self.dim, self.v_dim
        case = random_features(random_case(self.seed, *sizes, self.dtype), self.seed, **self.features)
        case = case if self.transposed else case.mapped(torch.Tensor.contiguous)
        return dataclasses.replace(case, q_offset=self.q_offset)


SETTINGS = {
    "softcap": st.sampled_from([0.3, 2.0, 30.0]),
    "alibi": st.sampled_from(["head", "sample"]),
    "sinks": st.sampled_from([1.0, 20.0]),
    "dropout_p": st.sampled_from([0.1, 0.5, 0.9]),
    "bias": st.sampled_from(list(BIASES)),
}
ON: list[tuple[str, ...]] = [(), *((name,) for name in SETTINGS), tuple(SETTINGS)]  # features that are on together
if not COMPILED:
    ON = [on for size in range(len(SETTINGS) + 1) for on in itertools.combinations(SETTINGS, size)]
FORMS = compiled_for(
    {"bq": BLOCKS, "bk": BLOCKS, "dim": DIMS, "v_dim": DIMS, "dtype": DTYPES, "on": ON}, 12 if COMPILED else None
)


def features(on: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Settings of features that are on."""
    return st.fixed_dictionaries({name: SETTINGS[name] for name in on})


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)] if INTERPRETED else [(1, 1), (2, 1), (1, 2), (2, 2)]))
    batch = draw(st.integers(1, 1 if INTERPRETED else 2))
    patterns = expressions(leaves) | per_head(heads * group)
    pattern = draw(patterns | st.builds(P.per_sample, expressions(), expressions()) if batch == 2 else patterns)
    longest = (40 if INTERPRETED else 400) * WIDER
    form = draw(FORMS)
    return Drawn(
        pattern, heads, group, batch,
        draw(st.integers(1, longest)), draw(st.integers(1, longest)),
        (form["bq"], form["bk"]), draw(st.none() | st.integers(-20, 20)),
        form["dim"], form["v_dim"], form["dtype"], draw(st.integers(0, 1 << 16)),
        draw(features(form["on"])), draw(st.booleans()),
    )  # fmt: skip


@given(drawn())
def test_law_5_attention_is_masked_dense_attention(d: Drawn) -> None:
    mask, case = d.mask(), d.case()
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, BACKEND))


@given(drawn())
def test_law_6_blocks_do_not_change_the_result(d: Drawn) -> None:
    mask, case = d.mask(), d.case()
    first, again = ours(case, mask, BACKEND), ours(case, mask, BACKEND)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b), "a rerun differs"
    other = dataclasses.replace(d, block=(BLOCKS[-1], BLOCKS[0])).mask()
    check(case, torch.from_numpy(mask.to_dense()), ours(case, other, BACKEND))


@given(drawn())
def test_law_6_full_blocks_may_be_called_partial(d: Drawn) -> None:
    mask, case = d.mask(), d.case()
    check(case, torch.from_numpy(mask.to_dense()), ours(case, all_partial(mask), BACKEND))


def all_partial(mask: BlockMask) -> BlockMask:
    """The same token mask with every FULL block listed as PARTIAL. Not canonical."""
    ones = pack(np.ones((1, *mask.block), bool))
    code = np.where(mask.runs.code == FULL, np.int32(2 + len(mask.tiles)), mask.runs.code)
    runs = Runs(mask.runs.shape, mask.runs.start, mask.runs.stop, code.astype(np.int32))
    return dataclasses.replace(mask, runs=runs, tiles=np.concatenate([mask.tiles, ones]))


@given(
    st.integers(1, 40 if INTERPRETED else 90),
    st.integers(1, 40 if INTERPRETED else 90),
    compiled_for({"dtype": DTYPES, "on": ON}, 6 if COMPILED else None),
    st.data(),
)
def test_law_7_dense_is_the_all_ones_table(q_len: int, kv_len: int, form: dict[str, Any], data: st.DataObject) -> None:
    plain = random_case(0, 1, 1 if INTERPRETED else 2, 1, q_len, kv_len, 16, 16, form["dtype"])
    case = random_features(plain, 0, **data.draw(features(form["on"]), label="features"))
    ones = np.ones((q_len, kv_len), bool)
    masks: list[Pattern | BlockMask] = [
        P.full(),
        BlockMask.from_dense(ones),
        P.where(lambda q, k: q == q),
    ]
    if kv_len >= q_len:  # an array has no cells at negative positions
        masks.append(P.from_blocks(np.ones((kv_len, kv_len), bool), unit=1))
    dense = ours(case, None, BACKEND)
    for mask in masks:
        for a, b in zip(dense, ours(case, mask, BACKEND), strict=True):
            assert torch.equal(a, b)


@given(drawn(), leaves)
def test_law_8_disjoint_keys_merge_by_lse(d: Drawn, part: Pattern) -> None:
    d = dataclasses.replace(d, dtype=torch.float32)  # halves are rounded before they are merged
    mask, case = d.mask(), d.case()
    if not is_placed(part, *mask.shape, d.q_offset):
        assume(False)
    taken = part.compile(mask.shape, block=mask.block, q_offset=d.q_offset)
    sinks = case.features.sinks  # a sink is no key of either set: it takes its share at the end
    without = dataclasses.replace(case, features=dataclasses.replace(case.features, sinks=None))
    outs, lses = zip(*(ours(without, half, BACKEND)[:2] for half in (mask & taken, mask - taken)), strict=True)
    lse = torch.stack(lses).logsumexp(0)
    out = sum(o * (part - lse).exp().nan_to_num(0).unsqueeze(-1) for o, part in zip(outs, lses, strict=True))
    if sinks is not None:
        out = out * (lse - sinks[:, None]).sigmoid().unsqueeze(-1)
    check(case, torch.from_numpy(mask.to_dense()), [out, lse, *ours(case, mask, BACKEND)[2:]])


@given(drawn(), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_law_9_unseen_keys_leave_no_trace(d: Drawn, poison: float) -> None:
    mask, case = d.mask(), d.case()
    token_mask = torch.from_numpy(mask.to_dense())
    by_head = token_mask.expand(d.batch, d.heads * d.group, d.q_len, d.kv_len)
    seen = by_head.any(2).unflatten(1, (d.heads, d.group)).any(2)  # [B, Hkv, M]
    clean, dirty = (
        dataclasses.replace(case, **{n: getattr(case, n).masked_fill(~seen[..., None], fill) for n in ("k", "v")})
        for fill in (0.0, poison)
    )
    expected = ours(clean, mask, BACKEND)
    for want, got in zip(expected, ours(dirty, mask, BACKEND), strict=True):
        assert torch.equal(want, got), "a key that no query sees has left a trace"
    out, lse, dq, dk, dv = expected[:5]
    blind = ~by_head.any(3)
    assert (out[blind] == 0).all()
    assert (dq[blind] == 0).all()
    assert (lse[blind] == -torch.inf).all()
    assert (lse[~blind] > -torch.inf).all()
    assert (dk[~seen] == 0).all()
    assert (dv[~seen] == 0).all()


@pytest.mark.parametrize("pattern", [P.full() - P.full(), P.causal() - P.local(3)], ids=str)
def test_rows_that_see_nothing_have_finite_gradients(pattern: Pattern) -> None:
    case = random_case(1, 1, 1, 1, 20, 20, 16, 16, torch.float32)
    mask = pattern.compile(20, block=16)
    truth = torch.from_numpy(mask.to_dense())
    results = ours(case, mask, BACKEND)
    check(case, truth, results)
    assert not any(torch.isnan(r).any() for r in results)
    # Merging by lse gives such rows a NaN cotangent: the derivative of logaddexp at (-inf, -inf).
    poisoned = dataclasses.replace(case, dlse=case.dlse.masked_fill(~truth.any(1), float("nan")))
    for want, got in zip(results, ours(poisoned, mask, BACKEND), strict=True):
        assert torch.equal(want, got)


@pytest.mark.skipif(BACKEND != "cpu", reason="on Triton a blind row's NaN in q reaches dK, and one in dout reaches dV")
@pytest.mark.parametrize("name", ["q", "dout", "dlse"])
def test_what_rows_that_see_nothing_hold_leaves_no_trace(name: str) -> None:
    case = random_case(1, 1, 1, 1, 24, 16, 16, 16, torch.float32)
    mask = P.causal().compile((24, 16), block=16)  # 8 of the first block's 16 rows see nothing
    poisoned = getattr(case, name).clone()
    poisoned[:, :, 3] = float("nan")
    dirty = ours(dataclasses.replace(case, **{name: poisoned}), mask, BACKEND)
    for want, got in zip(ours(case, mask, BACKEND), dirty, strict=True):
        assert torch.equal(want, got)


@pytest.mark.skipif(BACKEND != "cpu", reason="the Triton kernels take no float64")
@pytest.mark.parametrize("bias", ["pairs shared", "keys", "queries", "near distances"])
def test_float64_gradients_agree_with_finite_differences(bias: str) -> None:
    case = random_features(random_case(4, 1, 1, 2, 5, 18, 3, 4, torch.float64), 4, 1.5, "head", 1.0, 0.2, bias)
    mask = (P.local(4) | P.strided(3)).compile((5, 18), block=16)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *leaves: torch.Tensor) -> Any:
        features = case.arguments([q, k, v, *leaves]) if leaves else {}
        return sf.attention(q, k, v, mask, return_lse=True, **features)

    for operands in (case.leaves()[:3], case.leaves()):
        assert torch.autograd.gradcheck(attention, operands)


@pytest.mark.parametrize("kv_len", [32, 47], ids=["whole blocks", "ragged"])
def test_tensors_in_any_layout_are_read_in_place(kv_len: int) -> None:
    case = random_case(2, 2, 2, 2, 33, kv_len, 24, 16, torch.float32)
    mask = P.local(20).compile((33, kv_len), block=16)
    contiguous = case.mapped(torch.Tensor.contiguous)
    assert not case.q.is_contiguous()
    for a, b in zip(ours(case, mask, BACKEND), ours(contiguous, mask, BACKEND), strict=True):
        assert torch.equal(a, b)


def test_only_the_output_may_have_a_gradient() -> None:
    case = random_case(3, 1, 1, 1, 20, 20, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    q, k = case.q.requires_grad_(), case.k
    mask = P.causal().compile(20, block=32)
    out = sf.attention(q, k, case.v, mask, backend=BACKEND)
    (expected,) = torch.autograd.grad(out, q, torch.ones_like(out))
    out, lse = sf.attention(q, k, case.v, mask, return_lse=True, backend=BACKEND)
    (with_lse,) = torch.autograd.grad((out, lse), q, (torch.ones_like(out), torch.zeros_like(lse)))
    assert torch.equal(expected, with_lse)
    _, lse = sf.attention(q, k, case.v, mask, return_lse=True, backend=BACKEND)
    (only_lse,) = torch.autograd.grad(lse.sum(), q)
    scores = (q @ k.mT / 4).masked_fill(torch.ones(20, 20, device=DEVICE).triu(1).bool(), -torch.inf)
    (want,) = torch.autograd.grad(scores.logsumexp(-1).sum(), q)
    torch.testing.assert_close(only_lse, want)


ALL_ON: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": "head"},
    "alibi a sample": {"alibi": "sample"},
    "sinks": {"sinks": 1.0},
    "dropout": {"dropout_p": 0.3},
    **{f"bias of {name}": {"bias": name} for name in BIASES},
    "all": {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3, "bias": "pairs"},
    "all, by distance": {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3, "bias": "near distances"},
}


@pytest.mark.parametrize("on", ALL_ON.values(), ids=ALL_ON)
def test_each_feature_alone_and_all_together(on: dict[str, Any]) -> None:
    case = random_features(random_case(5, 1, 1, 2, 21, 37, 16, 24, torch.float32), 5, **on)
    case = dataclasses.replace(case, q_offset=3)
    mask = (P.causal() | P.strided(3)).compile((21, 37), block=(16, 32), q_offset=3)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, BACKEND))


@pytest.mark.parametrize("sink", [-torch.inf, -1000.0, -50.0, 0.0, 50.0, 1000.0, torch.inf])
def test_sinks_far_from_every_score(sink: float) -> None:
    case = random_case(6, 1, 1, 1, 20, 20, 16, 16, torch.float32)
    case = dataclasses.replace(case, features=Features(sinks=torch.tensor([sink])))
    mask = P.causal().compile(20, block=16, q_offset=-2)  # two rows see nothing
    results = ours(case, mask, BACKEND)
    assert not any(torch.isnan(r).any() for r in results)
    if abs(sink) < torch.inf:
        check(case, torch.from_numpy(mask.to_dense()), results)
    if sink == -torch.inf:
        plain = ours(dataclasses.replace(case, features=Features()), mask, BACKEND)
        assert all(torch.equal(a, b) for a, b in zip(plain, results[:5], strict=True))
    if sink >= 1000:
        # Nothing is left of the values; lse, and what flows back through it, do not know of the sink.
        only_lse = dataclasses.replace(case, features=Features(), dout=torch.zeros_like(case.dout))
        for want, got in zip(ours(only_lse, mask, BACKEND)[1:], results[1:5], strict=True):
            assert torch.equal(want, got)
        assert not results[0].any()


def kept_bits(mask: BlockMask | None, seed: int, p: float) -> list[torch.Tensor]:
    """What dropout keeps, [B, Hq, N, M], read off the output and off dv of uniform attention."""
    B, H, N, M = 2, 2, 19, 40
    q, k, v = torch.zeros(B, H, N, 16), torch.zeros(B, H, M, 16), torch.eye(M).expand(B, H, M, M)
    q, k, v = (x.to(DEVICE).requires_grad_() for x in (q, k, v))
    out = sf.attention(q, k, v, mask, dropout_p=p, seed=seed, backend=BACKEND)
    scale = (1 << 24) / round((1 - p) * (1 << 24)) / M
    torch.testing.assert_close(out, (out > 0) * torch.full_like(out, scale))
    cotangent = torch.zeros(B, H, N, M, device=DEVICE)
    cotangent[..., :N] = torch.eye(N)
    (dv,) = torch.autograd.grad(out, v, cotangent)
    return [(out > 0).cpu(), (dv.mT > 0)[..., :N, :].cpu()]


def test_dropout_bits_do_not_depend_on_backend_or_block() -> None:
    expected = sf.reference.dropout_mask((2, 2, 19, 40), 0.4, -(1 << 40) - 5)
    masks = [P.full().compile((19, 40), block=block) for block in ((16, 32), (32, 16))]
    for mask in masks if INTERPRETED else [*masks, None]:
        for bits in kept_bits(mask, -(1 << 40) - 5, 0.4):
            assert torch.equal(bits, expected)
