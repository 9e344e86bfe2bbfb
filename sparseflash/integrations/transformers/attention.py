"""The attention function that Transformers calls in each layer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseflash.functional.operands import under_autocast
from sparseflash.integrations.transformers.crossing import WITHOUT, Queries, across
from sparseflash.integrations.transformers.drawing import known
from sparseflash.integrations.transformers.masks import describe, of_drawn
from sparseflash.integrations.transformers.operators import EVERYTHING, checked, model_attention
from sparseflash.integrations.transformers.patches import check, names_patches, of_module, reads_none
from sparseflash.integrations.transformers.placing import placed

# Not "sparseflash": Transformers takes a name that contains "flash" for a variant of FlashAttention.
NAME = "block_sparse"
# Tensor keywords from models and trainers that do not change the result of attention, or are handled here
# (`position_ids` and the lengths of packed rows). Any other tensor might select or weight keys.
HARMLESS = {
    *("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
    *("num_items_in_batch", "labels", "shift_labels", "input_ids", "token_type_ids", "cache_position", "inputs_embeds"),
    *("logits_to_keep", "encoder_attention_mask"),
}  # fmt: skip


SIDES = ("encoder", "decoder")
CROSS = "cross"  # in the same dict: attention of the decoder to the encoder
CROSSES = "block_sparse_crosses"  # of a module: whether it is cross-attention
SERVED = "_block_sparse_serves"  # of a class whose forward is ours


class Calls(threading.local):
    """The ``position_ids`` of the running model calls, innermost last, since some models do not pass them to attention.

    Also the queries of a layer's self-attention, for its cross-attention.
    """

    def __init__(self) -> None:
        self._positions: list[Tensor | None] = []
        self._queries: Queries | None = None

    def begin(self, position_ids: Tensor | None) -> None:
        self._positions.append(position_ids)

    def end(self) -> None:
        self._queries = None
        if self._positions:
            self._positions.pop()

    def tell(self, queries: Queries | None) -> None:
        self._queries = queries

    def told(self) -> Queries | None:
        """The queries of the last self-attention, once: each layer sets its own."""
        queries, self._queries = self._queries, None
        return queries

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
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the config's pattern: query [B, Hq, N, D], key [B, Hkv, M, D], value [B, Hkv, M, Dv].

    position_bias: [B or 1, Hq or 1, N or 1, M or 1], as from T5: added to the scores, with a gradient.

    Returns:
        [B, N, Hq, Dv], and None in place of the weights, which are never computed.

    Raises:
        ValueError: what block-sparse attention cannot do: ``output_attentions``, an unknown tensor among ``kwargs``,
            positions of only a part of a sequence.
    """
    _refuse(module, kwargs)
    pattern, block = pattern_of(module)
    batch, q_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    if names_patches(pattern):
        pattern = of_module(module, pattern).written(pattern, q_len)
    own = attention_mask is not None and attention_mask.dtype != torch.int32
    if attention_mask is None:  # the model made no mask: is_causal decides, as for sdpa
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        causal = bool(causal) and not crosses(module)
        attention_mask = _plain(q_len, kv_len, causal, kwargs.get("sliding_window"))
    elif own:
        attention_mask = _given(module, attention_mask, pattern, batch, q_len, kv_len)
    lengths = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if own and lengths != (None, None):
        raise ValueError(
            f"{type(module).__name__} got both a 4-D attention_mask and cu_seq_lens_q of packed rows: give one of them"
        )
    if not (own or crosses(module)):  # a user's 4-D mask is complete: positions of a token tree are not a packed row's
        positions = kwargs.get("position_ids")
        if positions is None and not torch.compiler.is_compiling():
            positions = CALLS.positions
        attention_mask = placed(attention_mask, batch, q_len, positions, *lengths)
    if not torch.compiler.is_compiling() and _tells(module):
        CALLS.tell(None if own and q_len != kv_len else Queries(attention_mask, batch, q_len, kv_len))
    elif crosses(module) and pattern != EVERYTHING:
        queries = None if torch.compiler.is_compiling() else CALLS.told()
        attention_mask = across(module, attention_mask, queries, batch, q_len, kv_len)
    q, k, v = under_autocast(*(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)))
    if not q.dtype == k.dtype == v.dtype:  # some models apply rotary embeddings in float32
        q, k = q.to(v.dtype), k.to(v.dtype)
    bias = position_bias
    if bias is not None and bias.dim() != 4:
        raise ValueError(
            f"{type(module).__name__} passes a position_bias {tuple(bias.shape)} to its attention; block_sparse "
            'needs four dims, [B or 1, heads or 1, N or 1, M or 1]: use attn_implementation="eager"'
        )
    if bias is not None and (bias.dtype != torch.float32 or q.dtype == torch.float64):
        bias = bias.to(q.dtype)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64) if dropout else None
    out = model_attention(
        *(q, k, v, attention_mask),
        pattern=pattern, block=block, scale=q.shape[-1] ** -0.5 if scaling is None else scaling,
        sinks=s_aux, bias=bias, softcap=softcap, dropout=dropout, seed=seed,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    name, instead = type(module).__name__, 'use attn_implementation="eager"'
    if kwargs.get("output_attentions"):
        raise ValueError(f"block_sparse does not compute the weights that output_attentions=True requests: {instead}")
    if crosses(module) and (kwargs.get("cu_seq_lens_q") is not None or kwargs.get("cu_seq_lens_k") is not None):
        raise ValueError(
            f"{name} is cross-attention, which does not support packed rows (cu_seq_lens_q, cu_seq_lens_k): give one "
            "document per row"
        )
    for keyword, value in kwargs.items():
        if isinstance(value, Tensor) and keyword not in HARMLESS:
            raise ValueError(
                f"{name} passes a tensor {keyword}= {tuple(value.shape)} to its attention, which block_sparse does not "
                f"support (a model that selects keys itself, for example): {instead}"
            )


def _given(module: nn.Module, mask: Tensor, pattern: str, batch: int, q_len: int, kv_len: int) -> Tensor:
    """The description of a 4-D mask from the user, or from a model that makes its own masks."""
    if pattern != EVERYTHING and crosses(module):
        raise ValueError(
            f"{type(module).__name__} got a 4-D attention_mask and a pattern for cross-attention, {pattern}: give a "
            f"2-D attention_mask, {WITHOUT}"
        )
    if pattern != EVERYTHING and q_len != kv_len:
        raise ValueError(
            f"{type(module).__name__} got a 4-D attention_mask for {q_len} queries and {kv_len} keys, from which their "
            f"positions in {pattern} are unknown: give the whole sequence with use_cache=False, a 2-D attention_mask, "
            "or no pattern"
        )
    return known(mask, lambda: of_drawn(mask, batch, q_len, kv_len), batch, q_len, kv_len)


def _plain(q_len: int, kv_len: int, causal: bool, window: int | None) -> Tensor:
    """The description of a batch without padding, the last query aligned with the last key."""
    reach = kv_len if window is None else window

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (k > q - reach) if causal else (q - k).abs() <= reach

    return describe(*(1, q_len, kv_len, kv_len - q_len if causal else 0), mask_function=allowed, local_size=window)


def crosses(module: nn.Module) -> bool:
    """Whether a module is cross-attention; ``watching`` marks those that do not declare it."""
    return bool(getattr(module, CROSSES, False) or getattr(module, "is_cross_attention", False))


def may_cross(module: nn.Module) -> bool:
    """Whether a module belongs to a model that has cross-attention."""
    config: Any = getattr(module, "config", None)
    return has_two_sides(config) or bool(getattr(config, "add_cross_attention", False))


def has_two_sides(config: Any) -> bool:
    """Whether a config belongs to an encoder-decoder model; the copies in T5's stacks have is_encoder_decoder=False."""
    return bool(getattr(config, "is_encoder_decoder", False)) or hasattr(config, "num_decoder_layers")


def side_of(module: nn.Module) -> str:
    """The stack of an encoder-decoder model that a self-attention module is in."""
    decodes = getattr(module, "is_decoder", None)
    return "decoder" if (getattr(module, "is_causal", False) if decodes is None else decodes) else "encoder"


def _tells(module: nn.Module) -> bool:
    """Whether a self-attention module comes before cross-attention with a pattern."""
    return has_cross(getattr(module, "config", None)) and not crosses(module) and side_of(module) == "decoder"


def has_cross(config: Any) -> bool:
    """Whether a config has a pattern for cross-attention."""
    pattern = getattr(config, "block_sparse_pattern", None)
    return isinstance(pattern, Mapping) and pattern.get(CROSS) is not None


def pattern_of(module: nn.Module) -> tuple[str, int]:
    """The text of a layer's pattern, and its block size, from the config.

    Cross-attention sees everything, unless the config's dict has an entry for it. The text may contain ``{grid}``,
    which the forward pass fills in, see ``patches.py``.

    Raises:
        TypeError: a pattern that is not text.
        ValueError: a text that is not a pattern, or a list that has no entry for this layer.
    """
    config: Any = module.config
    pattern, block = getattr(config, "block_sparse_pattern", None), getattr(config, "block_sparse_block", None)
    pattern, count = _of_stack(module, pattern)
    if isinstance(pattern, list | tuple):
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise ValueError(
                f"the config has a pattern for each layer, but {type(module).__name__} has no layer_idx: "
                "call sparseflash.integrations.transformers.use_pattern(model, [...])"
            )
        if len(pattern) != count:
            raise ValueError(f"block_sparse_pattern has {len(pattern)} entries, the model {count} layers")
        pattern = pattern[layer]
    text = EVERYTHING if pattern is None else pattern
    if not torch.compiler.is_compiling():
        if isinstance(text, str) and names_patches(text):
            check(module, text)
        else:
            checked(text)
    return text, 128 if block is None else block


def _of_stack(module: nn.Module, pattern: Any) -> tuple[Any, int]:
    """The config's entry for the stack that a module is in, and that stack's number of layers."""
    config: Any = module.config
    count = getattr(config, "num_hidden_layers", 0)
    crossing = crosses(module)
    if pattern is None or (crossing and not isinstance(pattern, Mapping)) or reads_none(module):
        return None, count
    name, two = type(module).__name__, has_two_sides(config)
    if not crossing and may_cross(module) and getattr(module, CROSSES, None) is None:
        raise ValueError(
            f"{name} belongs to a model with cross-attention, whose self-attention block_sparse has to identify first: "
            "call sparseflash.integrations.transformers.use_pattern(model, ...), or the model once before it is "
            "compiled"
        )
    if isinstance(pattern, Mapping):
        if not two or not set(pattern) <= {*SIDES, CROSS}:
            raise ValueError(
                f"block_sparse_pattern has the entries {sorted(pattern)}: an encoder-decoder model takes "
                f"{', '.join(map(repr, SIDES))} and {CROSS!r}, any other model a text or a list"
            )
        side = "decoder" if crossing else side_of(module)
        return pattern.get(CROSS if crossing else side), getattr(config, f"{side}_layers", count)
    if two and isinstance(pattern, list | tuple):
        raise ValueError(
            f"{name} belongs to an encoder-decoder model, where a list has to name its stack: "
            '{"encoder": [...], "decoder": [...]}'
        )
    return pattern, count


def attending(model: Any) -> list[nn.Module]:
    """The self-attention modules of a model in order; empty if the model does not declare them."""
    kinds = []
    for part in model.modules():
        kind = (getattr(part, "_can_record_outputs", None) or {}).get("attentions")
        kinds += [getattr(one, "target_class", one) for one in (kind if isinstance(kind, list | tuple) else [kind])]
    attends: tuple[type[nn.Module], ...] = tuple({kind for kind in kinds if isinstance(kind, type)})
    found: dict[int, nn.Module] = {}
    for named in model.modules():
        if isinstance(named, attends) or hasattr(type(named), SERVED):  # T5 names a layer around the module
            inside = [named] if hasattr(named, "config") else [m for m in named.modules() if hasattr(m, "config")]
            found |= {id(m): m for m in inside if not crosses(m)}
    return list(found.values())


def layers(model: Any) -> list[nn.Module]:
    """The self-attention modules of a model in order.

    Raises:
        ValueError: the model does not declare its attention modules.
    """
    if not (found := attending(model)):
        raise ValueError(
            f"{type(model).__name__} does not declare its attention modules (_can_record_outputs): set "
            "config.block_sparse_pattern by hand"
        )
    return found
