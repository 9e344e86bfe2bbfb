"""Models of an encoder and a decoder: sparse self-attention, dense cross-attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparseflash.integrations.transformers import use_pattern
from sparseflash.integrations.transformers.attention import crosses, pattern_of
from tests.integrations.batches import FAMILIES, ids, like, padded, spread

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
SIZES: dict[str, Any] = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0,
}  # fmt: skip
ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}


def made(family: str, attention: str = "block_sparse") -> Any:
    text = {"max_position_embeddings": 64, "forced_eos_token_id": None}
    speech = {"num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 64}
    config = {
        "bart": lambda: transformers.BartConfig(**SIZES, **ENDS, **text),
        "marian": lambda: transformers.MarianConfig(**SIZES, **ENDS, **text),
        "whisper": lambda: transformers.WhisperConfig(
            **SIZES, **ENDS, **speech, begin_suppress_tokens=None, suppress_tokens=None
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=61,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=4,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            dropout_rate=0.0,
            **ENDS | {"pad_token_id": 0},
        ),
    }[family]()
    torch.manual_seed(0)
    kind = transformers.AutoModelForSpeechSeq2Seq if family == "whisper" else transformers.AutoModelForSeq2SeqLM
    return spread(kind.from_config(config, attn_implementation=attention).eval())


def inputs(family: str, answers: int = 30) -> dict[str, Any]:
    if family == "whisper":
        given: dict[str, Any] = {"input_features": torch.randn(3, 8, 80, generator=torch.Generator().manual_seed(0))}
    else:
        given = {"input_ids": ids(), "attention_mask": padded([0, 0, 0], [7, 0, 19])}
    return given | ({"decoder_input_ids": ids(3, answers, seed=1)} if answers else {})


FAMILY = ("bart", "marian", "t5", "whisper")


@pytest.mark.parametrize("answers", [30, 40])
@pytest.mark.parametrize("family", FAMILY)
def test_without_a_pattern_both_sides_equal_eager(family: str, answers: int) -> None:
    """With as many tokens on both sides too, where lengths do not tell cross-attention from the rest."""
    sparse = made(family)
    eager, given = like(sparse, "eager"), inputs(family, answers)
    logits = [m(**given).logits for m in (sparse, eager)]
    torch.testing.assert_close(*logits, **CLOSE)
    for out in logits:
        out.square().mean().backward()
    for got, want in zip(sparse.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("family", FAMILY)
def test_generation_equals_eager_token_for_token(family: str, cache: dict[str, str]) -> None:
    sparse = made(family)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1, **cache}
    found = [m.generate(**inputs(family, 0), **settings) for m in (sparse, like(sparse, "eager"))]
    assert torch.equal(*found)


def referenced(sparse: Any) -> Any:
    """The same model with dense attention over the pattern of each layer, masked."""
    reference = like(sparse, "reference")
    for module in reference.modules():
        if hasattr(module, "layer_idx") and hasattr(module, "config"):
            module.config = copy.copy(module.config)
            module.config.block_sparse_pattern = pattern_of(module)[0]
    return reference


@pytest.mark.parametrize("family", FAMILY)
def test_a_pattern_is_for_self_attention_alone(family: str) -> None:
    """Equal to the reference, which is told so layer by layer, with as many tokens on both sides."""
    sparse, given = (
        use_pattern(made(family), {"encoder": ["local(2)", None], "decoder": "local(3)"}),
        inputs(family, 40),
    )
    given.pop("attention_mask", None)
    reference = referenced(sparse)
    assert sum(crosses(module) for module in reference.modules()) == 1
    with torch.no_grad():
        torch.testing.assert_close(sparse(**given).logits, reference(**given).logits, **CLOSE)
        dense = use_pattern(sparse, None)(**given).logits
        for side in ("encoder", "decoder"):
            moved = use_pattern(sparse, {side: "local(1)"})(**given).logits
            assert not torch.allclose(moved, dense, **CLOSE), side
        both = use_pattern(sparse, "local(1)")(**given).logits
        torch.testing.assert_close(
            use_pattern(sparse, dict.fromkeys(("encoder", "decoder"), "local(1)"))(**given).logits, both
        )


def test_an_encoder_alone_attends_as_within_the_model() -> None:
    sparse = use_pattern(made("bart"), {"encoder": "local(2)", "decoder": "local(3)"})
    given = inputs("bart", 0)
    with torch.no_grad():
        alone = sparse.get_encoder()(**given).last_hidden_state
        torch.testing.assert_close(alone, sparse(**given).encoder_last_hidden_state)


def test_a_pattern_goes_through_a_file(tmp_path: Any) -> None:
    sparse, given = use_pattern(made("whisper"), {"encoder": ["local(2)", None]}), inputs("whisper")
    sparse.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path, attn_implementation="block_sparse")
    assert loaded.config.block_sparse_pattern == {"encoder": ["local(2)", None]}
    with pytest.raises(ValueError, match=r"has no layer_idx.*use_pattern"):
        loaded(**given)
    with torch.no_grad():
        again = use_pattern(loaded, loaded.config.block_sparse_pattern)
        assert torch.equal(again(**given).logits, sparse(**given).logits)


def test_a_decoder_that_is_given_an_encoders_states() -> None:
    config = copy.deepcopy(FAMILIES["gpt2"]())
    config.add_cross_attention = True
    torch.manual_seed(0)
    sparse = spread(transformers.GPT2LMHeadModel._from_config(config, attn_implementation="block_sparse").eval())
    states = torch.rand(3, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (m(ids(), encoder_hidden_states=states).logits for m in (sparse, like(sparse, "eager")))
        torch.testing.assert_close(got, want, **CLOSE)
        use_pattern(sparse, "local(40)")
        torch.testing.assert_close(sparse(ids(), encoder_hidden_states=states).logits, want, **CLOSE)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (["local(1)", "local(2)"], "a list has to name its stack"),
        ({"encoder": ["local(1)"]}, "1 entries, the model 2 layers"),
        ({"encoder": "lokal(1)"}, "lokal"),
        ({"cros": "local(1)"}, r"the entries \['cros'\].*'encoder', 'decoder' and 'cross'"),
        ({"cross": ["local(1)", None]}, "2 entries, the model 1 layers"),
        ({"cross": "lokal(1)"}, "lokal"),
    ],
)
def test_what_is_refused(pattern: Any, words: str) -> None:
    sparse = made("bart", "eager")
    with pytest.raises(ValueError, match=words):
        use_pattern(sparse, pattern)
    with pytest.raises(TypeError, match=r"pattern= must be a text, a Pattern, .* got 3"):
        use_pattern(sparse, {"encoder": 3})  # type: ignore[dict-item]
    assert sparse.config._attn_implementation == "eager"
    assert getattr(sparse.config, "block_sparse_pattern", None) is None


def test_a_mapping_for_one_stack_and_layers_of_two_are_refused() -> None:
    from tests.integrations.batches import model

    with pytest.raises(ValueError, match="any other model a text or a list"):
        use_pattern(model("llama", "eager"), {"encoder": "local(1)"})
    with pytest.raises(ValueError, match=r'layers= .*"encoder"'):
        use_pattern(made("bart", "eager"), "local(1)", layers=[0])
    ends = torch.tensor([0, 40, 80, 120])
    with pytest.raises(ValueError, match=r"is cross-attention.*cu_seq_lens_q"):
        made("bart")(**inputs("bart", 40), cu_seq_lens_q=ends, cu_seq_lens_k=ends)


def test_the_position_bias_of_t5_learns_over_a_pattern() -> None:
    """Its stacks have configs of their own, copies of the model's; the first layer of each has the table of buckets."""
    sparse = use_pattern(made("t5"), {"encoder": "local(3)", "decoder": ["local(5)"]}, block=16)
    masked, given = referenced(sparse), inputs("t5")
    got, want = sparse(**given), masked(**given)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    for out in (got, want):
        out.logits.square().mean().backward()
    for side in ("encoder", "decoder"):
        tables = [
            m.get_submodule(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias").weight.grad
            for m in (sparse, masked)
        ]
        assert tables[0].abs().max() > 0
        torch.testing.assert_close(*tables, **CLOSE)


def test_a_layer_that_computes_its_attention_itself_has_no_pattern() -> None:
    """LongT5 and Pegasus-X attend by blocks of their own in the encoder, and ask for attention in the decoder."""
    config = transformers.PegasusXConfig(**SIZES, **ENDS, block_size=16, num_global_tokens=4)
    sparse = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match=r"PegasusXGlobalLocalAttention of PegasusX.* would not read its pattern.*eager"
    ):
        use_pattern(sparse, "local(3)")
    given = inputs("bart")
    with torch.no_grad():
        want = like(sparse, "eager")(**given).logits
        torch.testing.assert_close(use_pattern(sparse, {"decoder": "full()"})(**given).logits, want, **CLOSE)


def test_a_position_bias_of_another_shape_is_refused() -> None:
    sparse = made("t5")
    attend = sparse.encoder.block[0].layer[0].SelfAttention
    attend.compute_bias = lambda *sizes, **rest: torch.zeros(4, 40, 40)
    with pytest.raises(ValueError, match=r"T5Attention passes a position_bias \(4, 40, 40\).*four dims"):
        sparse(**inputs("t5"))
