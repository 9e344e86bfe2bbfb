"""Models of each family equal dense attention under the same mask, alone and in batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.integrations.transformers.attention import block_sparse_attention
from tests.integrations.batches import DECODERS, FAMILIES, TOKENS, ids, like, model, packed, padded

BATCHES: dict[str, dict[str, Tensor]] = {
    "whole": {},
    "padded": {"attention_mask": padded([7, 0, 19], [0, 3, 0])},
    "packed": {"position_ids": packed(13, 1, 26).expand(3, -1)},
}
PATTERNS: dict[str, str | list[str | None] | None] = {
    "model's own": None,
    "full": "full()",
    "local": "local(4)",
    "streaming": "streaming(2, 5)",
    "heads": "per_head(local(2), full(), strided(3), global_tokens([0, 9]) | local(1))",
    "layers": ["butterfly(unit=2)", None],
}


def inputs(family: str, batch: str) -> dict[str, Any]:
    if family == "vit":
        return {"pixel_values": torch.rand(3, 1, 24, 24, generator=torch.Generator().manual_seed(0))}
    # A cache would hide from Transformers that sequences are packed.
    return {"input_ids": ids(), **BATCHES[batch]} | ({"use_cache": False} if family in DECODERS else {})


def results(made: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Logits of real tokens, and the gradient of every weight for a random cotangent of them."""
    logits = made(**batch).logits
    live = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(logits.shape[:-1]).bool()
    logits = logits[live]
    cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.backward(cotangent.to(logits.dtype))
    grads = {name: weight.grad for name, weight in made.named_parameters() if weight.grad is not None}
    made.zero_grad()
    return {"logits": logits.detach(), **grads}


def check(got: dict[str, Tensor], exact: dict[str, Tensor], dense: dict[str, Tensor], tokens: int) -> None:
    """The rule of tests/oracle.py: at most twice the error of dense attention in float32, and rounding of each term.

    A bias sums over tokens what its weight sums with a factor near 1, and its terms may cancel: to nothing, for keys.
    """
    ulp = torch.finfo(torch.float32).eps * (1 + tokens**0.5)
    assert got.keys() == exact.keys() == dense.keys()
    for name, want in exact.items():
        error, allowed = ((x[name].double() - want).abs().max() for x in (got, dense))
        largest = max(want.abs().max(), exact.get(name.replace(".bias", ".weight"), want).abs().max())
        assert error <= 2 * allowed + ulp * largest, name


# Images are not padded, and Transformers packs sequences for decoders only.
MEETING = [(f, b) for f in FAMILIES for b in BATCHES if f in DECODERS or b == "whole" or (f, b) == ("bert", "padded")]


@pytest.mark.parametrize(("family", "batch"), MEETING)
def test_dense_patterns_equal_eager(family: str, batch: str) -> None:
    given = inputs(family, batch)
    made = model(family)
    # Eager attention of these families rounds to float32 on its way, in float64 too.
    exact = results(like(made, "reference", torch.float64), given)
    eager = results(like(made, "eager"), given)
    for pattern in (None, "full()", "causal()" if family in DECODERS else "local(1000)"):
        made.config.block_sparse_pattern = pattern
        check(results(made, given), exact, eager, TOKENS)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bert"])
def test_sparse_patterns_equal_dense_attention_under_the_same_mask(family: str, pattern: str) -> None:
    given = inputs(family, "whole")
    made = model(family, block_sparse_pattern=PATTERNS[pattern], block_sparse_block=16)
    exact = results(like(made, "reference", torch.float64), given)
    check(results(made, given), exact, results(like(made, "reference"), given), TOKENS)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bert"])
def test_in_a_padded_batch_each_sequence_gets_what_it_gets_alone(family: str, pattern: str) -> None:
    made = model(family, block_sparse_pattern=PATTERNS[pattern])
    left, right = [7, 0, 19], [0, 3, 0]
    tokens = ids()
    rows = [(row, before, TOKENS - after) for row, (before, after) in enumerate(zip(left, right, strict=True))]
    positions = torch.stack([(torch.arange(TOKENS) - before).clamp(min=0) for before in left])
    with torch.no_grad():
        together = made(tokens, attention_mask=padded(left, right), position_ids=positions).logits
        for row, start, stop in rows:
            alone = made(tokens[row : row + 1, start:stop]).logits[0]
            torch.testing.assert_close(together[row, start:stop], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_in_a_packed_row_each_sequence_gets_what_it_gets_alone(family: str, pattern: str) -> None:
    made = model(family, block_sparse_pattern=PATTERNS[pattern])
    tokens, lengths = ids(1), [13, 1, 26]
    with torch.no_grad():
        together = made(tokens, position_ids=packed(*lengths), use_cache=False).logits[0]
        alone = [made(part).logits[0] for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_padding_never_reaches_an_output_or_a_gradient() -> None:
    """Whatever stands where the padding is, no bit of a real token's logits or gradient changes.

    NaN there makes the CPU kernel take its careful path for the tokens of the same block, which rounds otherwise.
    """
    made = model("llama", block_sparse_pattern="local(8)")
    mask = padded([7, 0, 19], [0, 3, 0])
    found = []
    for seed in (1, 2):
        embedded = made.get_input_embeddings()(ids()).detach()
        embedded[~mask.bool()] = torch.randn(32, generator=torch.Generator().manual_seed(seed))
        embedded.requires_grad_()
        logits = made(inputs_embeds=embedded, attention_mask=mask).logits[mask.bool()]
        (gradient,) = torch.autograd.grad(logits.square().sum(), embedded)
        found.append((logits, gradient[mask.bool()]))
    assert all(map(torch.equal, *found))
    with torch.no_grad():
        embedded[~mask.bool()] = torch.nan
        beside_nan = made(inputs_embeds=embedded, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(beside_nan, found[0][0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(reentrant: bool) -> None:
    made = model("gpt2", block_sparse_pattern="local(8)", attn_pdrop=0.2, resid_pdrop=0.0, embd_pdrop=0.0).train()
    given = inputs("gpt2", "padded")
    torch.manual_seed(3)
    plain = results(made, given)
    if hasattr(made, "activation_checkpointing_enable"):  # its name from Transformers 5.2x on
        made.activation_checkpointing_enable({"use_reentrant": reentrant})
    else:
        made.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(3)
    again = results(made, given)
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    torch.manual_seed(4)
    assert not torch.equal(results(made, given)["logits"], plain["logits"]), "dropout is on"


def test_half_precision_runs_under_autocast() -> None:
    made = model("llama", block_sparse_pattern="local(8)")
    given = inputs("llama", "padded")
    live = given["attention_mask"].bool()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = made(**given).logits
    with torch.no_grad():
        torch.testing.assert_close(half.float()[live], made(**given).logits[live], rtol=0.1, atol=0.3)


def test_a_decoder_may_be_told_to_look_both_ways() -> None:
    given = inputs("llama", "padded")
    made = model("llama", is_causal=False)
    live = given["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            made(**given).logits[live], like(made, "eager")(**given).logits[live], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_a_layer_without_a_mask_takes_the_models_word(causal: bool, window: int | None) -> None:
    """As for models that draw no mask: `is_causal` and `sliding_window` say it all."""
    layer = model("mistral").model.layers[0].self_attn
    q, k, v = torch.randn(3, 2, 4, 30, 8).unbind(0)
    for queries in (30, 1) if causal else (30,):
        out, _ = block_sparse_attention(layer, q[:, :, -queries:], k, v, None, is_causal=causal, sliding_window=window)
        i, j = torch.arange(30)[:, None], torch.arange(30)
        reach = window or 30
        allowed = ((j <= i) & (j > i - reach)) if causal else (i - j).abs() <= reach
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, allowed)[:, :, -queries:]
        torch.testing.assert_close(out, want.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_sinks_caps_and_dropout_are_those_of_attention() -> None:
    """Bit for bit, gradients too: what gpt-oss and Gemma ask of a layer."""
    layer = model("llama").model.layers[0].self_attn
    q, k, v, dout = torch.randn(4, 2, 4, 30, 8).unbind(0)
    found = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, torch.linspace(-1, 1, 4))]
        query, key, value, sinks = leaves
        torch.manual_seed(0)
        if ours:
            out, _ = block_sparse_attention(layer, query, key, value, None, dropout=0.3, softcap=2.0, s_aux=sinks)
            out = out.transpose(1, 2)
        else:
            out = sf.attention(query, key, value, P.causal(), dropout_p=0.3, softcap=2.0, sinks=sinks)
        found.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(map(torch.equal, *found))


def test_the_config_carries_the_pattern_through_a_file(tmp_path: Any) -> None:
    import transformers

    made = model("llama", block_sparse_pattern=["local(3)", "streaming(1, 4)"])
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="block_sparse")
    assert loaded.config.block_sparse_pattern == ["local(3)", "streaming(1, 4)"]
    with torch.no_grad():
        assert torch.equal(loaded(ids()).logits, made(ids()).logits)
        assert not torch.equal(like(loaded, "eager")(ids()).logits, made(ids()).logits)


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got torch.int64 of shape \(3, 1, 40, 40\)"):
        model("llama")(ids(), attention_mask=torch.ones(3, 1, 40, 40).long())
    for pattern, words in (
        ("lokal(3)", "lokal"),
        (["full()"], "has 1 entries, the model 2 layers"),
        ("per_sample(full(), causal())", "cannot be per sample"),
        ("per_head(full(), causal(), local(2))", "for 3 query heads"),
    ):
        with pytest.raises(ValueError, match=words):
            model("llama", block_sparse_pattern=pattern)(ids())
    with pytest.raises(ValueError, match=r"ViTAttention has no layer_idx.*use_pattern"):
        model("vit", block_sparse_pattern=["full()", "full()"])(torch.rand(1, 1, 24, 24))
