"""Small random models of each family, batches for them, and attention that they are compared with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparseflash.integrations.transformers import register
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.parsing import parse

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
register()

VOCABULARY = 61
TOKENS = 40
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, **NO_TOKENS
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, **NO_TOKENS),
    # One layer sees everything, the next one a window.
    "qwen": lambda: transformers.Qwen3Config(
        **LLAMA, use_sliding_window=True, sliding_window=9, max_window_layers=1, **NO_TOKENS
    ),
    "mistral": lambda: transformers.MistralConfig(**LLAMA, sliding_window=9, **NO_TOKENS),
    # Its scores are capped.
    "gemma": lambda: transformers.Gemma2Config(
        **LLAMA, sliding_window=9, attn_logit_softcapping=3.0, query_pre_attn_scalar=8, **NO_TOKENS
    ),
    "bert": lambda: transformers.BertConfig(**SIZES, intermediate_size=48, max_position_embeddings=128),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=24, patch_size=4,
        num_channels=1, num_labels=5,
    ),
}  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen", "mistral", "gemma")
KINDS = {"bert": "AutoModelForMaskedLM", "vit": "AutoModelForImageClassification"}


def reference_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Masked dense attention in the dtype of its operands, over the model's mask and the config's pattern.

    Positions are those of the batch's columns, so it speaks for rows of one sequence without padding on the left.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    (n, m), pattern = (query.shape[2], key.shape[2]), getattr(module.config, "block_sparse_pattern", None)
    if isinstance(pattern, list):
        pattern = pattern[module.layer_idx]
    allowed = torch.ones(1, 1, n, m, dtype=torch.bool) if mask is None else mask
    if pattern is not None:
        grid = Grid(n, m, 16, 16, m - n)
        inside = parse(pattern).at(grid).allows(np.arange(n)[:, None] + m - n, np.arange(m)[None])
        allowed = allowed & torch.from_numpy(np.array(inside))
    scores = query @ key.mT * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if position_bias is None else scores + position_bias
    probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (probabilities @ value).transpose(1, 2).contiguous(), None


def bool_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The model's mask drawn pair by pair, never left to a flag."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})
    return mask


transformers.AttentionInterface.register("reference", reference_attention)
transformers.AttentionMaskInterface.register("reference", bool_mask)


def model(family: str, attention: str = "block_sparse", **config: Any) -> Any:
    """A random model; equal seeds give equal weights."""
    torch.manual_seed(0)
    settings = FAMILIES[family]()
    for name, value in config.items():
        setattr(settings, name, value)
    kind = getattr(transformers, KINDS.get(family, "AutoModelForCausalLM"))
    return spread(kind.from_config(settings, attn_implementation=attention).eval())


def spread(made: Any) -> Any:
    """Random weights under which attention is not nearly uniform."""
    # Initial weights are too small for that; these keep the size of what they are applied to.
    tables = {id(m.weight) for m in made.modules() if isinstance(m, torch.nn.Embedding)}
    for name, weight in made.named_parameters():
        if weight.dim() > 1:
            given = "token" in name or "position" in name or id(weight) in tables
            torch.nn.init.normal_(weight, std=1 if given else (weight.numel() / weight.shape[0]) ** -0.5)
    return made


def like(other: Any, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same model with another attention."""
    made = copy.deepcopy(other).to(dtype)
    made.set_attn_implementation(attention)
    return made


def ids(batch: int = 3, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded(left: list[int], right: list[int], tokens: int = TOKENS) -> Tensor:
    """An attention mask: 0 for so many tokens on either side of each sample."""
    mask = torch.ones(len(left), tokens, dtype=torch.long)
    for row, before, after in zip(mask, left, right, strict=True):
        row[:before] = 0
        row[tokens - after :] = 0
    return mask


def packed(*lengths: int) -> Tensor:
    """Position ids of sequences behind each other."""
    return torch.cat([torch.arange(n) for n in lengths])[None]


def cache_keyword(made: Any) -> str:
    """What this version of Transformers calls the cache."""
    return "cache" if "cache" in inspect.signature(made.model.layers[0].forward).parameters else "past_key_values"


@contextmanager
def recompiles() -> Iterator[list[int]]:
    """How many graphs torch compiles inside; read it afterwards."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found: list[int] = []
    yield found
    found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def check_compiles_whole(model: Any, **tolerance: Any) -> None:
    """Assert that a compiled model serves batches with and without left padding by one graph, with its own logits."""
    with recompiles() as graphs, torch.no_grad():
        compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
        for left in ([0] * 3, [5, 0, 0]):
            mask = padded(left, [0, 0, 9])
            got = compiled(ids(), attention_mask=mask, use_cache=False).logits
    assert graphs == [1]
    with torch.no_grad():
        torch.testing.assert_close(got, model(ids(), attention_mask=mask, use_cache=False).logits, **tolerance)
