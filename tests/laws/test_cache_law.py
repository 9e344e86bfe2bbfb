"""A cache after any history of calls is the list of tokens that this history leaves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from tests.strategies import expressions, named_leaves

BATCH, ROOM = 2, 40

appends = st.tuples(
    st.just("append"), st.integers(0, 20), st.none() | st.lists(st.integers(0, 20), min_size=2, max_size=2)
)
rewinds = st.tuples(st.just("rewind"), st.integers(0, 30) | st.lists(st.integers(0, 30), min_size=2, max_size=2))
steps = st.one_of(appends, appends, appends, rewinds, st.tuples(st.just("reset")))


@given(st.lists(steps, max_size=8), expressions(named_leaves), st.integers(1, 5), st.integers(0, 1 << 16))
def test_a_cache_is_the_list_of_its_tokens(history: list[tuple], pattern: P.Pattern, new: int, seed: int) -> None:  # type: ignore[type-arg]
    generator = torch.Generator().manual_seed(seed)
    cache = sf.KVCache(BATCH, 1, ROOM, 16, 24)
    held: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(BATCH)]
    for name, *arguments in history:
        if name == "reset":
            cache.reset()
            held = [[] for _ in range(BATCH)]
        elif name == "rewind":
            counts = arguments[0] if isinstance(arguments[0], list) else [arguments[0]] * BATCH
            given_tokens = torch.tensor(arguments[0]) if isinstance(arguments[0], list) else arguments[0]
            if any(n > len(tokens) for tokens, n in zip(held, counts, strict=True)):
                with pytest.raises(ValueError, match="tokens of sample"):
                    cache.rewind(given_tokens)
                continue
            cache.rewind(given_tokens)
            held = [tokens[: len(tokens) - n] for tokens, n in zip(held, counts, strict=True)]
        else:
            n = arguments[0]
            k, v = (torch.randn(BATCH, 1, n, d, generator=generator) for d in (16, 24))
            counts = [n] * BATCH if arguments[1] is None else [min(n, count) for count in arguments[1]]
            given_counts = None if arguments[1] is None else torch.tensor(counts)
            if max(len(tokens) + count for tokens, count in zip(held, counts, strict=True)) > ROOM:
                with pytest.raises(ValueError, match="room for 40 tokens"):
                    cache.append(k, v, given_counts)
                continue
            cache.append(k, v, given_counts)
            for b, count in enumerate(counts):
                held[b] += [(k[b, 0, i], v[b, 0, i]) for i in range(count)]
    assert cache.lengths.tolist() == [len(tokens) for tokens in held]
    q = torch.randn(BATCH, 2, new, 16, generator=generator)
    out, lse = cache.attend(q, pattern, return_lse=True)
    mask = torch.from_numpy(pattern.compile(ROOM, block=16, q_offset=0).to_dense())
    for b, tokens in enumerate(held):
        k, v = (torch.stack(x) if x else torch.zeros(0, d) for x, d in zip(
            ([t[0] for t in tokens], [t[1] for t in tokens]), (16, 24), strict=True))  # fmt: skip
        for i in range(new):
            at = len(tokens) - new + i
            seen = mask[at, : len(tokens)] if at >= 0 else torch.zeros(len(tokens), dtype=torch.bool)
            if not seen.any():
                assert not out[b, :, i].any()
                assert (lse[b, :, i] == -torch.inf).all()
                continue
            scores = (q[b, :, i].double() @ k[seen].double().mT) / 4
            torch.testing.assert_close(lse[b, :, i].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
            want = scores.softmax(-1) @ v[seen].double()
            torch.testing.assert_close(out[b, :, i].double(), want, rtol=1e-5, atol=1e-5)
