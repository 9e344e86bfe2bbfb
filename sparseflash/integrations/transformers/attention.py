"""The attention function that Transformers calls in every layer."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from sparseflash.functional.arguments import under_autocast
from sparseflash.integrations.transformers.masks import describe
from sparseflash.integrations.transformers.operators import checked, model_attention
from sparseflash.integrations.transformers.placing import placed

# Not "sparseflash": a name with "flash" in it is taken by Transformers for a flavour of FlashAttention.
NAME = "block_sparse"
EVERYTHING = "full()"
# Tensors among the keywords that models and trainers hand on to whoever attends, which do not change what is asked for
# (`position_ids` and the lengths of packed rows are read). Any other one may choose keys, or weigh them.
HARMLESS = {
    *("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("num_items_in_batch", "labels", "shift_labels", "input_ids", "token_type_ids", "cache_position", "inputs_embeds"),
    *("logits_to_keep", "encoder_attention_mask"),
}  # fmt: skip


class Calls(threading.local):
    """The ``position_ids`` of the models that are being called, innermost last; some never hand them to attention."""

    def __init__(self) -> None:
        self._positions: list[Tensor | None] = []

    def begin(self, position_ids: Tensor | None) -> None:
        self._positions.append(position_ids)

    def end(self) -> None:
        if self._positions:
            self._positions.pop()

    @property
    def positions(self) -> Tensor | None:
        return self._positions[-1] if self._positions else None


CALLS = Calls()


def block_sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the config's pattern: query [B, Hq, N, D], key [B, Hkv, M, D], value [B, Hkv, M, Dv].

    Returns:
        [B, N, Hq, Dv], and None for the weights, which are never made.

    Raises:
        ValueError: what block-sparse attention cannot do: weights asked for, cross-attention, a position bias, a mask
            of the user's own, a tensor among ``kwargs`` that nothing is known of, positions of a part of a sequence.
    """
    _refuse(module, attention_mask, kwargs)
    if attention_mask is None:  # the model drew no mask: what it says of itself holds, as for sdpa
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        attention_mask = _plain(query.shape[2], key.shape[2], bool(causal), kwargs.get("sliding_window"))
    positions = kwargs.get("position_ids")
    if positions is None and not torch.compiler.is_compiling():
        positions = CALLS.positions
    attention_mask = placed(
        *(attention_mask, query.shape[0], query.shape[2], positions),
        *(kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")),
    )
    pattern, block = pattern_of(module)
    q, k, v = under_autocast(*(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)))
    if not q.dtype == k.dtype == v.dtype:  # some models rotate in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64) if dropout else None
    out = model_attention(
        *(q, k, v, attention_mask),
        pattern=pattern, block=block, scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        sinks=s_aux, softcap=softcap, dropout=dropout, seed=seed,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    name, instead = type(module).__name__, 'use attn_implementation="eager"'
    if kwargs.get("output_attentions"):
        raise ValueError(f"block_sparse never makes the weights that output_attentions=True asks for: {instead}")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"block_sparse takes no position bias, as {name} has: {instead}")
    for keyword, value in kwargs.items():
        if isinstance(value, Tensor) and keyword not in HARMLESS:
            raise ValueError(
                f"{name} hands a tensor {keyword}= {tuple(value.shape)} to its attention, of which block_sparse knows "
                f"nothing (a model that selects keys itself, for example): {instead}"
            )
    if getattr(module, "is_cross_attention", False) or getattr(module.config, "is_encoder_decoder", False):
        raise ValueError(f"a pattern is about the tokens of one sequence, {name} has cross-attention: {instead}")
    if mask is not None and mask.dtype != torch.int32:
        raise ValueError(
            "block_sparse takes the 2-D attention_mask of a tokenizer (1 for tokens, 0 for padding), but "
            f"{name} got a {mask.dtype} mask of shape {tuple(mask.shape)}; say who sees whom in the pattern"
        )


def _plain(q_len: int, kv_len: int, causal: bool, window: int | None) -> Tensor:
    """The description of a batch without padding, the newest query at the newest key."""
    reach = kv_len if window is None else window

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - reach) if causal else (q - k).abs() <= reach

    return describe(*(1, q_len, kv_len, kv_len - q_len if causal else 0), mask_function=allowed, local_size=window)


def pattern_of(module: nn.Module) -> tuple[str, int]:
    """The text of a layer's pattern, and its block size, from the config.

    Raises:
        TypeError: no text.
        ValueError: a text that is no pattern, or a list that has no entry for this layer.
    """
    config: Any = module.config
    pattern, block = getattr(config, "block_sparse_pattern", None), getattr(config, "block_sparse_block", None)
    if isinstance(pattern, list | tuple):
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"the config has a pattern for each layer, but {type(module).__name__} does not know its number: "
                "call sparseflash.integrations.transformers.use_pattern(model, [...])"
            )
        if len(pattern) != config.num_hidden_layers:
            raise ValueError(
                f"block_sparse_pattern has {len(pattern)} entries, the model {config.num_hidden_layers} layers"
            )
        pattern = pattern[layer]
    text = EVERYTHING if pattern is None else pattern
    if not torch.compiler.is_compiling():
        checked(text)
    return text, 128 if block is None else block


def layers(model: Any) -> list[nn.Module]:
    """The self-attention modules of a model in their order.

    Raises:
        ValueError: the model does not tell which of its modules attend.
    """
    kinds = []
    for part in model.modules():
        kind = (getattr(part, "_can_record_outputs", None) or {}).get("attentions")
        kinds += [getattr(one, "target_class", one) for one in (kind if isinstance(kind, list | tuple) else [kind])]
    attends: tuple[type[nn.Module], ...] = tuple({kind for kind in kinds if isinstance(kind, type)})
    found = [m for m in model.modules() if isinstance(m, attends) and not getattr(m, "is_cross_attention", False)]
    if not found:
        raise ValueError(f"{type(model).__name__} does not say which of its modules attend; set its config by hand")
    return found
