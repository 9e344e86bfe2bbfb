"""Decoding is the rows of masked dense attention at the positions of the newest queries, whatever the cache's room.

The laws run on the CPU backend and on the Triton kernels (`backend.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.functional.attention import Mask
from sparseflash.kernels.cpu import native
from sparseflash.patterns import BlockMask, Pattern
from tests.laws.backend import BACKEND, BLOCKS, COMPILED, DEVICE, DIMS, DTYPES, INTERPRETED
from tests.oracle import Case, eager, largest_terms, poisoned_memory, random_case, random_features
from tests.strategies import WIDER, compiled_for, expressions, leaves, per_head

ROOM = (80 if INTERPRETED else 400) * WIDER


@pytest.fixture(autouse=True, scope="module")
def short_parts() -> Iterator[None]:
    """Split rows of the few keys that tests have."""
    with pytest.MonkeyPatch.context() as patch:
        if BACKEND == "triton":
            from sparseflash.kernels.triton import decode as triton_decode

            patch.setattr(triton_decode, "PART_KEYS", 16)
        else:
            patch.setattr(native, "SPLIT", 32)
        yield


@dataclass(frozen=True)
class Drawn:
    """Everything a call depends on."""

    pattern: Pattern
    heads: int
    group: int
    new: int
    lengths: tuple[int, ...]
    room: int
    block: tuple[int, int] | None  # None: give the pattern itself
    dim: int
    v_dim: int
    dtype: torch.dtype
    seed: int
    transposed: bool
    softcap: float | None = None
    alibi: Literal["", "head", "sample"] = ""
    sinks: float = 0.0  # their spread; 0 for none

    def case(self) -> Case:
        sizes = len(self.lengths), self.heads, self.group, self.new, self.room, self.dim, self.v_dim
        case = random_case(self.seed, *sizes, self.dtype)
        case = random_features(case, self.seed, self.softcap, self.alibi, self.sinks)
        return case if self.transposed else case.mapped(torch.Tensor.contiguous)

    def mask(self) -> BlockMask:
        return self.pattern.compile(self.room, self.block or (32, 16), q_offset=0)

    def given(self) -> Pattern | BlockMask:
        return self.pattern if self.block is None else self.mask()

    def truth(self) -> torch.Tensor:
        """Who may see whom, bool [B, Hq, M, M]."""
        dense = torch.from_numpy(self.mask().to_dense())
        return dense.expand(len(self.lengths), self.heads * self.group, self.room, self.room)


def ours(case: Case, mask: Mask, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (x.to(DEVICE) for x in (case.q, case.k, case.v))
    at, features = torch.tensor(lengths, device=DEVICE), case.features
    slopes, sinks = (None if x is None else x.to(DEVICE) for x in (features.alibi_slopes, features.sinks))
    with poisoned_memory():
        out, lse = sf.decode(
            *(q, k, v, mask),
            lengths=at,
            scale=case.scale,
            softcap=features.softcap,
            alibi_slopes=slopes,
            sinks=sinks,
            return_lse=True,
            backend=BACKEND,
        )
    return out.cpu(), lse.cpu()


def check(case: Case, truth: torch.Tensor, lengths: tuple[int, ...], out: torch.Tensor, lse: torch.Tensor) -> None:
    """Each sample against float64 attention over its keys, with the tolerance of `tests.oracle.check`."""
    new, room = case.q.shape[2], case.k.shape[2]
    assert out.dtype == case.q.dtype
    assert out.shape == (*case.q.shape[:3], case.v.shape[3])
    for b, length in enumerate(lengths):
        stand = range(length - new, length)
        there = [i for i, at in enumerate(stand) if 0 <= at < room]
        absent = [i for i in range(new) if i not in there]
        assert not out[b, :, absent].any()
        assert (lse[b, :, absent] == -torch.inf).all()
        if not there:
            continue
        keys = min(length, room)
        slopes = case.features.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        one = Case(
            *(case.q[b : b + 1, :, there], case.k[b : b + 1, :, :keys], case.v[b : b + 1, :, :keys]),
            *(case.dout[b : b + 1, :, there], case.dlse[b : b + 1, :, there], case.scale),
            *(replace(case.features, alibi_slopes=slopes), stand[there[0]]),
        )
        seen = truth[b : b + 1, :, [stand[i] for i in there], :keys]
        longest = max(*one.q.shape[2:], *one.v.shape[2:])
        ulp = torch.finfo(case.q.dtype).eps + torch.finfo(torch.float32).eps * longest**0.5
        exact, dense = eager(one.to(torch.float64), seen), eager(one, seen)
        got = out[b : b + 1, :, there], lse[b : b + 1, :, there]
        for name, result, want, same, largest in zip(
            ("out", "lse"), got, exact[:2], dense[:2], largest_terms(one, seen)[:2], strict=True
        ):
            dead = want == -torch.inf
            assert torch.equal(result == -torch.inf, dead), f"{name}: rows that see nothing differ"
            error, allowed = ((x.double() - want).masked_fill(dead, 0).abs().max() for x in (result, same))
            bound = 2 * float(allowed) + ulp * largest
            assert float(error) <= bound, f"{name} of sample {b}: error {float(error):.3g} above {bound:.3g}"


usual = st.one_of(
    st.builds(lambda w: P.causal() & P.local(w), st.integers(0, 200)),
    st.builds(P.streaming, st.integers(0, 40), st.integers(1, 200)),
    st.builds(lambda u: P.causal() & P.butterfly(u), st.integers(1, 80)),
    st.builds(lambda n, w: P.causal() & (P.global_tokens(n) | P.local(w)), st.integers(0, 40), st.integers(0, 90)),
    st.builds(lambda s: P.documents([*s, 5000]) & P.causal(), st.lists(st.integers(1, 90), max_size=8)),
)


# What a step's kernels are compiled for; block None: the pattern itself is given.
FORMS = compiled_for(
    {
        "heads": [(1, 1), (1, 2), (2, 1), (1, 3)] if INTERPRETED else [(1, 1), (2, 3), (2, 2)],
        "new": range(1, 17) if not COMPILED else (1, 2, 5, 16),
        "block": [None, *itertools.product(BLOCKS, BLOCKS)] if not COMPILED else [None, (16, 32), (64, 16), (128, 128)],
        "dim": DIMS,
        "v_dim": DIMS,
        "dtype": DTYPES,
        "softcap": [None, 0.5, 3.0, 50.0],
        "alibi": ["", "", "head", "sample"],
        "sinks": [0.0, 0.0, 1.0, 9.0],
    },
    12 if COMPILED else None,
)


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    form = draw(FORMS)
    (heads, group), new = form["heads"], form["new"]
    room = draw(st.integers(new, ROOM))
    lengths = draw(st.lists(st.integers(new, room) | st.sampled_from([new, room]), min_size=1, max_size=2))
    patterns = usual | expressions(leaves) | per_head(heads * group, usual | leaves)
    if len(lengths) == 2:
        patterns |= st.builds(P.per_sample, usual, expressions())
    return Drawn(
        draw(patterns), heads, group, new, tuple(lengths), room, form["block"],
        form["dim"], form["v_dim"], form["dtype"], draw(st.integers(0, 1 << 16)), draw(st.booleans()),
        form["softcap"], form["alibi"], form["sinks"],
    )  # fmt: skip


SMALL_DIMS = (16, 24, torch.float32, 5, True)
FEATURES: tuple[float, Literal["sample"], float] = (3.0, "sample", 1.0)
MIXED_GROUP = P.per_head(P.causal(), P.streaming(2, 20), P.causal())


@pytest.mark.interpreted
@given(drawn())
@example(Drawn(P.causal() & P.local(9), 1, 2, 16, (40, 73), 77, (16, 16), *SMALL_DIMS))  # rows of two block rows
@example(Drawn(MIXED_GROUP, 1, 3, 5, (50,), 60, (32, 32), *SMALL_DIMS))  # one group, two patterns
@example(Drawn(MIXED_GROUP, 1, 3, 5, (50, 13), 60, (32, 32), *SMALL_DIMS, *FEATURES))  # each with its own slopes
@example(Drawn(P.full(), 2, 1, 3, (3, 80), 80, None, *SMALL_DIMS))  # most blocks of the row hold no keys yet
@example(Drawn(P.full() - P.full(), 1, 1, 4, (9,), 20, None, *SMALL_DIMS))  # nobody sees anything
def test_decoding_is_the_rows_of_masked_dense_attention(d: Drawn) -> None:
    case = d.case()
    out, lse = ours(case, d.given(), d.lengths)
    check(case, d.truth(), d.lengths, out, lse)
    again = ours(case, d.given(), d.lengths)
    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])


@pytest.mark.interpreted
@given(drawn(), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_keys_that_no_new_query_sees_leave_no_trace(d: Drawn, poison: float) -> None:
    case, truth = d.case(), d.truth()
    seen = torch.stack([truth[b, :, stop - d.new : stop].any(1) for b, stop in enumerate(d.lengths)])  # [B, Hq, M]
    seen = seen.unflatten(1, (d.heads, d.group)).any(2)
    for b, length in enumerate(d.lengths):
        seen[b, :, length:] = False
    clean, dirty = (
        replace(case, **{x: getattr(case, x).masked_fill(~seen[..., None], fill) for x in ("k", "v")})
        for fill in (0.0, poison)
    )
    for want, got in zip(ours(clean, d.given(), d.lengths), ours(dirty, d.given(), d.lengths), strict=True):
        assert torch.equal(want, got), "a key that no new query sees has left a trace"


@pytest.mark.interpreted
@given(drawn(), st.integers(-20, 20), st.integers(0, 20))
@example(Drawn(P.full(), 1, 1, 4, (9, 9), 20, None, *SMALL_DIMS), -2, 3)  # two queries before the first, three too late
def test_positions_that_do_not_exist_see_nothing(d: Drawn, below: int, above: int) -> None:
    d = replace(d, lengths=(d.new + below, d.room + above)[: len(d.lengths)])
    if min(d.lengths) < 0:
        d = replace(d, lengths=tuple(max(0, length) for length in d.lengths))
    case = d.case()
    check(case, d.truth(), d.lengths, *ours(case, d.given(), d.lengths))


@pytest.mark.interpreted
@pytest.mark.parametrize("part_keys", [16, 48, 1 << 20], ids=["many parts", "three blocks a part", "one part"])
@pytest.mark.parametrize("group", [1, 5])
def test_many_queries_a_key_head_and_any_number_of_parts(
    part_keys: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if BACKEND == "triton":
        from sparseflash.kernels.triton import decode as triton_decode

        monkeypatch.setattr(triton_decode, "PART_KEYS", part_keys)
    d = Drawn(P.streaming(5, 60), 1, group, 16, (75,), 90, (16, 16), 16, 40, torch.float32, 1, True)  # 80 rows to pack
    case = d.case()
    check(case, d.truth(), d.lengths, *ours(case, d.mask(), d.lengths))


def test_a_table_may_be_for_more_tokens_than_the_cache_has_room_for() -> None:
    """Whoever makes tables for growing caches makes few of them: keys that are not there are not read."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    # A row has all of its FULL blocks before its PARTIAL ones, also those past the cache's end.
    mask = (P.full() - P.local(4)).compile(4096, block=16, q_offset=0)
    table = sf.lookup(mask, q.device)
    lengths = torch.tensor([40], dtype=torch.int32)
    got, _ = torch.ops.sparseflash.decode(
        *(q, k, v, None, lengths, table.rows.tensors(), table.tiles.tensors(), table.pattern_of, 16, 16),
        *("cpu", 0.25, None, None),
    )
    sees = torch.from_numpy(mask.to_dense()[39, :40])
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, attn_mask=sees[None, None, None]))


@pytest.mark.interpreted
def test_an_int_is_the_length_of_all_samples() -> None:
    case = random_case(3, 2, 1, 2, 3, 50, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    q, k, v = case.q, case.k, case.v
    want = sf.decode(q, k, v, P.causal(), lengths=torch.tensor([31, 31], device=DEVICE).int(), backend=BACKEND)
    assert torch.equal(sf.decode(q, k, v, P.causal(), lengths=31, backend=BACKEND), want)
    table = sf.lookup(P.causal().compile(50, (16, 128)), DEVICE)
    assert torch.equal(sf.decode(q, k, v, table, lengths=31, backend=BACKEND), want)


@pytest.mark.interpreted
@pytest.mark.parametrize("new", [1, 3])
def test_a_sequence_decoded_step_by_step_is_full_attention(new: int) -> None:
    tokens, prompt = (30, 24) if INTERPRETED else (150, 60)
    pattern = P.streaming(3, 17)
    case = random_case(4, 2, 2, 2, tokens, tokens, 16, 24, torch.float32).mapped(lambda x: x.to(DEVICE))
    cache = sf.KVCache(2, 2, tokens + 30, 16, 24, device=DEVICE)
    cache.append(case.k[:, :, :prompt], case.v[:, :, :prompt])
    outs, lses = [], []
    for t in range(prompt, tokens, new):
        here = slice(t, t + new)
        cache.append(case.k[:, :, here], case.v[:, :, here])
        out, lse = cache.attend(case.q[:, :, here], pattern, scale=case.scale, return_lse=True, backend=BACKEND)
        outs.append(out.cpu())
        lses.append(lse.cpu())
    rows = case.mapped(lambda x: x.cpu())
    rows = replace(rows, q=rows.q[:, :, prompt:], dout=rows.dout[:, :, prompt:], dlse=rows.dlse[:, :, prompt:])
    truth = torch.from_numpy(pattern.compile(tokens).to_dense()).expand(2, 4, tokens, tokens)
    check(rows, truth, (tokens, tokens), torch.cat(outs, 2), torch.cat(lses, 2))
    assert cache.lengths.tolist() == [tokens, tokens]


@pytest.mark.interpreted
def test_prompts_of_unequal_lengths_and_refused_drafts() -> None:
    room, pattern = 64, P.causal() & P.local(20)
    case = random_case(5, 2, 1, 2, 2, room, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    cache = sf.KVCache(2, 1, room, 16, device=DEVICE)
    ends = torch.tensor([30, 12], device=DEVICE)
    cache.append(case.k[:, :, :30], case.v[:, :, :30], counts=ends)  # the second prompt is padded
    drafts = torch.full((2, 1, 4, 16), float("nan"), device=DEVICE)
    cache.append(drafts, drafts)
    cache.rewind(torch.tensor([4, 4], device=DEVICE))
    assert cache.lengths.tolist() == [30, 12]
    steps = [torch.arange(2, device=DEVICE) + end for end in ends]
    new_k, new_v = (torch.stack([x[b, :, steps[b]] for b in range(2)]) for x in (case.k, case.v))
    cache.append(new_k, new_v)
    got = cache.attend(case.q, pattern, backend=BACKEND)
    want = sf.decode(case.q, case.k, case.v, pattern, lengths=ends + 2, backend=BACKEND)
    assert torch.equal(got, want)
    cache.rewind(2)
    cache.rewind(torch.tensor([0, 12], device=DEVICE))
    assert cache.lengths.tolist() == [30, 0]
    cache.reset()
    assert cache.lengths.tolist() == [0, 0]


def test_a_full_cache_says_so_and_keeps_its_tokens() -> None:
    x = torch.randn(2, 1, 6, 16, device=DEVICE)
    cache = sf.KVCache(2, 1, 10, 16, device=DEVICE)
    cache.append(x, x)
    with pytest.raises(ValueError, match=r"room for 10 tokens per sample, and 12 would .* capacity=24"):
        cache.append(x, x)
    assert cache.lengths.tolist() == [6, 6]
    assert torch.equal(cache.k[:, :, :6], x)
    cache.rewind(3)
    cache.append(x, x)
    assert cache.lengths.tolist() == [9, 9]


def test_what_the_host_cannot_see_to_overflow_is_dropped() -> None:
    x = torch.randn(2, 1, 6, 16)
    cache = sf.KVCache(2, 1, 8, 16)

    def overflow() -> torch.Tensor:
        cache.append(x, x)
        cache.append(x, x, counts=torch.tensor([6, 1]))
        return cache.attend(x[:, :, -3:], P.causal())

    out = torch.compile(overflow, backend="eager", fullgraph=True)()
    assert cache.lengths.tolist() == [12, 7]
    assert torch.equal(cache.k[0, :, :8], torch.cat([x, x], 2)[0, :, :8])
    assert torch.equal(cache.v[1, :, :7], torch.cat([x, x], 2)[1, :, :7])
    assert not cache.k[1, :, 7:].any()
    assert not out[0].any()  # positions 9 to 11 of 8
    assert out[1].abs().sum(-1).all()


def test_growing_compiles_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    q, k, v = torch.randn(3, 2, 2, 64, 16).unbind(0)
    pattern = P.causal() & P.local(20)
    graph = torch.compile(
        lambda q, lengths: sf.decode(q * 1, k, v, pattern, lengths=lengths), backend=counter, fullgraph=True
    )
    for length in range(1, 65, 3):
        lengths = torch.tensor([length, 65 - length])
        new = torch.stack([q[0, :, length - 1 : length], q[1, :, 64 - length : 65 - length]])
        assert torch.equal(graph(new, lengths), sf.decode(new, k, v, pattern, lengths=lengths))
    assert counter.frame_count == 1

    cache = sf.KVCache(2, 2, 64, 16)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache.append(k, v)
        return cache.attend(q, pattern)

    counter = CompileCounter()
    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    outs = [compiled_step(*(x[:, :, t : t + 1].clone() for x in (q, k, v))) for t in range(64)]
    assert counter.frame_count == 1
    torch.testing.assert_close(torch.cat(outs, 2), sf.attention(q, k, v, pattern))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 40, 16).unbind(0)

    def layer(q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return sf.decode(q * 2, k, v, P.causal(), lengths=lengths).sin()

    lengths = torch.tensor([33])
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q[:, :, :2], lengths), layer(q[:, :, :2], lengths))


def test_opcheck() -> None:
    case = random_case(0, 2, 1, 2, 3, 64, 16, 24, torch.float32)
    table = sf.lookup(P.streaming(2, 20).compile(64, block=16))
    for sinks, features in ((None, (None, None)), (torch.zeros(2), (2.0, torch.ones(2)))):
        torch.library.opcheck(
            torch.ops.sparseflash.decode.default,
            (*(case.q, case.k, case.v, sinks, torch.tensor([40, 7]), list(table.rows), list(table.tiles)),
             *(table.pattern_of, *table.block, "cpu", 0.25, *features)),
        )  # fmt: skip


def test_the_host_reads_no_device_tensor() -> None:
    """Meta and fake tensors have no values: reading one raises."""
    cache = sf.KVCache(2, 1, 64, 16, device="meta")
    x, ones = torch.zeros(2, 1, 5, 16, device="meta"), torch.ones(2, dtype=torch.int32, device="meta")
    cache.append(x, x, counts=ones)
    cache.append(x, x)
    cache.rewind(ones)
    cache.reset()
    cache.append(*[torch.zeros(2, 1, 60, 16, device="meta")] * 2)
    with pytest.raises(ValueError, match="and 65 would be there"):
        cache.append(x, x)
    with pytest.raises(RuntimeError, match="meta tensors"):
        cache.lengths.max().item()
    with FakeTensorMode():
        q, k, lengths = torch.zeros(2, 3, 5, 16), torch.zeros(2, 1, 64, 16), torch.ones(2, dtype=torch.int64)
        assert sf.decode(q, k, k, P.streaming(2, 20), lengths=lengths).shape == q.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to wait for")
def test_a_gpu_is_never_waited_for() -> None:
    q, k, v = torch.randn(3, 2, 2, 64, 16, device="cuda").unbind(0)
    cache = sf.KVCache(2, 2, 64, 16, device="cuda")
    for t in range(64):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        cache.attend(q[:, :, t : t + 1], P.causal())
        torch.cuda.set_sync_debug_mode("error")  # the table has been copied, the kernels compiled
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": torch.zeros(2, 4, 17, 16)}, ValueError, r"1 to 16 new queries, got 17 \(q \(2, 4, 17, 16\)\)"),
        ({"q": torch.zeros(2, 4, 0, 16)}, ValueError, "no dimension but the batch may be 0"),
        ({"q": torch.zeros(2, 3, 3, 16)}, ValueError, "query heads must be a multiple of key heads: 3 % 2"),
        ({"q": torch.zeros(2, 4, 3, 16).half()}, TypeError, "must have one dtype"),
        ({"q": torch.zeros(2, 4, 3, 16).requires_grad_()}, ValueError, "no gradient, but q would record one"),
        ({"lengths": torch.tensor([5])}, ValueError, r"lengths must be \[2\], one per sample .*, got \(1,\)"),
        ({"lengths": torch.tensor([5.0, 6.0])}, TypeError, "lengths must be a tensor of int32 or int64, got"),
        ({"lengths": torch.tensor([5, 6], device="meta")}, ValueError, "lengths must lie on cpu with q, got meta"),
        ({"lengths": 2}, ValueError, "counts the 3 new tokens and fits the cache: 3 to 50, got 2"),
        ({"lengths": 51}, ValueError, "3 to 50, got 51"),
        ({"lengths": 5.0}, TypeError, r"lengths must be a tensor of ints \[2\] or an int, got 5.0"),
        ({"mask": P.causal().compile(49)}, ValueError, r"= \(50, 50\) as k has room for 50 .* for \(49, 49\)"),
        ({"mask": P.causal().compile((3, 50))}, ValueError, r"whole sequence.* got one for \(3, 50\)"),
        ({"mask": P.causal().compile(50, q_offset=2)}, ValueError, "first query stands at 0, got q_offset=2"),
        ({"mask": P.per_head(P.causal(), P.full())}, ValueError, "mask is for 2 query heads, q has 4"),
        ({"mask": "causal("}, ValueError, "causal"),
        ({"mask": 7}, TypeError, "mask must be a Pattern, .* got 7"),
        ({"backend": "gpu"}, ValueError, "backend must be one of 'cpu', 'triton' or None, got 'gpu'"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, r"alibi_slopes must be \[4\] or \[2, 4\]"),
        ({"sinks": torch.zeros(2)}, ValueError, r"sinks must be \[4\]"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, ValueError, "no gradient, but sinks would record one"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(2, 4, 3, 16), "k": torch.zeros(2, 2, 50, 16), "lengths": 9}
    given = good | {"v": good["k"]} | change
    with pytest.raises(kind, match=message):
        sf.decode(**given)


def test_gradients_are_refused_only_where_they_are_recorded() -> None:
    q = torch.zeros(1, 1, 2, 16, requires_grad=True)
    k = torch.zeros(1, 1, 20, 16)
    with torch.no_grad():
        assert sf.decode(q, k, k, lengths=20).shape == q.shape
    with pytest.raises(ValueError, match="k, v would record one"):
        sf.decode(q.detach(), k.requires_grad_(), k, lengths=20)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"k_new": torch.zeros(2, 1, 3, 16).half()}, TypeError, "k_new must be a tensor of torch.float32 .*float16"),
        ({"v_new": [1.0]}, TypeError, "v_new must be a tensor of torch.float32 like the cache, got list"),
        ({"k_new": torch.zeros(2, 2, 3, 16)}, ValueError, r"\[2, 1, tokens, 16\] .* got \(2, 2, 3, 16\)"),
        ({"v_new": torch.zeros(2, 1, 4, 24)}, ValueError, r"equally many tokens, got \(2, 1, 3, 16\) and \(2, 1, 4,"),
        ({"k_new": torch.zeros(2, 1, 3, 16, device="meta")}, ValueError, "k_new must lie on cpu .* got meta"),
        ({"counts": torch.tensor([3])}, ValueError, r"counts must be \[2\], one per sample of the cache, got \(1,\)"),
        ({"counts": torch.tensor([3.0, 1.0])}, TypeError, "counts must be a tensor of int32 or int64, got torch.f"),
        ({"counts": torch.zeros(2, device="meta").int()}, ValueError, "counts must lie on cpu .* got meta"),
    ],
)  # fmt: skip
def test_bad_appends_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    cache = sf.KVCache(2, 1, 8, 16, 24)
    good: dict[str, Any] = {"k_new": torch.zeros(2, 1, 3, 16), "v_new": torch.zeros(2, 1, 3, 24)}
    with pytest.raises(kind, match=message):
        cache.append(**(good | change))
    assert not cache.lengths.any()


def test_bad_caches_and_rewinds_are_named() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        sf.KVCache(1, 1, 0, 16)
    with pytest.raises(TypeError, match=r"head_dim must be an int, got 16\.0"):
        sf.KVCache(1, 1, 8, 16.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be float16.*got torch\.int8"):
        sf.KVCache(1, 1, 8, 16, dtype=torch.int8)
    cache = sf.KVCache(1, 1, 8, 16)
    with pytest.raises(ValueError, match="tokens must not be negative, got -1"):
        cache.rewind(-1)
    with pytest.raises(TypeError, match=r"tokens must be an int or a tensor of ints \[1\], got 1\.5"):
        cache.rewind(1.5)  # type: ignore[arg-type]
