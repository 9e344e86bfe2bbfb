"""The description of a batch says what the model's own mask says, or refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.integrations.transformers.masks import describe, of_drawn, read
from sparseflash.integrations.transformers.operators import compiled

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import masking_utils


def ours(arguments: dict[str, Any]) -> np.ndarray:
    """What our description allows, bool [B, q, k]."""
    q_len, kv_len = arguments["q_length"], arguments["kv_length"]
    told = read(describe(**arguments), q_len, kv_len)
    keys = told.keys(q_len, kv_len)
    mask = compiled("full()", told, (q_len, keys), 16, told.first_query)
    dense = mask.to_dense().reshape(-1, q_len, keys)
    return np.pad(dense, ((0, 0), (0, 0), (0, kv_len - keys)))


def theirs(arguments: dict[str, Any]) -> np.ndarray:
    """What Transformers draws pair by pair; padding looks at what is there, as some models read its rows."""
    return np.asarray(masking_utils.sdpa_mask(**arguments | {"allow_is_causal_skip": False})[:, 0])


def functions(window: int | None) -> dict[bool, Any]:
    """Transformers' own mask functions, causal and not."""
    if window is None:
        return {True: masking_utils.causal_mask_function, False: masking_utils.bidirectional_mask_function}
    return {
        True: masking_utils.sliding_window_causal_mask_function(window),
        False: masking_utils.sliding_window_bidirectional_mask_function(window),
    }


@st.composite
def batches(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a mask function: whole sequences, packed ones, a cache with room behind or one that forgets."""
    batch, window = draw(st.integers(1, 3)), draw(st.none() | st.integers(1, 20))
    kind = draw(st.sampled_from(["whole", "packed", "dynamic cache", "static cache", "sliding cache"]))
    causal = draw(st.booleans()) or kind != "whole"
    function = functions(window)[causal]
    chunk = draw(st.none() | st.integers(1, 20)) if causal else None
    q_len, before = draw(st.integers(1, 30)), draw(st.integers(0, 30)) if "cache" in kind else 0
    kv_len, kv_offset = before + q_len, 0
    if kind == "static cache":
        kv_len += draw(st.integers(0, 20))
    if kind == "sliding cache" and (window := chunk or window) is not None:
        kv_offset = max(before - window + 1, 0)
        kv_len -= kv_offset
    attention_mask, left = None, torch.zeros(batch, dtype=torch.long)
    if kind == "packed":
        ids = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=q_len, max_size=q_len)))] * batch)
    elif draw(st.booleans()):
        rows = [draw(st.integers(0, before + q_len - 1)) for _ in range(batch)]
        attention_mask = torch.arange(before + q_len) >= torch.tensor(rows)[:, None]
        if draw(st.booleans()):
            attention_mask &= torch.rand(attention_mask.shape, generator=torch.Generator().manual_seed(rows[0])) < 0.8
        left = (attention_mask.cumsum(1) == 0).sum(1)
    config = None
    if chunk is not None:
        function, window = masking_utils.chunked_causal_mask_function(chunk, left), chunk
        config = type("Config", (), {"attention_chunk_size": chunk})()
        if kind == "packed":  # positions of each sequence count from 0
            positions = torch.arange(q_len) - torch.searchsorted(ids[0], ids[0])
            function = masking_utils.remap_positions_for_packed_sequence(function, positions.expand(batch, -1))
    if kind == "packed":
        function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))
    return {
        "batch_size": batch, "q_length": q_len, "kv_length": kv_len, "q_offset": before, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": attention_mask, "local_size": window, "config": config,
    }  # fmt: skip


@given(batches())
def test_the_description_allows_what_the_model_allows(arguments: dict[str, Any]) -> None:
    described = describe(**arguments)
    assert described.shape[2] == 1, "no mask of these is drawn pair by pair"
    assert np.array_equal(np.broadcast_to(ours(arguments), theirs(arguments).shape), theirs(arguments))


@st.composite
def odd_batches(draw: st.DrawFn) -> dict[str, Any]:
    """The same with what no rule describes: blocks that look both ways, functions of the user's, one pair at a time."""
    arguments = draw(batches())
    batch, tokens = arguments["batch_size"], arguments["kv_offset"] + arguments["kv_length"] + 1
    blocks = st.lists(st.integers(-1, 3), min_size=tokens, max_size=tokens)
    image = masking_utils.blockwise_overlay(torch.tensor([sorted(draw(blocks)) for _ in range(batch)]))
    function, kind = arguments["mask_function"], draw(st.sampled_from(["or", "and", "hole"]))
    if kind == "or":
        function = masking_utils.or_masks(function, image)
    elif kind == "and":
        function = masking_utils.and_masks(function, image)
    else:
        hole = draw(st.integers(0, tokens))
        function = masking_utils.and_masks(function, lambda b, h, q, k: k != hole)
    return arguments | {"mask_function": function, "use_vmap": draw(st.booleans())}


@given(odd_batches())
def test_a_mask_that_no_rule_describes_is_drawn(arguments: dict[str, Any]) -> None:
    assert np.array_equal(np.broadcast_to(ours(arguments), theirs(arguments).shape), theirs(arguments))


def test_a_static_cache_counts_its_tokens_in_a_tensor() -> None:
    arguments: dict[str, Any] = {"mask_function": masking_utils.causal_mask_function, "attention_mask": None}
    counted = describe(2, 1, 20, torch.tensor(7), 0, **arguments)
    assert torch.equal(counted, describe(2, 1, 20, 7, 0, **arguments))
    assert read(counted, 1, 20).first_query == 7


def test_samples_alike_are_one_entry_and_all_ones_no_padding() -> None:
    arguments: dict[str, Any] = {"mask_function": masking_utils.causal_mask_function}
    ones = read(describe(4, 30, 30, attention_mask=torch.ones(4, 30), **arguments), 30, 30)
    assert ones == read(describe(1, 30, 30, **arguments), 30, 30)
    assert ones.samples == (((0, 30, 0),),)


DRAWN = {
    "blocks of images": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1] * 8 + [0] * 6 + [-1] * 16])),
    ),
    "a block in two places": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1] * 8 + [0] * 6 + [-1] * 9 + [0] * 7])),
    ),
    "the future only": lambda b, h, q, k: k > q,
    "a window not named": masking_utils.sliding_window_causal_mask_function(5),
    "a gap": lambda b, h, q, k: (k <= q) & (k != 7),
}


@pytest.mark.parametrize("case", DRAWN)
def test_a_mask_of_another_kind_is_drawn_and_its_bits_are_kept(case: str) -> None:
    arguments = {"batch_size": 1, "q_length": 30, "kv_length": 30, "mask_function": DRAWN[case]}
    assert describe(**arguments).shape[2] > 1
    assert np.array_equal(ours(arguments), theirs(arguments))


def test_a_mask_function_that_takes_one_pair_only() -> None:
    arguments: dict[str, Any] = {"batch_size": 2, "q_length": 9, "kv_length": 9, "use_vmap": True}
    arguments["mask_function"] = lambda *pair: torch.tensor(True)
    assert ours(arguments).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_a_mask_of_the_users_own_is_kept_bit_by_bit(heads: int) -> None:
    mask = torch.rand(2, heads, 30, 70, generator=torch.Generator().manual_seed(0)) < 0.3
    numbers = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given_mask in (mask, numbers, numbers.masked_fill(~mask, -torch.inf)):
        told = read(of_drawn(given_mask, 2, 30, 70), 30, 70)
        dense = compiled("full()", told, (30, 70), 32, told.first_query).to_dense()
        assert np.array_equal(np.broadcast_to(dense, mask.shape), mask.numpy())
    row = torch.rand(1, 1, 1, 30) < 0.5
    told = read(of_drawn(row, 2, 30, 30), 30, 30)
    assert np.array_equal(compiled("full()", told, (30, 30), 16, 0).to_dense()[7], row[0, 0, 0].numpy())


def test_masks_that_add_numbers_or_have_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="adds other numbers"):
        read(of_drawn(torch.rand(1, 1, 30, 30), 1, 30, 30), 30, 30)
    with pytest.raises(ValueError, match=r"\[2 or 1, heads or 1, 30 or 1, 31\], got \[3, 1, 30, 30\]"):
        of_drawn(torch.ones(3, 1, 30, 30).bool(), 2, 30, 31)
    with pytest.raises(ValueError, match=r"or a 4-D one of booleans, got torch.int64"):
        of_drawn(torch.ones(1, 1, 30, 30).long(), 1, 30, 30)


def test_queries_of_one_sequence_and_keys_of_another_are_refused() -> None:
    mask = describe(1, 5, 30, mask_function=masking_utils.bidirectional_mask_function)
    told = read(mask, 5, 30)
    with pytest.raises(ValueError, match="5 queries attend to 30 keys of another one"):
        compiled("local(3)", told, (5, 30), 16, 0)
    assert compiled("full()", told, (5, 30), 16, 0).to_dense().all()


def test_other_masks_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2-D attention_mask"):
        read(torch.zeros(1, 1, 30, 30, dtype=torch.int32), 30, 30)
    with pytest.raises(ValueError, match="for 30 keys, the model has 31"):
        read(describe(1, 30, 30, mask_function=masking_utils.causal_mask_function), 31, 31)


def test_the_pattern_only_takes_away() -> None:
    told = read(describe(1, 30, 30, mask_function=masking_utils.causal_mask_function), 30, 30)
    assert compiled("local(3) | global_tokens(1)", told, (30, 30), 128, 0) == (
        P.causal() & (P.local(3) | P.global_tokens(1))
    ).compile(30)
