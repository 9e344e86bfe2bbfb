"""The supported transformers of diffusers: where their self-attention is, and where text is in the sequence."""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    """The layout of a class of transformers."""

    blocks: tuple[str, ...]  # lists of blocks, in the order in which the model runs them
    attention: str  # the self-attention of a block
    text: str | None  # "before" or "after" the tokens of the image in the same sequence; None: not in the sequence


# As of diffusers 0.42.1, models/transformers/: the concatenations in the attention processors and in the blocks.
KINDS = {
    "CogVideoXTransformer3DModel": Kind(("transformer_blocks",), "attn1", "before"),
    "FluxTransformer2DModel": Kind(("transformer_blocks", "single_transformer_blocks"), "attn", "before"),
    "HunyuanVideoTransformer3DModel": Kind(("transformer_blocks", "single_transformer_blocks"), "attn", "after"),
    "WanTransformer3DModel": Kind(("blocks",), "attn1", None),
}


def kind_of(transformer: Any) -> Kind:
    """The kind of a transformer.

    Raises:
        ValueError: a transformer of an unsupported class.
    """
    for name in (cls.__name__ for cls in type(transformer).__mro__):
        if name in KINDS:
            return KINDS[name]
    inner = getattr(transformer, "transformer", None)
    hint = "; for a pipeline, give its transformer: use_pattern(pipe.transformer, ...)" if inner is not None else ""
    raise ValueError(f"use_pattern supports {', '.join(KINDS)}; got {type(transformer).__name__}{hint}")


def attention_of(transformer: Any, kind: Kind) -> list[Any]:
    """The self-attention modules, in the order in which the model runs them."""
    return [getattr(block, kind.attention) for name in kind.blocks for block in getattr(transformer, name)]
