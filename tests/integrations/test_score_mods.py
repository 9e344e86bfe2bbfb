"""``score_mod`` functions over our kernels: what they do is read off their operations, or they are refused."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

import sparseflash as sf
from sparseflash import flex as ours
from sparseflash import patterns as P
from sparseflash.flex import scoring
from sparseflash.flex.biases import bias_of
from sparseflash.flex.score_mods import Bias, Change, Sizes, change_of
from sparseflash.integrations.mask_mods import Recording
from sparseflash.integrations.scanning import mask_of
from tests.oracle import random_case

pytestmark = [
    # Said by FlexAttention once a process when it is not compiled; its plain implementation is what we compare with.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised inside torch's compiler
]
B, H, N, M = 2, 4, 90, 130
INF = float("inf")
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Condition = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def table(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of which float32 holds sums exactly, as it has to hold slopes."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double() * 256).round() / 256


OF_HEAD, OF_BOTH, SLOPES, OF_KEY = table(H), table(B, H, seed=1), table(H, seed=2).abs(), table(M, seed=4)
IDS = torch.arange(M) // 17
OF_PAIR, RELATIVE = table(H, M, M, seed=5), table(2 * M, seed=6)
PAIRS = torch.rand(M, M, generator=torch.Generator().manual_seed(3)) < 0.5


def mapped(score_mod: ScoreMod, scores: Tensor) -> Tensor:
    """A score_mod of all scores [B, H, N, M], as torch's plain implementation calls it."""
    for axis in (4, 3, 2, 1):
        score_mod = torch.vmap(score_mod, in_dims=(0, *(0 if at == axis else None for at in range(1, 5))))
    return score_mod(scores, *(torch.arange(size) for size in scores.shape))


def dense(
    q: Tensor, k: Tensor, v: Tensor, score_mod: ScoreMod, token_mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and largest scores, by torch's dense operations."""
    groups = q.shape[1] // k.shape[1]
    scores = mapped(score_mod, q @ k.repeat_interleave(groups, 1).mT * scale)
    scores = scores.masked_fill(~token_mask, -INF)
    return torch._safe_softmax(scores, -1) @ v.repeat_interleave(groups, 1), scores.logsumexp(-1), scores.amax(-1)


def bucket(away: Tensor) -> Tensor:
    """Of a distance, as T5's: a few small ones each, larger ones by their logarithm."""
    near, far = away.abs(), 2 + (torch.log(away.abs().float() / 2) / math.log(16 / 2) * 2).long()
    return torch.where(near < 2, near, torch.min(far, torch.full_like(far, 3)))


FACTORS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "as it is": lambda s, b, h: s,
    "a number": lambda s, b, h: s * 2,
    "divided": lambda s, b, h: 0.5 * s / 3,
    "negated": lambda s, b, h: -s,
    "of each head": lambda s, b, h: s * OF_HEAD[h],
    "divided by one of each": lambda s, b, h: s / (2 + OF_BOTH[b, h].abs()),
    "computed": lambda s, b, h: torch.exp2(-((h + 1) * 8.0 / H)) * s,
    "nothing": lambda s, b, h: s * 0,
}
ROWS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "nothing": lambda s, b, h, i: s,
    "a factor of each query": lambda s, b, h, i: s * OF_KEY[i],
    "a number added": lambda s, b, h, i: s - 3,
    "added of all": lambda s, b, h, i: OF_HEAD[h] + (s - OF_KEY[i]) + OF_BOTH[b][h],
}
CAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "no cap": lambda s: s,
    "cap": lambda s: 2 * torch.tanh(s / 2),
    "negative cap": lambda s: torch.tanh(s) * -1.5,
    "divided cap": lambda s: (s * 0.1).tanh() / 0.05,
}
BIASES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "no bias": lambda s, h, i, j: s,
    "alibi": lambda s, h, i, j: s + (j - i) * SLOPES[h],
    "alibi subtracted": lambda s, h, i, j: s - SLOPES[h] * (i - j),
    "alibi divided": lambda s, h, i, j: (j - i).double() / 2 ** h.double() + s,
    "alibi of both sides": lambda s, h, i, j: s - SLOPES[h] * (i - j).abs(),
    "bias of both sides": lambda s, h, i, j: torch.abs(j - i) * 0.25 + s,
    "two": lambda s, h, i, j: s + (i - j).abs() * SLOPES[h] - 2 * (i - j),
    "signed": lambda s, h, i, j: s + (j - i) * SLOPES[h],
    "finer slopes": lambda s, h, i, j: s + (i - j).abs() * (SLOPES[h] / 3),
    "slopes of each query": lambda s, h, i, j: s - (i - j).abs() * OF_KEY[i] / 8,
    "dense": lambda s, h, i, j: s + OF_PAIR[h, i, j],
    "dense, turned": lambda s, h, i, j: OF_PAIR[h, j, i] + s,
    "dense, of equals": lambda s, h, i, j: s - OF_PAIR[0, i, i] + OF_PAIR[1][j, i],
    "of pairs": lambda s, h, i, j: s + torch.where(PAIRS[i, j], 1.0, 2.0),
    "of pairs, a mask": lambda s, h, i, j: s + torch.where(PAIRS[i, j], OF_KEY[i - j], -INF),
    "keys": lambda s, h, i, j: s + OF_KEY[j],
    "keys of each head": lambda s, h, i, j: s - OF_PAIR[h, 3, j] * OF_HEAD[h],
    "queries, infinite": lambda s, h, i, j: torch.where(j <= i, s, -INF) - 1 / (i % 5),
    "relative": lambda s, h, i, j: s + RELATIVE[i - j + M] * OF_HEAD[h],
    "relative, from the key on": lambda s, h, i, j: s - RELATIVE[(j + M) - i],
    "relative, cut off": lambda s, h, i, j: s + OF_PAIR[h, 0, (j - i).clamp(-8, 8) + 8],
    "relative, squared": lambda s, h, i, j: s - (i - j) ** 2 / 64,
    "relative, through buckets": lambda s, h, i, j: s + OF_PAIR[bucket(j - i), 5, h],
    "relative, of small numbers": lambda s, h, i, j: s + RELATIVE[(j.to(torch.int8) - i.to(torch.int8)).long() + M],
    "relative, beside keys": lambda s, h, i, j: s + RELATIVE[j - i + M] + OF_KEY[j] - 0.5 * (i - j).abs(),
    "keys, scaled": lambda s, h, i, j: (s + OF_KEY[j] - RELATIVE[j - i + M] + 3) * 0.5,
    "distances, scaled": lambda s, h, i, j: (s + (j - i) * SLOPES[h] - (j - i).abs()) / 4,
    "a product": lambda s, h, i, j: s + torch.dot(OF_PAIR[0, i], OF_PAIR[1, j]) / 16,
}
CONDITIONS: dict[str, Condition] = {
    "causal": lambda b, h, i, j: i >= j,
    "documents": lambda b, h, i, j: (IDS[i] == IDS[j]) & (i >= j),
    "of each head": lambda b, h, i, j: (i - j <= 20 * h) & (j <= i) & (b >= 0),
    "of each sample": lambda b, h, i, j: (j <= i) & (j >= 7 * b),
    "a table": lambda b, h, i, j: PAIRS[i, j] & (i >= j),
    "nothing": lambda b, h, i, j: i < 0,
}
LATER: dict[str, Condition] = {
    "later keys": lambda b, h, i, j: i <= j,
    "even keys": lambda b, h, i, j: j % 2 == 0,
}
MASKINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda s, seen: torch.where(seen, s, -INF),
    "where not": lambda s, seen: torch.where(~seen, torch.full_like(s, -INF), s),
    "filled": lambda s, seen: s.masked_fill(seen.logical_not(), -INF),
    "added": lambda s, seen: s + torch.where(seen, 0.0, -INF),
}


@st.composite
def score_mods(draw: st.DrawFn) -> ScoreMod:
    factor, cap, bias = (draw(st.sampled_from(sorted(forms))) for forms in (FACTORS, CAPS, BIASES))
    condition = draw(st.sampled_from(list((CONDITIONS | LATER).values())))
    masking, row = draw(st.sampled_from(list(MASKINGS.values()))), draw(st.sampled_from(sorted(ROWS)))
    masked = draw(st.booleans())
    first = masked and draw(st.booleans())
    moved = bias != "no bias" or cap != "no cap"

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        changed = CAPS[cap](FACTORS[factor](s, b, h))
        if first:
            changed = masking(changed, condition(b, h, i, j))
        changed = BIASES[bias](changed, h, i, j)
        changed = changed if first or (row == "a factor of each query" and moved) else ROWS[row](changed, b, h, i)
        return masking(changed, condition(b, h, i, j)) if masked and not first else changed

    return score_mod


def windows(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 30 + 10 * h


MASKS = ["none", "ours", "torch's", "pattern"]


@given(score_mods(), st.sampled_from(MASKS), st.booleans(), st.booleans(), st.sampled_from([None, 0.3]))
def test_it_is_what_torch_computes(
    score_mod: ScoreMod, kind: str, square: bool, grouped: bool, scale: float | None
) -> None:
    q_len = M if square else N
    groups = 2 if grouped else 1
    case = random_case(0, B, H // groups, groups, q_len, M, 16, 16, torch.float64)
    token_mask = torch.ones(1, 1, q_len, M, dtype=torch.bool)
    block_mask: Any = None
    if kind in ("ours", "torch's"):
        flex = ours if kind == "ours" else theirs
        block_mask = flex.create_block_mask(windows, None, H, q_len, M, device="cpu", BLOCK_SIZE=32)
        token_mask = ours.create_mask(windows, 1, H, q_len, M, device="cpu")
    elif kind == "pattern":  # which puts the last query on the last key; the score_mod counts queries from 0
        block_mask = P.local(40)
        token_mask = torch.from_numpy(block_mask.compile((q_len, M)).to_dense())[None, None]
    aux = ours.AuxRequest(lse=True, max_scores=True)
    q, k, v = x = case.leaves()
    out, told = ours.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=grouped, return_aux=aux
    )
    assert told.lse is not None
    assert told.max_scores is not None
    q, k, v = y = case.leaves()
    want, lse, largest = dense(q, k, v, score_mod, token_mask, 0.25 if scale is None else scale)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(told.lse, lse, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(told.max_scores, largest, rtol=1e-9, atol=1e-9)
    pairs = [torch.autograd.grad((of * case.dout).sum(), leaves) for of, leaves in ((out, x), (want, y))]
    torch.testing.assert_close(*pairs, rtol=1e-7, atol=1e-8)


def test_torchs_own_function_gives_the_same() -> None:
    case = random_case(1, B, H, 1, N, N, 16, 16, torch.float64)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where((IDS[i] == IDS[j]) & (i >= j), 2 * torch.tanh(s / 2) + (j - i) * SLOPES[h], -INF)

    outs = [flex.flex_attention(case.q, case.k, case.v, score_mod) for flex in (ours, theirs)]
    torch.testing.assert_close(*outs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_factor_of_each_head_in_low_precision(dtype: torch.dtype) -> None:
    """It is multiplied into queries, which rounds them once more: within twice the error of dense attention."""
    case = random_case(2, B, H, 1, N, M, 32, 16, dtype)
    score_mod: ScoreMod = lambda s, b, h, i, j: s * OF_BOTH[b, h]  # noqa: E731
    everything = torch.ones(N, M, dtype=torch.bool)
    want, *_ = dense(case.q.double(), case.k.double(), case.v.double(), score_mod, everything, 32**-0.5)
    usual, *_ = dense(case.q, case.k, case.v, lambda s, b, h, i, j: s * OF_BOTH[b, h].to(dtype), everything, 32**-0.5)
    out = ours.flex_attention(case.q, case.k, case.v, score_mod)
    assert isinstance(out, Tensor)
    worst = (usual.double() - want).abs().max()
    assert (out.double() - want).abs().max() <= 2 * worst + torch.finfo(dtype).eps * want.abs().max()


LEARNED = torch.nn.Parameter(table(H))
REFUSED: dict[str, tuple[ScoreMod, str]] = {
    "per key before a cap": (lambda s, b, h, i, j: (s + OF_KEY[j]).tanh(), r"the kernels do not have \(aten.tanh\)"),
    "square": (lambda s, b, h, i, j: s * s, r"the kernels do not have \(aten.mul\)"),
    "sines": (lambda s, b, h, i, j: torch.sin(torch.cos(s)) + torch.tan(b), r"do not have \(aten.cos\)"),
    "silu": (lambda s, b, h, i, j: torch.nn.functional.silu(s), r"do not have \(aten.silu\)"),
    "a factor of each key": (lambda s, b, h, i, j: s * OF_KEY[j], r"do not have \(aten.mul\)"),
    "looks at the score": (lambda s, b, h, i, j: torch.where(s <= b, s, -INF), r"do not have \(aten.le\)"),
    "a large number": (lambda s, b, h, i, j: torch.where(i >= j, s, -1e9), r"do not have \(aten.where\)"),
    "infinity": (lambda s, b, h, i, j: torch.where(i >= j, s, INF), r"do not have \(aten.where\)"),
    "a mask that is capped": (lambda s, b, h, i, j: torch.where(i >= j, s, -INF).tanh(), r"do not have \(aten.tanh\)"),
    "a mask that is negated": (lambda s, b, h, i, j: -torch.where(i >= j, s, -INF), r"do not have \(aten.neg\)"),
    "two scores": (lambda s, b, h, i, j: torch.where(i >= j, s, s * 2), r"do not have \(aten.where\)"),
    "no score": (lambda s, b, h, i, j: (i - j).double(), "does not use the score"),
    "a cap of each head": (lambda s, b, h, i, j: SLOPES[h] * s.tanh(), "by a value per sample or head"),
    "a cap of nothing": (lambda s, b, h, i, j: 0 * s.tanh(), "or by 0"),
    "a cap that learns": (lambda s, b, h, i, j: LEARNED[0] * s.tanh(), "by a tensor that requires a gradient"),
    "a bias that is scaled": (lambda s, b, h, i, j: (s + OF_KEY[j]) * OF_HEAD[h], r"do not have \(aten.mul\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kernels_do_not_is_refused_with_the_line_that_runs_it(name: str) -> None:
    score_mod, message = REFUSED[name]
    x = torch.randn(B, H, M, 16, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match=message) as refused:
        ours.flex_attention(x, x, x, score_mod=score_mod)
    line = str(refused.value).split("over the same mask: ")[1]
    names = {"query": x, "key": x, "value": x, "score_mod": score_mod, "sparseflash": sf, "block_mask": None}
    names["block_mask"] = ours.create_block_mask(ours.noop_mask, None, None, M, M, device="cpu")
    exec(line, names)


def test_sinks_are_not_moved_with_the_scores_of_a_row() -> None:
    x = torch.randn(B, H, M, 16, dtype=torch.float64)
    sinks = torch.zeros(H, dtype=torch.float64)
    doubled = ours.flex_attention(x, x, x, lambda s, b, h, i, j: 2 * s, sinks=sinks)
    torch.testing.assert_close(doubled, ours.flex_attention(x, x, x, scale=0.5, sinks=sinks))
    moved: list[ScoreMod] = [lambda s, b, h, i, j: s + 1, lambda s, b, h, i, j: s + OF_HEAD[h] - OF_KEY[i]]
    for score_mod in moved:
        scores = mapped(score_mod, x @ x.mT / 4)
        with_sink = torch.cat([scores, scores.new_zeros(B, H, M, 1)], -1).softmax(-1)[..., :-1]
        torch.testing.assert_close(ours.flex_attention(x, x, x, score_mod, sinks=sinks), with_sink @ x)


def test_what_a_term_depends_on_is_read_off_its_operations() -> None:
    def terms(score_mod: ScoreMod) -> tuple[Bias, ...]:
        change, _ = change_of(Recording.of(score_mod, torch.device("cpu"), torch.float32))
        assert isinstance(change, Change)
        return change.biases

    found = terms(lambda s, b, h, i, j: s + OF_KEY[i] + OF_KEY[j] - RELATIVE[j - i + M] + PAIRS[i, j] * b)
    assert [sorted(term.depends) for term in found] == [["query"], ["key"], ["distance"], ["key", "query", "sample"]]
    assert [(term.of_row, term.relative, term.number) for term in found] == [
        (True, False, 1.0), (False, False, 1.0), (False, True, -1.0), (False, False, 1.0)
    ]  # fmt: skip
    assert terms(lambda s, b, h, i, j: s + (j - i) * OF_HEAD[h]) == ()
    away: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda i, j: j - i, lambda i, j: -(i + 7) + (j - 3), lambda i, j: j.int() - i.int(), lambda i, j: i - i
    ]  # fmt: skip
    for number in away:
        (term,) = terms(lambda s, b, h, i, j, number=number: s + RELATIVE[number(i, j) + M])  # type: ignore[misc]
        assert term.relative or term.of_row
    near: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda i, j: j + i, lambda i, j: 2 * j - i, lambda i, j: (j.to(torch.int8) - i.to(torch.int8)).long(),
        lambda i, j: (j.half() - i.half()).long(), lambda i, j: j // 2 - i // 2,
    ]  # fmt: skip
    for number in near:
        (term,) = terms(lambda s, b, h, i, j, number=number: s + RELATIVE[number(i, j) + M])  # type: ignore[misc]
        assert term.depends == {"query", "key"}


LEARNS = [table(*shape, seed=7).requires_grad_() for shape in ((H, M, M), (B, M), (H, 2 * M + 1), (H, H), ())]
LEARNING: dict[str, ScoreMod] = {
    "dense": lambda s, b, h, i, j: s + LEARNS[0][h, i, j],
    "dense, of all samples": lambda s, b, h, i, j: s - 2 * LEARNS[0][h, j, i].sin(),
    "keys and queries": lambda s, b, h, i, j: s + LEARNS[1][b, j] - LEARNS[1][b, i],
    "relative": lambda s, b, h, i, j: s + LEARNS[2][h, j - i + M],
    "buckets, causal": lambda s, b, h, i, j: torch.where(i >= j, s - LEARNS[3][bucket(i - j), h], -INF),
    "slopes": lambda s, b, h, i, j: torch.where(i >= j, s + (j - i) * LEARNS[3][0, h], -INF),
    "a factor": lambda s, b, h, i, j: s * LEARNS[3][1, h] + LEARNS[2][h, 5],
    "a temperature": lambda s, b, h, i, j: s * LEARNS[4] + LEARNS[4],
    "two": lambda s, b, h, i, j: torch.tanh(s) + LEARNS[2][0, i - j + M] + LEARNS[1][b, j] * LEARNS[3][h, h],
}


@pytest.mark.parametrize("name", LEARNING)
def test_what_it_reads_learns(name: str) -> None:
    case = random_case(3, B, H // 2, 2, N, M, 16, 16, torch.float64)
    results = []
    for ask in (ours.flex_attention, None):
        q, k, v = x = case.leaves()
        if ask is None:
            out, lse, _ = dense(q, k, v, LEARNING[name], torch.ones(N, M, dtype=torch.bool), 0.25)
        else:
            out, lse = ours.flex_attention(q, k, v, LEARNING[name], enable_gqa=True, return_lse=True)
        loss = (out * case.dout).sum() + lse.masked_fill(lse == -INF, 0).sin().sum()
        results.append([out.detach(), *torch.autograd.grad(loss, (*x, *LEARNS), allow_unused=True)])
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if want is not None and got is not None:
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_a_score_mod_keeps_no_graph_alive() -> None:
    x = torch.randn(1, H, 32, 16)
    bias = torch.zeros(H, 32, 32, requires_grad=True) * 2
    alive = weakref.ref(bias)

    def score_mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return s + here[0][h, i, j]

    here = [bias]
    ours.flex_attention(x, x, x, score_mod)
    del bias
    here[0] = torch.zeros(H, 32, 32)
    gc.collect()
    assert alive() is None


def test_no_pair_is_listed_for_what_depends_on_distance() -> None:
    """A quarter of a million tokens, of which numbers of all pairs would take 256 GB."""
    tokens = 1 << 18
    of_side = torch.zeros(H, 2)
    score_mod: ScoreMod = lambda s, b, h, i, j: s + of_side[h, ((j - i) // tokens).clamp(0, 1)]  # noqa: E731
    change, _ = change_of(recording := Recording.of(score_mod, torch.device("cpu"), torch.float32))
    assert isinstance(change, Change)
    found = bias_of(change.biases, recording, Sizes(1, H, tokens, tokens), torch.zeros(()))
    assert found is not None
    assert found.shape == (H, 2 * tokens - 1)


def test_a_mask_is_found_once_and_what_changes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Mock(wraps=mask_of)
    monkeypatch.setattr(scoring, "mask_of", make)
    x = torch.randn(B, H, M, 16, dtype=torch.float64)
    reach, slopes = torch.tensor(5), SLOPES.clone()
    score_mod: ScoreMod = lambda s, b, h, i, j: torch.where((i - j).abs() <= reach, s - slopes[h] * (i - j).abs(), -INF)  # noqa: E731

    def check(made: int, block_mask: Any = None) -> None:
        token_mask = torch.ones(M, M, dtype=torch.bool) if block_mask is None else torch.ones(M, M).tril().bool()
        for _ in range(2):
            got = ours.flex_attention(x, x, x, score_mod, block_mask)
        want, *_ = dense(x, x, x, score_mod, token_mask, 0.25)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert make.call_count == made

    check(1)
    causal = ours.create_block_mask(lambda b, h, q, k: q >= k, None, None, M, M, device="cpu")
    check(2, causal)
    check(2)
    reach.data.numpy()[...] = 9  # no version counts this
    check(3)
    slopes[1] += 0.5
    check(3)


def test_only_what_decides_is_copied_and_compared() -> None:
    x = torch.randn(B, H, M, 16, dtype=torch.float64)
    bias, reach, scale = OF_PAIR.clone(), torch.tensor(9), torch.tensor(0.5)
    score_mod: ScoreMod = lambda s, b, h, i, j: torch.where(i - j < reach, s * scale + bias[h, i, j], -INF)  # noqa: E731
    for change in (lambda: None, lambda: bias.mul_(2), lambda: reach.fill_(30), lambda: scale.fill_(2)):
        change()
        want, *_ = dense(x, x, x, score_mod, torch.ones(M, M, dtype=torch.bool), 0.25)
        torch.testing.assert_close(ours.flex_attention(x, x, x, score_mod), want, rtol=1e-9, atol=1e-9)
    kept = scoring._known[score_mod].recording.contents
    assert sorted(copy.untyped_storage().nbytes() for copy in kept) == [4, 8, 8]


def test_compiled_functions_break_their_graph() -> None:
    torch._dynamo.reset()
    x = torch.randn(B, H, N, 16)
    block_mask = ours.create_block_mask(windows, None, H, N, N, device="cpu")

    def step(x: Tensor, slopes: Tensor) -> Tensor:
        out = ours.flex_attention(
            x * 2, x, x, lambda s, b, h, i, j: torch.where(i >= j, s + (j - i) * slopes[h], -INF), block_mask
        )
        assert isinstance(out, Tensor)
        return out + 1

    compiled = torch.compile(step, backend="eager")
    for slopes in (SLOPES.float(), OF_HEAD.float()):
        torch.testing.assert_close(compiled(x, slopes), step(x, slopes))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="a score_mod is recognised on the host, outside of graphs: use softcap="):
        torch.compile(step, backend="eager", fullgraph=True)(x, slopes)


def test_tables_and_things_that_are_no_functions() -> None:
    x = torch.randn(1, 2, 64, 16)
    made = sf.lookup(P.causal().compile(64))
    plain = ours.flex_attention(x, x, x, lambda s, b, h, i, j: s * 2, made)
    assert torch.equal(plain, ours.flex_attention(x, x, x, block_mask=made, scale=0.5))
    with pytest.raises(NotImplementedError, match="masks or looks at distances cannot use a LookupTable"):
        ours.flex_attention(x, x, x, lambda s, b, h, i, j: s - (i - j).abs(), made)
    keys = torch.randn(64)
    biased = ours.flex_attention(x, x, x, lambda s, b, h, i, j: s + keys[j], made)
    assert torch.equal(biased, sf.attention(x, x, x, made, bias=keys[None, None, None]))
    with pytest.raises(TypeError, match="score_mod must be callable as fn"):
        ours.flex_attention(x, x, x, 2.0)  # type: ignore[call-overload]
    one = ours.create_block_mask(lambda b, h, q, k: q - k < 5 * h, None, 1, 64, 64, device="cpu")
    with pytest.raises(ValueError, match="created with H=1"):
        ours.flex_attention(x, x, x, lambda s, b, h, i, j: s - (i - j).abs(), one)
