"""Falcon, with rotary positions or with ALiBi.

Transformers' eager attention adds ALiBi twice: to the scores, and again with the mask, into which the model has written
it. Its default ``sdpa`` attention adds it once, and so do we, with the model's numbers: positions skip padding, and
slopes times positions are rounded to bfloat16.

The model adds ALiBi to every mask of four dims. Ours has five, so it passes unchanged. If ``generate`` made the mask
before the call (for a static cache), the 2-D mask from which ALiBi is made is read back from it.

Source: Transformers, models/falcon/modeling_falcon.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sparseflash.integrations.transformers.attention import NAME, block_sparse_attention
from sparseflash.integrations.transformers.masks import HEADER, PADDING

WRAPPED = "_block_sparse_wrapped"  # attribute of a model class whose forward is wrapped
ATTENTION_MASK = 2  # its index among the model's arguments


def is_falcon(config: Any) -> bool:
    """Whether a config is Falcon's, whose layers choose between eager and sdpa attention in each call."""
    return getattr(config, "model_type", None) == "falcon"


def has_alibi(config: Any) -> bool:
    """Whether a config is that of Falcon with ALiBi."""
    return is_falcon(config) and bool(config.alibi)


def open_to(name: str, module: Any) -> None:
    """Allow models to be made with the attention ``name``, and to be called with masks of five dims."""
    module.FALCON_ATTENTION_CLASSES[name] = module.FalconAttention
    if WRAPPED not in vars(module.FalconModel):
        module.FalconModel.forward = _with_padding(module.FalconModel.forward)
        setattr(module.FalconModel, WRAPPED, True)


def _with_padding(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The model's forward, called with a 2-D mask in any case."""

    @wraps(theirs)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        place: Any = ATTENTION_MASK if len(args) > ATTENTION_MASK else "attention_mask"
        given: Any = list(args) if len(args) > ATTENTION_MASK else kwargs
        mask = given[place] if isinstance(given, list) else given.get(place)
        if self.config._attn_implementation == NAME and has_alibi(self.config) and isinstance(mask, Tensor):
            given[place] = _of_keys(type(self).__name__, mask)
        return theirs(self, *(given if isinstance(given, list) else args), **kwargs)

    return forward


def _of_keys(name: str, mask: Tensor) -> Tensor:
    """[B, M]: 1 for tokens, 0 for padding and for room in the cache."""
    if mask.dim() == 2:
        return mask
    if mask.dim() != 5 or mask.shape[-2] != 1:
        raise ValueError(
            f"{name} with ALiBi counts positions in its attention_mask, which a mask of {mask.dim()} dims "
            f"{list(mask.shape)} does not tell: give a 2-D attention_mask, 1 for tokens and 0 for padding, and who "
            "sees whom in the pattern"
        )
    return (mask[0, :, 0, 0, HEADER:] != PADDING).long()


def attend(
    self: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The forward pass of a layer's attention, with ours."""
    query, key, value = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    bias, dropout = None, 0.0
    if alibi is None:  # neither eager nor sdpa has dropout here
        assert position_embeddings is not None
        query, key = sys.modules[type(self).__module__].apply_rotary_pos_emb(query, key, *position_embeddings)
    else:
        dropout = self.attention_dropout.p if self.training else 0.0
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    if alibi is not None:
        attention_mask = attention_mask[0]
        room = key.shape[2] - alibi.shape[-1]  # of a static cache, which the 2-D mask does not cover
        bias = F.pad(alibi.reshape(-1, self.num_heads, 1, alibi.shape[-1]) * self.inv_norm_factor, (0, room))
    out, weights = block_sparse_attention(
        *(self, query, key, value, attention_mask),
        dropout=dropout, scaling=self.inv_norm_factor, position_bias=bias, position_ids=position_ids,
        output_attentions=output_attentions,
    )  # fmt: skip
    return self.dense(out.flatten(2)), weights
