"""Attention processors of diffusers with block-sparse attention.

A processor projects to queries, keys and values, applies rotary embeddings, attends, and projects back. Ours runs the
model's own code, with its one call of ``scaled_dot_product_attention`` replaced by block-sparse attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparseflash.functional.attention import attention
from sparseflash.integrations.diffusers.steps import Denoising
from sparseflash.integrations.diffusers.tables import Text, mask_of, ordered, used_of
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables.padded import kept

ATTRIBUTE = "sparseflash_layer"  # of a processor: its Layer
EAGER = (
    "use_pattern: layers with a pattern run their attention outside of the graph: call torch.compile without "
    "fullgraph=True"
)


@dataclass(frozen=True, eq=False)
class Layer:
    """The attention of one layer."""

    native: Any  # the model's own processor
    pattern: Pattern
    text: str | None  # as models.Kind.text
    denoising: Denoising
    block: int

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """``scaled_dot_product_attention`` over the pattern: [B, H, N, D] each; the N tokens include text."""
        tokens = query.shape[2]
        if is_causal or key.shape[2] != tokens:
            raise ValueError(
                f"use_pattern is for self-attention of all tokens; got {tokens:,} queries, {key.shape[2]:,} keys, "
                f"is_causal={is_causal}"
            )
        text = self._text(attn_mask, tokens)
        mask = mask_of(self.pattern, text, tokens, self.block)
        order = ordered(self.pattern, text, tokens, query.device)
        if order is None:
            return attention(query, key, value, mask, scale=scale, dropout_p=dropout_p)
        there, back = order
        query, key, value = (x.index_select(2, there) for x in (query, key, value))
        return attention(query, key, value, mask, scale=scale, dropout_p=dropout_p).index_select(2, back)

    def _text(self, attn_mask: Tensor | None, tokens: int) -> Text:
        count = self.denoising.text
        before, after = (count if self.text == side else 0 for side in ("before", "after"))
        used = None
        if attn_mask is not None:  # the same tensor in all layers of a pass
            used = kept(attn_mask, ("used", tokens, after), lambda: used_of(attn_mask, tokens, after))
        return Text(before, after, used)


class Answered(TorchFunctionMode):
    """Within this context, calls of ``scaled_dot_product_attention`` go to a layer's :meth:`Layer.attend`."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.calls = 0
        self._layer = layer

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._layer.attend(*args, **(kwargs or {}))


def dense(processor: Any) -> Any:
    """The model's own processor behind one of ours; any other processor is returned unchanged."""
    layer = getattr(processor, ATTRIBUTE, None)
    return processor if layer is None else layer.native


def sparse(processor: Any, pattern: Pattern, text: str | None, denoising: Denoising, block: int) -> Any:
    """A processor like the model's own that uses the pattern in sparse steps."""
    ours = object.__new__(_kind(processor.__class__))
    ours.__dict__.update(processor.__dict__, **{ATTRIBUTE: Layer(processor, pattern, text, denoising, block)})
    return ours


@lru_cache(maxsize=64)
def _kind(native: Any) -> Any:
    """A subclass of the native class, since attention modules inspect the arguments of a processor's class."""

    @torch.compiler.disable(reason=EAGER)  # type: ignore[untyped-decorator]  # tables are made on the host
    @wraps(native.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        layer: Layer = getattr(self, ATTRIBUTE)
        if not layer.denoising.is_sparse:
            return native.__call__(self, *args, **kwargs)
        if getattr(self, "_parallel_config", None) is not None:
            raise ValueError(
                "use_pattern does not support context parallelism of diffusers, which splits the sequence over "
                "devices: leave out enable_parallelism, or call use_pattern(transformer, None)"
            )
        with Answered(layer) as answered:
            result = native.__call__(self, *args, **kwargs)
        if answered.calls != 1:
            raise ValueError(
                f"use_pattern: {native.__name__} called scaled_dot_product_attention {answered.calls} times, expected "
                f"once; its attention backend is {getattr(self, '_attention_backend', None)!r}: write "
                "transformer.set_attention_backend('native')"
            )
        return result

    return type(f"BlockSparse{native.__name__}", (native,), {"__call__": call})
