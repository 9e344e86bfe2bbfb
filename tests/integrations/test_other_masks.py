"""Chunks, images that look both ways, and masks of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseflash.integrations.transformers import attention, drawing, masks, operators, use_pattern
from tests.integrations.batches import LLAMA, NO_TOKENS, cache_keyword, ids, like, model, packed, padded, spread
from tests.integrations.test_generate import generated

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def llama4(chunk: int = 8) -> Any:
    config = transformers.Llama4TextConfig(
        **LLAMA, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=chunk, interleave_moe_layer_step=2,
        layer_types=["chunked_attention", "full_attention"], **NO_TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    return spread(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="block_sparse").eval())


@pytest.mark.parametrize("left", [[0, 0, 0], [7, 0, 19]])
def test_chunks_equal_eager_and_count_from_the_first_token(left: list[int]) -> None:
    made, mask = llama4(), padded(left, [0, 3, 0])
    with torch.no_grad():
        got, want = (m(ids(), attention_mask=mask).logits for m in (made, like(made, "eager")))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **CLOSE)


def test_chunks_of_a_packed_row_are_those_of_each_document() -> None:
    made, lengths = llama4(), (13, 1, 26)
    eager = like(made, "eager")
    with torch.no_grad():
        alone = torch.cat([eager(part).logits for part in ids(1).split(lengths, 1)], 1)
        for use_cache in (True, False):
            got = made(ids(1), position_ids=packed(*lengths), use_cache=use_cache).logits
            torch.testing.assert_close(got, alone, **CLOSE)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
def test_chunks_are_generated_token_for_token(cache: dict[str, str]) -> None:
    """Over the end of a chunk: a cache forgets the keys before it."""
    made, tokens, mask = llama4(), ids(2, 13), padded([3, 0], [0, 0], 13)
    assert torch.equal(generated(made, tokens, mask, **cache), generated(like(made, "eager"), tokens, mask, **cache))


def test_a_pattern_goes_on_inside_a_chunk() -> None:
    """One that shows everything changes nothing, one of the newest token is that token's value."""
    made = llama4()
    with torch.no_grad():
        dense = made(ids()).logits
        assert torch.equal(use_pattern(made, "local(7)", layers=[0])(ids()).logits, dense), "a chunk holds 8 tokens"
        assert not torch.allclose(use_pattern(made, "local(6)", layers=[0])(ids()).logits, dense)


def seeing(name: str) -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    if name == "gemma3":
        text = LLAMA | {"pad_token_id": 0, "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
        config = transformers.Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=60, eos_token_id=None
        )
    else:
        text = LLAMA | {"pad_token_id": 0, "model_type": "gemma"}
        config = transformers.PaliGemmaConfig(
            text_config=text, vision_config=vision | {"projection_dim": 32}, image_token_index=60, projection_dim=32
        )
    return spread(
        transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="block_sparse").eval()
    )


def images(name: str) -> dict[str, Tensor]:
    """Two rows, padded in front, each with an image and words around it."""
    tokens = 4 if name == "gemma3" else 16
    batch, place = ids(2).clamp(max=50), slice(12, 12 + tokens)
    batch[:, place] = 60
    mask = padded([5, 0], [0, 0])
    batch[mask == 0] = 0
    words = torch.zeros_like(batch)
    if name == "gemma3":
        words[:, place] = 1
    else:
        words[:, 32:] = 1  # what is answered; question and image see each other
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": batch, "attention_mask": mask, "token_type_ids": words, "pixel_values": pixels}


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_tokens_of_an_image_see_each_other_as_in_eager(name: str) -> None:
    made, given = seeing(name), images(name)
    live = given["attention_mask"].bool()
    eager = like(made, "eager")
    logits = [m(**given).logits[live] for m in (made, eager)]
    torch.testing.assert_close(*logits, **CLOSE)
    for out in logits:
        out.square().mean().backward()
    for got, want in zip(made.parameters(), eager.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_what_follows_an_image_is_generated_token_for_token(name: str) -> None:
    made, given = seeing(name), images(name)
    found = [m.generate(**given, max_new_tokens=8, do_sample=False) for m in (made, like(made, "eager"))]
    assert torch.equal(*found)


def tree() -> Tensor:
    """Who sees whom where the tokens are a tree: each its ancestors, as for candidates of speculative decoding."""
    seen = torch.eye(40).bool()
    for token in range(1, 40):
        seen[token] |= seen[(token - 1) // 2]
    return seen[None, None]


@pytest.mark.parametrize("numbers", [False, True])
def test_a_mask_of_the_users_own_equals_eager(numbers: bool) -> None:
    made = model("llama")
    mask = tree().expand(3, -1, -1, -1).contiguous()
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    eager = like(made, "eager")
    depth = {"position_ids": mask[:1, 0].sum(-1) - 1}  # of a tree's tokens: neither one sequence nor a packed row
    assert depth["position_ids"][0, :5].tolist() == [0, 1, 1, 2, 2]
    logits = [
        made(ids(), attention_mask=added if numbers else mask, **depth).logits,
        eager(ids(), attention_mask=added, **depth).logits,
    ]
    torch.testing.assert_close(*logits, **CLOSE)
    for out in logits:
        out.square().mean().backward()
    for got, want in zip(made.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


def test_a_mask_of_the_users_own_is_brought_into_form_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, mask = model("llama"), tree()
    calls: list[Any] = []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return masks.of_drawn(*given)

    monkeypatch.setattr(attention, "of_drawn", counted)
    for cache in (operators._table, drawing.mask_of):
        cache.cache_clear()
    with torch.no_grad():
        first = made(ids(1), attention_mask=mask).logits
        assert torch.equal(made(ids(1), attention_mask=mask).logits, first)
        assert len(calls) == 1, "both layers, and both calls"
        mask[0, 0, 30, 29] = True
        assert not torch.allclose(made(ids(1), attention_mask=mask).logits, first)
    assert drawing.mask_of.cache_info().misses == 2


def test_a_mask_of_the_users_own_and_lengths_are_refused() -> None:
    ends = torch.tensor([0, 15, 40])
    with pytest.raises(ValueError, match="4-D attention_mask and cu_seq_lens_q"):
        model("llama")(ids(1), attention_mask=tree(), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_a_mask_of_the_users_own_meets_the_pattern() -> None:
    made, mask = model("llama", block_sparse_pattern="local(4)"), torch.ones(40, 40).tril().bool()[None, None]
    with torch.no_grad():
        torch.testing.assert_close(made(ids(1), attention_mask=mask).logits, made(ids(1)).logits, **CLOSE)
        cache = {cache_keyword(made): transformers.DynamicCache(config=made.config)}
        made(ids(1, 20), **cache)
        with pytest.raises(ValueError, match=r"LlamaAttention got a 4-D .* 20 queries and 40 keys.*local\(4\)"):
            made(ids(1, 20), attention_mask=mask[:, :, 20:], **cache)
