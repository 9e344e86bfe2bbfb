"""Cross-attention over a pattern of its own, query and key counted from the first token of their sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseflash.integrations.transformers import describe, use_pattern
from sparseflash.integrations.transformers.attention import crosses
from sparseflash.integrations.transformers.masks import Description
from sparseflash.integrations.transformers.operators import compiled
from sparseflash.patterns.parsing import parse
from tests.integrations.batches import ids, like, padded
from tests.integrations.test_encoder_decoder import CLOSE, ENDS, FAMILY, SIZES, inputs, made

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CROSS = "(local(4) - local(1)) | strided(7) | global_tokens(1)"  # every query sees the first key
BOTH = {"encoder": "local(6)", "decoder": "local(9)", "cross": CROSS}


def allowed(text: str, queries: Tensor, keys: Tensor) -> Tensor:
    """The oracle: bool [B, 1, N, M] of positions [B, N] and [B, M]; below 0 is padding."""
    inside = parse(text).allows(queries.numpy()[:, :, None], keys.numpy()[:, None, :])
    return (torch.from_numpy(np.array(inside)) & (keys >= 0)[:, None])[:, None]


def masked(sparse: Any, lengths: Tensor | None = None) -> Any:
    """The model in eager attention, whose cross-attention gets the pattern as a 4-D mask; its other patterns are gone.

    lengths: int [B, 2], tokens of the encoder that are padding on the left, and their end.
    """
    eager = like(sparse, "eager")
    for module in filter(crosses, eager.modules()):
        seen = [0]  # queries before: each call of a model that generates is given the newest

        def hook(module: Any, args: Any, kwargs: dict[str, Any], seen: list[int] = seen) -> Any:
            hidden, states = args[0] if args else kwargs["hidden_states"], kwargs["key_value_states"]
            (batch, n), m = hidden.shape[:2], states.shape[1]
            ends = torch.tensor([[0, m]]).expand(batch, -1) if lengths is None else lengths
            keys = torch.arange(m) - ends[:, :1]
            keys = torch.where(torch.arange(m) < ends[:, 1:], keys, -1)
            mask = allowed(CROSS, (torch.arange(n) + seen[0]).expand(batch, -1), keys)
            seen[0] += n
            name = "mask" if "mask" in kwargs else "attention_mask"
            added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            return args, kwargs | {name: added}

        module.register_forward_pre_hook(hook, with_kwargs=True)
    return eager


def padding(family: str) -> tuple[dict[str, Tensor], Tensor | None]:
    if family == "whisper":
        return {}, None
    return {"attention_mask": padded([7, 0, 3], [0, 19, 5])}, torch.tensor([[7, 40], [0, 21], [3, 35]])


@pytest.mark.parametrize("answers", [30, 40])
@pytest.mark.parametrize("family", FAMILY)
def test_logits_and_gradients_equal_eager_under_the_same_mask(family: str, answers: int) -> None:
    more, ends = padding(family)
    sparse, batch = use_pattern(made(family), {"cross": CROSS}, block=16), inputs(family, answers) | more
    eager = masked(sparse, ends)
    logits = [model(**batch).logits for model in (sparse, eager)]
    torch.testing.assert_close(*logits, **CLOSE)
    with torch.no_grad():
        assert not torch.allclose(use_pattern(like(sparse, "block_sparse"), None)(**batch).logits, logits[0], **CLOSE)
    for out in logits:
        out.square().mean().backward()
    for got, want in zip(sparse.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", FAMILY)
def test_generation_equals_eager_token_for_token(family: str, cache: dict[str, Any]) -> None:
    more, ends = padding(family)
    sparse = use_pattern(made(family), {"cross": [CROSS]})
    choice = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1, **cache}
    batch = inputs(family, 0) | more
    got = sparse.generate(**batch, **choice)
    if cache.get("use_cache", True):
        assert torch.equal(got, masked(sparse, ends).generate(**batch, **choice))
    else:
        assert torch.equal(got, sparse.generate(**batch, **choice | {"use_cache": True}))


@pytest.mark.parametrize("family", FAMILY)
def test_a_cache_gives_what_the_whole_sequence_gives(family: str) -> None:
    sparse, batch = use_pattern(made(family), BOTH, block=16), inputs(family, 0)
    answer = ids(3, 30, seed=1)
    with torch.no_grad():
        whole = sparse(**batch, decoder_input_ids=answer, use_cache=False).logits
        cache, parts = None, []
        for start, stop in ((0, 9), (9, 10), (10, 17), (17, 18), (18, 30)):
            part = answer[:, start:stop]
            name = "cache" if "cache" in sparse(**batch, decoder_input_ids=part[:, :1]) else "past_key_values"
            out = sparse(**batch, decoder_input_ids=part, use_cache=True, **{name: cache} if cache else {})
            cache = out[name]
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_a_padded_row_of_the_decoder_gets_what_it_gets_alone() -> None:
    """T5's positions are relative, so padding on the left moves nothing else."""
    sparse, question, answer = use_pattern(made("t5"), BOTH, block=16), ids(2, 40), ids(2, 30, seed=1)
    with torch.no_grad():
        together = sparse(
            input_ids=question,
            attention_mask=padded([0, 11], [0, 0]),
            decoder_input_ids=answer,
            decoder_attention_mask=padded([0, 8], [0, 0], 30),
        ).logits[1, 8:]
        alone = sparse(input_ids=question[1:, 11:], decoder_input_ids=answer[1:, 8:]).logits[0]
    torch.testing.assert_close(together, alone, **CLOSE)


def test_checkpointed_layers_have_the_same_gradients() -> None:
    sparse, batch = use_pattern(made("bart"), BOTH, block=16), inputs("bart")
    for module in sparse.train().modules():
        for name in ("dropout", "activation_dropout"):
            if name in vars(module):
                setattr(module, name, 0.0)
    again = like(sparse, "block_sparse")
    enable = getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable
    enable()
    for model in (sparse, again):
        model(**batch, use_cache=False).logits.square().mean().backward()
    for got, want in zip(again.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **CLOSE)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(
        ["local(3)", "causal()", "butterfly(unit=4)", "global_tokens(2)", "strided(3, 5)", CROSS, "~streaming(2, 9)"]
    ),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    samples=st.lists(st.tuples(st.integers(0, 69), st.integers(0, 70), st.integers(-20, 90)), min_size=1, max_size=3),
    block=st.sampled_from([16, 32]),
)
def test_masks_are_those_of_both_positions(
    text: str, sizes: tuple[int, int], samples: list[tuple[int, int, int]], block: int
) -> None:
    queries, keys = sizes
    ends = [(min(low, keys), min(max(low, high), keys)) for low, high, _ in samples]
    pieces = tuple(((low, high, low),) if high > low else () for low, high in ends)
    told = Description(False, None, 0, pieces, crossing=tuple(first for *_, first in samples))
    got = compiled(text, told, sizes, block, 0).to_dense().reshape(-1, queries, keys)
    got = np.broadcast_to(got, (len(samples), queries, keys))  # one mask, where all samples are alike
    for sample, (low, high), (*_, first) in zip(got, ends, samples, strict=True):
        q, k = np.arange(queries)[:, None] + first, np.arange(keys) - low
        want = parse(text).allows(np.maximum(q, 0), k) & (k >= 0) & (k < high - low)
        assert np.array_equal(sample[q[:, 0] >= 0], want[q[:, 0] >= 0])


def test_it_goes_through_a_file_and_describe_lists_both(tmp_path: Any) -> None:
    sparse = use_pattern(made("bart"), BOTH)
    sparse.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, attn_implementation="block_sparse")
    assert loaded.config.block_sparse_pattern == BOTH
    with torch.no_grad():
        assert torch.equal(loaded(**inputs("bart")).logits, sparse(**inputs("bart")).logits)
    found = describe(sparse, 64)
    assert [layer.pattern for layer in found if not layer.crosses] == ["local(6)", "local(6)", "local(9)"]
    assert [layer.pattern for layer in found if layer.crosses] == [BOTH["cross"]]


def test_where_queries_stand_is_never_guessed() -> None:
    sparse, batch = use_pattern(made("bart"), {"cross": CROSS}), inputs("bart")
    layer = sparse.model.decoder.layers[0]
    states = torch.rand(3, 5, 32)
    sparse(**batch)  # says nothing of what comes after it
    with pytest.raises(
        ValueError, match=r"BartAttention has a pattern for cross.*its 5 queries are unknown.*use_cache=False"
    ):
        layer.encoder_attn(states, key_value_states=torch.rand(3, 8, 32))
    torch._dynamo.reset()
    graph: Any = torch.compile(layer, backend="eager")
    with torch.no_grad(), pytest.raises(ValueError, match=r"without torch\.compile"):
        graph(states, None, torch.rand(3, 8, 32))


@pytest.mark.parametrize(
    ("pattern", "batch", "words"),
    [
        ("random_blocks(1, unit=4)", {}, "depends on the length.*random_blocks"),
        ("beside(local(3), after=2)", {}, "depends on the length"),
        (CROSS, {"attention_mask": torch.ones(3, 1, 30, 40, dtype=torch.bool)}, "4-D attention_mask and a pattern for"),
    ],
)
def test_what_is_refused(pattern: str, batch: dict[str, Any], words: str) -> None:
    sparse = use_pattern(made("bart"), {"cross": pattern})
    states = sparse.get_encoder()(ids())
    with pytest.raises(ValueError, match=words):
        sparse(**inputs("bart") | batch, encoder_outputs=states)


def test_a_model_whose_cross_attention_never_asks_is_refused() -> None:
    sparse = made("bart")
    for layer in sparse.model.decoder.layers:
        layer.encoder_attn = torch.nn.Identity()
    with pytest.raises(ValueError, match=r'never asks for block_sparse cross-attention.*"cross" would have no'):
        use_pattern(sparse, {"cross": CROSS})


def test_a_decoder_of_longer_answers_than_the_question() -> None:
    config = transformers.BartConfig(**SIZES, **ENDS, max_position_embeddings=64)
    sparse = transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation="block_sparse").eval()
    use_pattern(sparse, {"cross": CROSS}, block=16)
    batch = {"input_ids": ids(3, 20), "decoder_input_ids": ids(3, 50, seed=1)}
    with torch.no_grad():
        torch.testing.assert_close(sparse(**batch).logits, masked(sparse)(**batch).logits, **CLOSE)
