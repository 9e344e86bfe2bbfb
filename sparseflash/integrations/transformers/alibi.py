"""Bloom, MPT and Falcon, whose layers compute attention themselves: here they call ours instead.

Their attention classes get a ``forward`` that does the same before and after the attention, for models whose attention
is block_sparse; other models are unaffected. The model's ALiBi tensor is passed to the attention as a bias, unchanged:
positions in it skip padding, and are rounded to the model's dtype.

Source: Transformers, models/bloom/modeling_bloom.py and models/mpt/modeling_mpt.py; Falcon is in ``falcon.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.integrations.transformers import falcon
from sparseflash.integrations.transformers.attention import NAME, SERVED, block_sparse_attention
from sparseflash.integrations.transformers.masks import describe

PACKAGE = "transformers.models."
BITS = 32


def serve(model: Any) -> bool:
    """Make the layers of a model call our attention; False for any other model."""
    module = sys.modules.get(type(model).__module__)
    kinds: dict[str, Any] = {name: getattr(module, name) for name in _FORWARDS if hasattr(module, name)}
    if not kinds or not type(model).__module__.startswith(PACKAGE):
        return False
    for name, kind in kinds.items():
        if SERVED not in vars(kind):
            kind.__init__ = _told(kind.__init__)
            kind.forward = _chosen(kind.forward, _FORWARDS[name])
            setattr(kind, SERVED, True)
    if "FalconAttention" in kinds:
        falcon.open_to(NAME, module)
    served: Any = tuple(kinds.values())
    for part in model.modules():
        if isinstance(part, served):
            part.config = model.config
    return True


def _told(init: Callable[..., None]) -> Callable[..., None]:
    """An ``__init__`` that keeps the config, which holds the pattern."""

    @wraps(init)
    def told(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        self.config = config

    return told


def _chosen(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = getattr(self, "config", None)
        return (ours if getattr(config, "_attn_implementation", None) == NAME else theirs)(self, *args, **kwargs)

    return forward


def _bloom(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if self.pretraining_tp > 1 and self.slow_but_exact:
        raise ValueError(
            f"{type(self).__name__} with slow_but_exact sums its output in {self.pretraining_tp} parts, which "
            'block_sparse does not do: set slow_but_exact=False, or use attn_implementation="eager"'
        )
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    out, weights = block_sparse_attention(
        *(self, query, key, value, attention_mask),
        dropout=self.attention_dropout.p if self.training else 0.0, scaling=self.inv_norm_factor,
        position_bias=alibi.unflatten(0, (-1, self.num_heads)), output_attentions=output_attentions,
    )  # fmt: skip
    return residual + F.dropout(self.dense(out.flatten(2)), self.hidden_dropout, self.training), weights


def _mpt(
    self: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    mixed = self.Wqkv(hidden_states)
    if self.clip_qkv:
        mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    query, key, value = (x.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for x in mixed.chunk(3, dim=2))
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
    assert attention_mask is not None
    out, weights = block_sparse_attention(
        *(self, query, key, value, _words(attention_mask)),
        dropout=self.attn_dropout_p if self.training else 0.0, scaling=self.softmax_scale,
        position_bias=position_bias[None, :, :, -key.shape[2] :],
    )  # fmt: skip
    return self.out_proj(out.flatten(2)), weights


_FORWARDS: dict[str, Callable[..., Any]] = {
    "BloomAttention": _bloom,
    "MptAttention": _mpt,
    "FalconAttention": falcon.attend,
    "FalconFlashAttention2": falcon.attend,
}


def described(*args: Any, config: Any = None, **kwargs: Any) -> Tensor:
    """The description of a batch (:func:`describe`), in a form that the model passes to its layers unchanged.

    MPT converts every mask to booleans, so it gets bits. Falcon adds ALiBi to masks of four dims, so it gets five.
    """
    mask = describe(*args, config=config, **kwargs)
    if falcon.has_alibi(config):
        return mask[None]
    if getattr(config, "model_type", None) != "mpt":
        return mask
    return ((mask[..., None] >> torch.arange(BITS)) & 1).bool().flatten(-2)


def _words(bits: Tensor) -> Tensor:
    words: Tensor = (bits.unflatten(-1, (-1, BITS)).int() << torch.arange(BITS)).sum(-1).int()
    return words


def is_served(kind: type[nn.Module]) -> bool:
    """Whether a class's module has layers that :func:`serve` has changed."""
    module = sys.modules.get(kind.__module__)
    return any(SERVED in vars(getattr(module, name, object)) for name in _FORWARDS)
