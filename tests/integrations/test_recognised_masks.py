"""Masks of ``mask_mod`` functions that compare numbers of query and key are made without asking about all pairs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparseflash import flex
from sparseflash import patterns as P
from sparseflash.integrations import scanning
from sparseflash.integrations.comparisons import compared
from sparseflash.integrations.flex import from_flex
from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.patterns.grid import make_grid

CPU = torch.device("cpu")
B, H = 2, 3
OF_SAMPLE, OF_HEAD = torch.tensor([30, 90]), torch.tensor([4, 0, 55])
FLAG = torch.rand(300, generator=torch.Generator().manual_seed(1)) < 0.5

Number = Callable[[Tensor, Tensor, Tensor], Tensor]  # of sample, head, and the index of a query or key
Truth = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@st.composite
def captured(draw: st.DrawFn) -> Tensor:
    """Numbers of 300 tokens: of documents in order, of some that come back, falling, or at random."""
    seed, kind = draw(st.integers(0, 99)), draw(st.sampled_from(["documents", "come back", "fall", "random"]))
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (100,), generator=generator)
    ids = torch.repeat_interleave(torch.arange(100), lengths)[:300]
    if kind == "come back":
        ids = ids % 3
    elif kind == "fall":
        ids = -ids
    elif kind == "random":
        ids = torch.randint(-3, 100, (300,), generator=generator)
    return ids.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16])))


def plain(b: Tensor, h: Tensor, i: Tensor) -> Tensor:
    return i


@st.composite
def numbers(draw: st.DrawFn) -> Number:
    """What a mask_mod may compute of one index, its sample and its head."""
    c, ids = draw(st.integers(1, 90)), draw(captured())
    forms: list[Number] = [
        plain,
        lambda b, h, i: ids[i],
        lambda b, h, i: ids[i].long() + OF_HEAD[h],
        lambda b, h, i: i // c,
        lambda b, h, i: i % c,
        lambda b, h, i: (i - OF_SAMPLE[b]).abs(),
        lambda b, h, i: torch.where(i < c, i, 2 * c),
        lambda b, h, i: -i + c,
    ]
    return draw(st.sampled_from(forms))


OPERATORS: list[Callable[[Any, Any], Any]] = [
    *(torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne),
]


@st.composite
def comparisons(draw: st.DrawFn) -> Truth:
    x, y, z = draw(numbers()), draw(numbers()), draw(numbers())
    c, operator = draw(st.integers(-20, 120)), draw(st.sampled_from(OPERATORS))
    forms: list[Truth] = [
        lambda b, h, q, k: operator(x(b, h, q), y(b, h, k)),
        lambda b, h, q, k: operator(y(b, h, k), x(b, h, q)),
        lambda b, h, q, k: operator(x(b, h, q).long() - y(b, h, k), c),
        lambda b, h, q, k: operator(y(b, h, k).long() + x(b, h, q) + OF_SAMPLE[b], z(b, h, q)),
        lambda b, h, q, k: operator(z(b, h, k), -(x(b, h, q).long() - y(b, h, k))),
        lambda b, h, q, k: OPERATORS[c % 4]((x(b, h, q).long() - y(b, h, k)).abs(), z(b, h, k)),
        lambda b, h, q, k: OPERATORS[c % 4](OF_HEAD[h], (y(b, h, k).long() - x(b, h, q)).abs()),
        lambda b, h, q, k: x(b, h, q) < z(b, h, q),
        lambda b, h, q, k: FLAG[k],
        lambda b, h, q, k: FLAG[q] == FLAG[k],
        lambda b, h, q, k: k < OF_SAMPLE[b],
        flex.noop_mask,
    ]
    return draw(st.sampled_from(forms))


def joined(parts: st.SearchStrategy[Truth]) -> st.SearchStrategy[Truth]:
    one, other, third = parts, parts, parts
    return st.one_of(
        st.tuples(one, other).map(lambda p: flex.and_masks(*p)),
        st.tuples(one, other).map(lambda p: flex.or_masks(*p)),
        st.tuples(one, other).map(lambda p: lambda b, h, q, k: p[0](b, h, q, k) ^ p[1](b, h, q, k)),
        one.map(lambda p: lambda b, h, q, k: ~p(b, h, q, k)),
        one.map(lambda p: lambda b, h, q, k: p(b, h, q, k).logical_not().logical_or(q == k)),
        st.tuples(one, other, third).map(lambda p: lambda b, h, q, k: torch.where(*(part(b, h, q, k) for part in p))),
    )


@given(
    st.recursive(comparisons(), joined, max_leaves=4),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([16, 128])),
)
def test_the_mask_is_that_of_all_pairs(mask_mod: Truth, lengths: tuple[int, int], block: tuple[int, int]) -> None:
    grid = make_grid(lengths, block, 0)
    recording = Recording.of(mask_mod, CPU)
    for sample in range(B):
        for head in range(H):
            mask = compared(recording, sample, head, grid, CPU)
            assert mask is not None
            scanned = scanning._scanned(mask_mod, sample, head, grid, CPU)
            assert mask == scanned
    dense = flex.create_mask(mask_mod, B, H, *lengths, device="cpu")
    made = from_flex(flex.create_block_mask(mask_mod, B, H, *lengths, device="cpu", BLOCK_SIZE=block))
    found = torch.from_numpy(made.to_dense()).reshape(*made.pattern_of.shape, *lengths)
    assert torch.equal(found.expand(B, H, *lengths), dense)


TABLE = torch.rand(300, 300, generator=torch.Generator().manual_seed(0)) < 0.3
NEAR_OVERFLOW = torch.tensor([2**31 - 1, -(2**31), 5], dtype=torch.int32)
SMALL = torch.tensor([100, -100, 5], dtype=torch.int8)


def written(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    scratch = q.new_zeros(())
    scratch.add_(3)
    return q - scratch >= k


OTHERS: dict[str, MaskMod] = {
    "a table of both": lambda b, h, q, k: TABLE[q, k],
    "dilated": lambda b, h, q, k: (q - k) % 3 == 0,
    "a product": lambda b, h, q, k: q * k < 500,
    "fractions": lambda b, h, q, k: q / 3 - k / 3 <= 7,
    "a fraction beside": lambda b, h, q, k: q - k <= 7.5,
    "sums that wrap around": lambda b, h, q, k: NEAR_OVERFLOW[q % 3] - NEAR_OVERFLOW[k % 3] > 0,
    "sums of bytes that wrap around": lambda b, h, q, k: SMALL[q % 3] - SMALL[k % 3] > 0,
    "two distances": lambda b, h, q, k: (q - k).abs() <= (2 * q - k).abs(),
    "written": written,
    "a vector inside": lambda b, h, q, k: (q - k == torch.tensor([0, 3])).any(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_anything_else_is_asked_about_all_pairs(name: str) -> None:
    mask_mod = OTHERS[name]
    assert Recording.of(mask_mod, CPU).mutates == (name == "written")
    grid = make_grid((200, 150), 32, 0)
    assert compared(Recording.of(mask_mod, CPU), 0, 0, grid, CPU) is None
    made = from_flex(flex.create_block_mask(mask_mod, 1, 1, 200, 150, device="cpu", BLOCK_SIZE=32))
    dense = flex.create_mask(mask_mod, 1, 1, 200, 150, device="cpu")[0, 0]
    assert torch.equal(torch.from_numpy(made.to_dense()), dense)


def test_values_that_look_like_a_pattern_are_no_pattern() -> None:
    """A table that happens to be causal is a table: what is recognised is what was written."""
    table = torch.ones(100, 100, dtype=torch.bool).tril()
    grid = make_grid(100, 32, 0)
    mask_mod = lambda b, h, q, k: table[q, k]  # noqa: E731
    assert compared(Recording.of(mask_mod, CPU), 0, 0, grid, CPU) is None
    assert from_flex(flex.create_block_mask(mask_mod, None, None, 100, 100, device="cpu")) == P.causal().compile(100)


def long_ids(tokens: int) -> Tensor:
    lengths = torch.randint(300, 1000, (tokens // 300,), generator=torch.Generator().manual_seed(0))
    ids = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)[:tokens]
    ids[-100:] = -1
    return ids


def diffusion_of_blocks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Noised tokens see their own block and the clean ones before it; clean tokens are causal by blocks."""
    half = 1 << 17
    noised, of_key, block, block_of_key = q < half, k < half, (q % half) // 32, (k % half) // 32
    inside = (block == block_of_key) & (noised == of_key)
    return inside | ((block > block_of_key) & noised & ~of_key) | ((block >= block_of_key) & ~noised & ~of_key)


def test_a_quarter_of_a_million_tokens_are_not_scanned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processor time: 0.04 to 0.2 s on one core of an AMD EPYC, 2026-11-30; a scan takes an hour."""
    monkeypatch.setattr(scanning, "_scanned", None)
    tokens = 1 << 18
    ids = long_ids(tokens)
    mods: dict[str, tuple[MaskMod, P.Pattern | None]] = {
        "documents": (lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]), P.causal() & P.documents(ids=ids)),
        "window": (lambda b, h, q, k: (q - k).abs() <= 1000, P.local(1000)),
        "prefix": (lambda b, h, q, k: (q >= k) | (k < 3000), P.prefix(3000)),
        "streaming": (lambda b, h, q, k: (q >= k) & ((k < 4) | (q - k < 1000)), P.streaming(4, 1000)),
        "block diffusion": (diffusion_of_blocks, None),
        "documents that come back": (lambda b, h, q, k: (q >= k) & (ids[q] % 100 == ids[k] % 100), None),
    }
    for mask_mod, pattern in mods.values():
        flex.create_block_mask(mask_mod, None, None, 1000, 1000, device="cpu")
        started = time.process_time()
        made = flex.create_block_mask(mask_mod, None, None, tokens, tokens, device="cpu")
        spent = time.process_time() - started
        assert pattern is None or from_flex(made) == pattern.compile(tokens)
        assert spent < 2, "linear in the tokens; the factor of ten is for machines that are busy"


def test_memory_stays_small_where_an_index_looks_at_much() -> None:
    """A number of each key that is made of a thousand."""
    special = torch.arange(0, 10_000, 10)
    recording = Recording.of(lambda b, h, q, k: (k == special).any() & (q >= k), CPU)
    assert recording.widest == 1000
    grid = make_grid(20_000, 128, 0)
    mask = compared(recording, 0, 0, grid, CPU)
    assert mask is not None
    keys = np.isin(np.arange(20_000), special.numpy())
    assert mask.tokens == sum(20_000 - np.flatnonzero(keys))


def test_a_replayed_step_reads_what_was_there_when_the_mask_was_made() -> None:
    reach = torch.tensor(3)
    recording = Recording.of(lambda b, h, q, k: q - k <= reach, CPU)
    reach.fill_(50)
    mask = compared(recording, 0, 0, make_grid(100, 32, 0), CPU)
    assert mask == P.where(lambda q, k: q - k <= 3).compile(100, block=32, q_offset=0)
