"""The description of a batch says what the model's own mask says, or refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.integrations.transformers.masks import describe, read
from sparseflash.integrations.transformers.operators import compiled

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import masking_utils


def ours(arguments: dict[str, Any]) -> np.ndarray:
    """What our description allows, bool [B, q, k]."""
    q_len, kv_len = arguments["q_length"], arguments["kv_length"]
    told = read(describe(**arguments), q_len, kv_len)
    keys = told.first_query + q_len
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
    q_len, before = draw(st.integers(1, 30)), draw(st.integers(0, 30)) if "cache" in kind else 0
    kv_len, kv_offset = before + q_len, 0
    if kind == "static cache":
        kv_len += draw(st.integers(0, 20))
    if kind == "sliding cache" and window is not None:
        kv_offset = max(before - window + 1, 0)
        kv_len -= kv_offset
    attention_mask = None
    if kind == "packed":
        ids = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=q_len, max_size=q_len)))] * batch)
        function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))
    elif draw(st.booleans()):
        rows = [draw(st.integers(0, before + q_len - 1)) for _ in range(batch)]
        attention_mask = torch.arange(before + q_len) >= torch.tensor(rows)[:, None]
        if draw(st.booleans()):
            attention_mask &= torch.rand(attention_mask.shape, generator=torch.Generator().manual_seed(rows[0])) < 0.8
    return {
        "batch_size": batch, "q_length": q_len, "kv_length": kv_len, "q_offset": before, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": attention_mask, "local_size": window,
    }  # fmt: skip


@given(batches())
def test_the_description_allows_what_the_model_allows(arguments: dict[str, Any]) -> None:
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


REFUSED = {
    "blocks of images": (
        masking_utils.or_masks(
            masking_utils.causal_mask_function,
            masking_utils.blockwise_overlay(torch.tensor([[-1] * 8 + [0] * 6 + [-1] * 16])),
        ),
        {},
        "asks for another mask",
    ),
    "chunks": (
        masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long)),
        {"local_size": 8, "config": type("Config", (), {"attention_chunk_size": 8})()},
        "chunked attention",
    ),
    "a mask function of the user's": (
        masking_utils.causal_mask_function,
        {"use_vmap": True},
        "no extra mask functions",
    ),
    "the future only": (lambda b, h, q, k: k > q, {}, "asks for another mask"),
    "a window not named": (masking_utils.sliding_window_causal_mask_function(5), {}, "asks for another mask"),
    "a gap": (lambda b, h, q, k: (k <= q) & (k != 7), {}, "asks for another mask"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_said_is_refused(case: str) -> None:
    function, more, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        read(describe(1, 30, 30, mask_function=function, **more), 30, 30)


def test_queries_of_one_sequence_and_keys_of_another_are_refused() -> None:
    mask = describe(1, 5, 30, mask_function=masking_utils.bidirectional_mask_function)
    with pytest.raises(ValueError, match="5 queries look at 30 keys of another one"):
        read(mask, 5, 30)


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
