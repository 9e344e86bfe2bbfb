"""A small random model of any family, from the settings that its config happens to have."""

from __future__ import annotations

from typing import Any

import torch

from tests.integrations.batches import VOCABULARY, spread, transformers

SIZES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim embed_dim emb_dim embedding_size decoder_hidden_size lru_width",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts "
    "num_experts_per_token "
    "linear_num_key_heads linear_num_value_heads index_n_heads index_topk_blocks type_vocab_size",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts state_size mamba_d_state mamba_n_heads mamba_d_conv index_block_size",
    8: "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim global_head_dim kv_lora_rank q_lora_rank "
    "o_lora_rank rotary_dim kv_channels linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
    "laurel_rank index_topk attention_chunk_size",
    9: "sliding_window attention_window_size window_size",
    16: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size moe_shared_size mamba_d_head "
    "index_head_dim",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner ffn_hidden_size hidden_dim dff "
    "intermediate_size_mlp shared_intermediate_size ffn_intermediate_size",
    128: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions",
    1: "n_group topk_group first_k_dense_replace n_shared_experts mamba_n_groups bos_token_id decoder_start_token_id",
    0: "pad_token_id padding_idx",
    None: "eos_token_id forced_eos_token_id forced_bos_token_id",
}
SETTINGS = {name: value for value, names in SIZES.items() for name in names.split()}
SETTINGS |= dict.fromkeys(("hidden_dropout", "attention_dropout", "dropout", "layerdrop"), 0.0)
# What a family cannot do without, or with.
OF_FAMILY: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma2": {"query_pre_attn_scalar": 8},
    "llama4_text": {"interleave_moe_layer_step": 2},
    "xglm": {"attention_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 9},
    "minicpm3": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "longcat_flash": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (8, 24), "axial_pos_shape": (8, 16)},
    "luke": {"entity_vocab_size": VOCABULARY},
    "roc_bert": {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "mobilebert": {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32},
    "xmod": {"default_language": "en_XX"},
}
OFF = ("image", "vision", "audio", "speech", "speaker", "video")


MOST_WEIGHTS = 16_000_000
MISSING = object()


class NotBuiltError(Exception):
    """A family of which no small model can be made this way."""


def _setting(config: Any, name: str, default: Any) -> Any:
    """A setting of a config; the default also where each layer has its own, which then stays as it is."""
    try:
        return getattr(config, name, default)
    except Exception:
        return default


def small(family: str) -> Any:
    """A small config of a family.

    Raises:
        NotBuiltError: one of images or sounds, or one that does not take these settings.
    """
    try:
        kind = transformers.CONFIG_MAPPING[family]
        default = kind()
    except Exception as error:
        raise NotBuiltError(f"no default config: {error}") from None
    parts = getattr(kind, "sub_configs", None) or {}
    if any(part.split("_")[0] in OFF for part in parts):
        raise NotBuiltError("takes images or sounds")
    if set(parts) - {"attn_config", "ffn_config", "esmfold_config"}:
        raise NotBuiltError("is made of several models")
    computed = {name for name in SETTINGS if isinstance(getattr(kind, name, None), property)}
    settings = {
        name: value
        for name, value in SETTINGS.items()
        if name not in computed and _setting(default, name, MISSING) is not MISSING
    }
    if _setting(default, "num_key_value_heads", None) == _setting(default, "num_attention_heads", 0):
        settings["num_key_value_heads"] = 4
    if _setting(default, "sliding_window", None) is None:
        settings.pop("sliding_window", None)
    try:
        return kind(**(settings | OF_FAMILY.get(family, {})))
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from None


def build(family: str, kind: str) -> Any:
    """A small random model with eager attention.

    Raises:
        NotBuiltError: no such model can be made, or it has more than a few weights.
    """
    config = small(family)
    torch.manual_seed(0)
    try:
        with torch.device("meta"):
            weights = sum(weight.numel() for weight in getattr(transformers, kind).from_config(config).parameters())
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from None
    if weights > MOST_WEIGHTS:
        raise NotBuiltError(f"has {weights:,} weights at its smallest")
    made = getattr(transformers, kind).from_config(config, attn_implementation="eager").eval()
    return spread(made)
