"""Block-sparse attention for Hugging Face Transformers (v5), with the pattern in the model's config.

In one line: :func:`from_pretrained`, or :func:`use_pattern` for a model that is already loaded; :func:`describe` prints
what each layer then reads. Or call ``register()`` once and pass ``attn_implementation="block_sparse"`` to Transformers'
own ``from_pretrained``, ``from_config`` or ``model.set_attn_implementation``. The config holds the pattern:

- ``config.block_sparse_pattern``: the text of a pattern, or a list with a text (or None) for each layer. None, or no
  such entry, means everything that the model's own mask allows. An encoder-decoder model takes one pattern for both, or
  ``{"encoder": ..., "decoder": ..., "cross": ...}``; without ``"cross"``, cross-attention sees everything. In a vision
  model the text may name the ``{grid}`` of patches, which every forward pass fills in (``patches.py``).
- ``config.block_sparse_block``: tokens per block side, default 128.

A pattern can only remove pairs: what the model hides (the future, tokens outside its sliding window, padding, other
sequences of a packed row) stays hidden. transformers is imported only when one of these functions is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

from sparseflash.integrations.transformers.alibi import described
from sparseflash.integrations.transformers.attention import (
    NAME,
    block_sparse_attention,
    crosses,
    pattern_of,
    side_of,
)
from sparseflash.integrations.transformers.attention import layers as attending
from sparseflash.integrations.transformers.operators import checked
from sparseflash.integrations.transformers.owning import own
from sparseflash.integrations.transformers.patches import names_patches
from sparseflash.patterns.grid import make_grid
from sparseflash.patterns.pattern import Pattern

if TYPE_CHECKING:
    from sparseflash.integrations.transformers.finetune import compare, perplexity, train
    from sparseflash.integrations.transformers.overview import describe

__all__ = ["NAME", "compare", "describe", "from_pretrained", "perplexity", "register", "train", "use_pattern"]

OfStack: TypeAlias = str | Pattern | Sequence[str | Pattern | None] | None
Patterns: TypeAlias = OfStack | Mapping[str, OfStack]

_LATER = {"compare": "finetune", "describe": "overview", "perplexity": "finetune", "train": "finetune"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)


def register() -> None:
    """Register ``attn_implementation="block_sparse"`` with Transformers: the attention and the mask function.

    Afterwards, a model whose config names a pattern but uses another implementation warns. Models that would not do
    what their config says are refused by name before their first forward pass: models that never call the attention
    interface, patterns in a config that no layer reads, misspelt entries. Calling it again changes nothing.

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
        raise ImportError('Transformers is not installed: pip install "transformers>=5"') from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"block_sparse needs Transformers 5 or later, found {transformers.__version__}")
    transformers.AttentionInterface.register(NAME, block_sparse_attention)
    transformers.AttentionMaskInterface.register(NAME, described)
    import_module(f"{__name__}.watching").watch()


def from_pretrained(
    kind: Any,
    path: Any,
    *args: Any,
    pattern: Patterns = None,
    layers: Sequence[int] | None = None,
    block: int | None = None,
    **kwargs: Any,
) -> Any:
    """``kind.from_pretrained(path, *args, **kwargs)`` with block-sparse attention.

    Args:
        kind: a model class of Transformers, or an ``AutoModel...`` class.
        path: as for ``kind.from_pretrained``.
        *args: likewise.
        pattern: as for :func:`use_pattern`; None: that of the saved config, if any.
        layers: as for :func:`use_pattern`.
        block: tokens per block side; None: that of the saved config, or 128.
        **kwargs: as for ``kind.from_pretrained``.

    Returns:
        The model.

    Raises:
        ImportError: as :func:`register`.
        TypeError: a pattern of another type than :func:`use_pattern` takes.
        ValueError: as :func:`use_pattern`, an ``attn_implementation``, or ``layers`` or ``block`` without a pattern.

    Example:
        >>> import tempfile, torch, transformers
        >>> from sparseflash.integrations.transformers import from_pretrained
        >>> config = transformers.LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     transformers.LlamaForCausalLM(config).save_pretrained(folder)
        ...     model = from_pretrained(transformers.AutoModelForCausalLM, folder, pattern="local(16)", layers=[1])
        >>> model.config.block_sparse_pattern
        [None, 'local(16)']
    """
    register()
    if "attn_implementation" in kwargs:
        raise ValueError(
            f"attn_implementation is {NAME!r} here, got {kwargs['attn_implementation']!r}; for another one call "
            f"{getattr(kind, '__name__', kind)}.from_pretrained"
        )
    for one in _each(_texts(pattern)):  # before gigabytes are read
        if not names_patches(one):  # depends on the model, which is not loaded yet
            checked(one)
    if pattern is None and (layers is not None or block is not None):
        raise ValueError("layers= and block= need a pattern: give pattern= too")
    model = kind.from_pretrained(path, *args, attn_implementation=NAME, **kwargs)
    if pattern is not None:
        return use_pattern(model, pattern, layers=layers, block=128 if block is None else block)
    import_module(f"{__name__}.watching").examine(model)
    return model


def use_pattern(model: Any, pattern: Patterns = None, *, layers: Sequence[int] | None = None, block: int = 128) -> Any:
    """Switch a model to block-sparse attention over a pattern; its weights are not changed.

    The pattern's text is written into ``model.config`` (into its ``text_config`` if it has one), so ``save_pretrained``
    keeps it. The config is copied first, so other models made from the same object, and the object itself, are not
    changed.

    Args:
        model: a ``PreTrainedModel``.
        pattern: a pattern or its text, or a list of one per layer (None: all that the model allows). Models that do not
            number their attention layers (ViT) get numbers here. An encoder-decoder model (BART, Whisper) takes one of
            these for both, or a dict with ``"encoder"``, ``"decoder"`` and ``"cross"``. The last one is the attention
            of the decoder to the encoder: query i counts from the first token of the decoder, key j from the first
            token of the encoder. Entries that are left out see all that the model allows.
        layers: indices of the layers that get the one pattern; negative ones count from the end. The others see all
            that the model allows. None: all layers.
        block: tokens per block side.

    Returns:
        The model.

    Raises:
        ImportError: as :func:`register`.
        TypeError: a pattern that is none of these.
        ValueError: a text that is not a pattern, a list whose length is not the number of layers, a layer that does not
            exist, dict entries other than these three, an unsupported block size, or a model whose attention cannot be
            replaced.
    """
    register()
    make_grid(block, block, None)
    watching = import_module(f"{__name__}.watching")
    watching.mark_crossing(model)
    config = model.config.get_text_config()
    if layers is not None and getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"layers= selects layers of one stack, but {type(model).__name__} has two: give a pattern for each layer, "
            'as {"encoder": [...], "decoder": [...]}'
        )
    texts = _texts(pattern) if layers is None else _texts(_in_layers(pattern, layers, config.num_hidden_layers))
    give_back = own(model)
    for one in [model.config.get_text_config(), *watching.copies(model)]:
        one.block_sparse_pattern, one.block_sparse_block = texts, block
    try:
        model.set_attn_implementation(NAME)
        watching.examine(model)
        counted = {"encoder": count(), "decoder": count()}
        for module in attending(model):
            layer = next(counted[side_of(module)])
            if getattr(module, "layer_idx", None) is None:
                module.layer_idx = layer  # type: ignore[assignment]
            pattern_of(module)
        for module in filter(crosses, model.modules()):
            if hasattr(module, "config"):
                pattern_of(module)
    except (TypeError, ValueError):
        give_back()
        raise
    return model


def _in_layers(pattern: Patterns, layers: Sequence[int], count: int) -> list[str | Pattern | None]:
    """A list with the pattern at some layers and None at the others."""
    if pattern is not None and not isinstance(pattern, str | Pattern):
        raise ValueError(
            "layers= selects the layers of one pattern: give one pattern, or a list for all layers without layers="
        )
    found: list[str | Pattern | None] = [None] * count
    for layer in layers:
        if not -count <= layer < count:
            raise ValueError(f"layers are numbered from 0 to {count - 1}, got {layer}")
        found[layer] = pattern
    return found


def _texts(pattern: Patterns) -> Any:
    if isinstance(pattern, Mapping):
        return {side: _texts(one) for side, one in pattern.items()}
    if pattern is None or isinstance(pattern, str):
        return pattern
    if isinstance(pattern, Pattern):
        return str(pattern)
    if not isinstance(pattern, list | tuple):
        raise TypeError(
            "pattern= must be a text, a Pattern, a list with one for each layer, or a dict of these by stack; "
            f"got {pattern!r}"
        )
    return [_texts(one) for one in pattern]


def _each(texts: Any) -> Iterator[str]:
    """All texts of a pattern, a list, or a dict of either."""
    if isinstance(texts, Mapping | list):
        for one in texts.values() if isinstance(texts, Mapping) else texts:
            yield from _each(one)
    elif texts is not None:
        yield texts
