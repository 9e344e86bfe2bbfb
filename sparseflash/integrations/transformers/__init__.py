"""Hugging Face Transformers (v5) with a pattern in the model's config.

``register()`` once; then ``attn_implementation="block_sparse"`` in ``from_pretrained``, ``from_config`` or
``model.set_attn_implementation``. The config says who sees whom:

- ``config.block_sparse_pattern``: the text of a pattern, or a list with a text (or None) for each layer. None, and no
  such entry, is everything that the model's own mask allows.
- ``config.block_sparse_block``: tokens a block side, default 128.

A pattern only takes away: what the model forbids (the future, what lies outside its sliding window, padding, other
sequences of a packed row) stays forbidden. Nothing here imports transformers before ``register`` is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparseflash.integrations.transformers.attention import NAME, block_sparse_attention, layers, pattern_of
from sparseflash.integrations.transformers.masks import describe
from sparseflash.patterns.grid import make_grid
from sparseflash.patterns.pattern import Pattern

if TYPE_CHECKING:
    from sparseflash.integrations.transformers.finetune import compare, perplexity, train

__all__ = ["NAME", "compare", "perplexity", "register", "train", "use_pattern"]

_LATER = ("compare", "perplexity", "train")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.finetune"), name)


def register() -> None:
    """Make ``attn_implementation="block_sparse"`` known to Transformers, its attention and its mask function.

    Calling it again changes nothing.

    Raises:
        ImportError: Transformers is missing or older than version 5.

    Example:
        >>> import torch, transformers
        >>> from sparseflash.integrations.transformers import register
        >>> register()
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        ...     block_sparse_pattern=["local(16)", "streaming(4, 16)"],
        ... )
        >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="block_sparse")
        >>> model(torch.arange(40)[None]).logits.shape
        torch.Size([1, 40, 64])
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(
            'Transformers is not installed: pip install "sparseflash[transformers]" (version 5 or later)'
        ) from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"block_sparse needs Transformers 5 or later, found {transformers.__version__}")
    transformers.AttentionInterface.register(NAME, block_sparse_attention)
    transformers.AttentionMaskInterface.register(NAME, describe)


def use_pattern(
    model: Any, pattern: str | Pattern | Sequence[str | Pattern | None] | None = None, *, block: int = 128
) -> Any:
    """Switch a model to block-sparse attention over a pattern; its weights stay.

    Writes the pattern's text into ``model.config``, so that ``save_pretrained`` keeps it.

    Args:
        model: a ``PreTrainedModel``.
        pattern: a pattern or its text, or one for each layer (None: all that the model allows). A list needs to know
            the layers by number: models that do not number their attention (ViT) get numbers here.
        block: tokens a block side.

    Returns:
        The model.

    Raises:
        ImportError: as :func:`register`.
        ValueError: a text that is no pattern, a list of another length than the layers, a block size not offered, or a
            model whose attention cannot be exchanged.
    """
    register()
    make_grid(block, block, None)
    config = model.config.get_text_config()
    before = {name: getattr(config, name, None) for name in ("block_sparse_pattern", "block_sparse_block")}
    config.block_sparse_pattern, config.block_sparse_block = _texts(pattern), block
    try:
        for layer, module in enumerate(layers(model)):
            if getattr(module, "layer_idx", None) is None:
                module.layer_idx = layer  # type: ignore[assignment]
            pattern_of(module)
    except (TypeError, ValueError):
        for name, value in before.items():
            setattr(config, name, value)
        raise
    model.set_attn_implementation(NAME)
    return model


def _texts(pattern: str | Pattern | Sequence[str | Pattern | None] | None) -> Any:
    if pattern is None or isinstance(pattern, str | Pattern):
        return None if pattern is None else str(pattern)
    return [_texts(one) for one in pattern]
