"""What would have no effect is refused by name: models that never ask, patterns nobody reads, entries nearly ours."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from sparseflash import patterns as P
from sparseflash.integrations import transformers as ours
from sparseflash.integrations.transformers.attention import CALLS
from tests.integrations.batches import FAMILIES, LLAMA, SIZES, ids, like, model, padded

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
MIXERS: dict[str, Any] = {
    "DebertaV2Model": lambda: transformers.DebertaV2Config(**SIZES, intermediate_size=48),
    "DebertaModel": lambda: transformers.DebertaConfig(**SIZES, intermediate_size=48),
    "OpenAIGPTModel": lambda: transformers.OpenAIGPTConfig(vocab_size=61, n_embd=32, n_layer=2, n_head=4),
    "XLMModel": lambda: transformers.XLMConfig(vocab_size=61, emb_dim=32, n_layers=2, n_heads=4),
    "FNetModel": lambda: transformers.FNetConfig(**SMALL),
    "MambaModel": lambda: transformers.MambaConfig(**SMALL, state_size=4),
    "RwkvModel": lambda: transformers.RwkvConfig(**SMALL, attention_hidden_size=32),
}  # fmt: skip


def build(config: Any, kind: str = "AutoModel") -> Any:
    torch.manual_seed(0)
    return getattr(transformers, kind).from_config(config, attn_implementation="block_sparse").eval()


@pytest.mark.parametrize("name", MIXERS)
def test_a_pattern_for_a_model_that_never_asks_is_refused_at_the_first_forward(name: str) -> None:
    config = MIXERS[name]()
    made = build(config)
    with torch.no_grad():
        made(ids())  # without a pattern there is nothing to miss
    made.config.block_sparse_pattern = "local(1)"
    with pytest.raises(ValueError, match=rf"{name} mixes its tokens on its own.*no effect.*eager"):
        made(ids())
    assert CALLS.positions is None, "a refused call leaves nothing behind"
    with pytest.raises(ValueError, match=name):
        ours.use_pattern(build(MIXERS[name]()), "local(1)")


MASKS_OF_THEIR_OWN: dict[str, Any] = {
    "RoFormerModel": lambda: transformers.RoFormerConfig(**SIZES, intermediate_size=48),
    "RemBertModel": lambda: transformers.RemBertConfig(**SIZES, intermediate_size=48),
    "XGLMModel": lambda: transformers.XGLMConfig(vocab_size=61, d_model=32, ffn_dim=48, attention_heads=4),
}  # fmt: skip


@pytest.mark.parametrize("words", MASKS_OF_THEIR_OWN)
def test_models_with_attention_of_their_own_are_refused_before_a_shape_does_not_fit(words: str) -> None:
    with pytest.raises(ValueError, match=words + ".*never asks for block_sparse"):
        build(MASKS_OF_THEIR_OWN[words]())(ids(1))


def test_a_model_half_of_which_asks_is_refused_for_the_other_half() -> None:
    """Its decoder would take the pattern, its encoder would not."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BigBirdPegasusConfig(vocab_size=61, d_model=32, **sizes, attention_type="original_full")
    config.block_sparse_pattern = "local(1)"
    words = r"BigBirdPegasusEncoderAttention mixes its tokens on its own.*no effect"
    with pytest.raises(ValueError, match=words):
        build(config)(ids(1))
    with pytest.raises(ValueError, match=words):
        ours.use_pattern(build(config), "local(1)")


def test_switching_a_model_that_cannot_is_an_error() -> None:
    made = transformers.RoFormerModel(MASKS_OF_THEIR_OWN["RoFormerModel"]())
    with pytest.raises(ValueError, match="RoFormerModel"):
        made.set_attn_implementation("block_sparse")


def gemma3() -> Any:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=LLAMA | {"pad_token_id": 0},
        vision_config=vision | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_id=60,
    )


def test_a_pattern_above_the_text_config_is_refused_and_in_it_has_an_effect() -> None:
    config, tokens = gemma3(), ids(1).clamp(max=50)
    config.block_sparse_pattern = "local(1)"
    with pytest.raises(ValueError, match=r"Gemma3\w+ does not read config\.block.*config\.text_config"):
        build(config, "AutoModelForImageTextToText")(input_ids=tokens)
    made = build(gemma3(), "AutoModelForImageTextToText")
    with torch.no_grad():
        dense = made(input_ids=tokens).logits
        moved = ours.use_pattern(made, "local(1)")(input_ids=tokens).logits
    assert made.config.text_config.block_sparse_pattern == "local(1)"
    assert (moved - dense).abs().max() > 1e-3
    made.config.block_sparse_pattern = "local(2)"  # changed later, it is looked at again
    with pytest.raises(ValueError, match="text_config"):
        made(input_ids=tokens)


@pytest.mark.parametrize(
    "key", ["block_sparse_patern", "blocksparse_pattern", "block_sparse_Pattern", "block_sparse_size"]
)
def test_a_misspelt_entry_is_refused_with_what_was_meant(key: str) -> None:
    meant = "did you mean block_sparse_pattern" if "p" in key.lower()[12:] else "block_sparse_pattern and"
    with pytest.raises(ValueError, match=rf"config\.{key}.*{meant}"):
        model("llama", **{key: "local(1)"})
    made = model("llama")
    setattr(made.config, key, "local(1)")
    with pytest.raises(ValueError, match=key):
        made(ids())
    dense = model("llama", "eager", **{key: "local(1)"})  # not ours to judge, until it is switched
    with pytest.raises(ValueError, match=key):
        dense.set_attn_implementation("block_sparse")


MLA = {
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "intermediate_size": 48, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
}  # fmt: skip
SELECTING: dict[str, Any] = {
    "MiniMaxM3VL.*indexer, as block_indices=": lambda: transformers.MiniMaxM3VLTextConfig(
        **LLAMA, num_local_experts=4, num_experts_per_tok=2, index_n_heads=2, index_head_dim=8, index_block_size=4,
        index_topk_blocks=2, layer_types=["minimax_m3_sparse"] * 2,
    ),
    "DeepseekV32.*indexer, as indices=": lambda: transformers.DeepseekV32Config(**SIZES, **MLA),
    "GlmMoeDsa.*indexer, as indices=": lambda: transformers.GlmMoeDsaConfig(**SIZES, **MLA),
    "DeepseekV4.*compressor": lambda: transformers.DeepseekV4Config(
        **SIZES, num_key_value_heads=1, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, q_lora_rank=8, o_lora_rank=8, index_n_heads=2, index_head_dim=8, index_topk=4,
        layer_types=["heavily_compressed_attention", "compressed_sparse_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", SELECTING)
def test_a_model_that_selects_keys_itself_is_refused_by_name(words: str) -> None:
    with pytest.raises(ValueError, match=words + ".*eager"):
        build(SELECTING[words]())(ids(1))


def test_a_tensor_that_nothing_is_known_of_is_refused_by_name() -> None:
    """Also where forward is called by itself, so that nothing looks at the model first."""
    made = model("llama")
    for call in (made, made.forward):
        with pytest.raises(ValueError, match="LlamaAttention passes a tensor chosen="):
            call(ids(), chosen=torch.ones(3))
    made(ids(), labels=ids(), num_items_in_batch=torch.tensor(7))  # as Trainer does


def test_a_saved_pattern_is_not_forgotten_in_silence(tmp_path: Any) -> None:
    ours.use_pattern(model("llama", "eager"), "causal() & local(4)").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"LlamaForCausalLM has block_sparse_pattern='.*attn_implementation="):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = ours.from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
        assert loaded.config.block_sparse_pattern == "causal() & local(4)"
        loaded.set_attn_implementation("sdpa")  # asked for, so known


def test_one_line_loads_a_dense_model_with_a_pattern(tmp_path: Any) -> None:
    dense = model("llama", "eager")
    dense.save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    by_text = ours.from_pretrained(auto, tmp_path, pattern="streaming(1, 4)", block=16, dtype=torch.float64)
    by_hand = ours.use_pattern(copy.deepcopy(dense).double(), P.streaming(1, 4), block=16)
    with torch.no_grad():
        assert torch.equal(by_text(ids()).logits, by_hand(ids()).logits)
        assert not torch.allclose(by_text(ids()).logits, dense.double()(ids()).logits)
    assert by_text.config.block_sparse_block == 16
    last = ours.from_pretrained(auto, tmp_path, pattern=P.local(2), layers=[-1])
    assert last.config.block_sparse_pattern == [None, "local(2)"]
    assert ours.use_pattern(last, P.local(3), layers=range(2)).config.block_sparse_pattern == ["local(3)"] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pattern": "lokal(4)"}, "lokal"),
        ({"pattern": "local(4)", "layers": [2]}, "from 0 to 1, got 2"),
        ({"pattern": ["local(4)", None], "layers": [0]}, "one pattern"),
        ({"pattern": ["local(4)"]}, "1 entries, the model 2 layers"),
        ({"pattern": "local(4)", "block": 100}, "block sizes are"),
        ({"layers": [0]}, "give pattern="),
        ({"pattern": "local(4)", "attn_implementation": "sdpa"}, "got 'sdpa'"),
    ],
)
def test_what_one_line_refuses(given: dict[str, Any], words: str, tmp_path: Any) -> None:
    model("llama", "eager").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        ours.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, **given)


def test_one_line_looks_at_the_model_before_it_is_called(tmp_path: Any) -> None:
    """So that one that is only ever called compiled has been looked at."""
    config = MIXERS["DebertaV2Model"]()
    config.block_sparse_pattern = "local(1)"
    with pytest.warns(UserWarning, match="DebertaV2Model has"):
        transformers.DebertaV2Model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DebertaV2Model mixes its tokens on its own"):
        ours.from_pretrained(transformers.AutoModel, tmp_path)


def test_a_refused_pattern_leaves_the_model_as_it_was() -> None:
    made = model("llama", "eager")
    made.config.block_sparse_patern = "local(1)"
    with pytest.raises(ValueError, match="block_sparse_patern"):
        ours.use_pattern(made, "local(1)")
    assert made.config._attn_implementation == "eager"
    assert getattr(made.config, "block_sparse_pattern", None) is None


def test_watching_twice_wraps_once_and_keeps_signatures() -> None:
    before = transformers.PreTrainedModel.__init__
    ours.register()
    assert transformers.PreTrainedModel.__init__ is before
    import inspect

    assert list(inspect.signature(before).parameters) == ["self", "config", "inputs", "kwargs"]


POOLED: dict[str, Any] = {
    "SiglipTextModel": lambda: transformers.SiglipTextConfig(**SIZES, intermediate_size=48, max_position_embeddings=64),
    "BertModel": FAMILIES["bert"],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", POOLED)
def test_what_is_pooled_from_a_padded_token_equals_eager(name: str, side: str) -> None:
    """SigLIP pools the last token, BERT the first one."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    sparse = kind._from_config(POOLED[name](), attn_implementation="block_sparse").eval()
    for weight in sparse.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    mask = padded([0, 9, 3], [0, 0, 0]) if side == "left" else padded([0, 0, 0], [0, 9, 3])
    with torch.no_grad():
        got, want = (m(ids(), attention_mask=mask) for m in (sparse, like(sparse, "eager")))
    torch.testing.assert_close(got.pooler_output, want.pooler_output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, rtol=1e-4, atol=1e-4)
