"""What each layer of a model reads, as a table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from sparseflash.integrations.transformers.attention import NAME, crosses, layers, pattern_of
from sparseflash.integrations.transformers.masks import Description
from sparseflash.integrations.transformers.operators import EVERYTHING, compiled
from sparseflash.integrations.transformers.patches import at_home, names_patches, of_module
from sparseflash.integrations.transformers.watching import mark_crossing

ITSELF, OF_ENCODER = "itself (self)", "encoder (cross)"


@dataclass(frozen=True)
class Layer:
    """What one attention of a layer reads.

    Attributes:
        name: path of the module.
        pattern: text of its pattern, None if it has none.
        density: stored blocks / all blocks of the pattern, restricted to what the model allows.
        speedup: blocks of the layer without a pattern / blocks with it: the expected speed-up of its attention, if time
            went with the blocks. None for a pattern without blocks.
        crosses: whether it is the attention of the decoder to the encoder.
    """

    name: str
    pattern: str | None
    density: float
    speedup: float | None
    crosses: bool = False


def describe(model: Any, tokens: int | None = None, *, console: Console | None = None) -> list[Layer]:
    """Print layer, pattern, density and expected speed-up of a model's attention.

    Args:
        model: a model of Transformers whose attention is ``block_sparse``.
        tokens: length of the one sequence for which densities are computed, and of the encoder's; default 4,096. Where
            a pattern names the ``{grid}`` of patches, it is that of an image or a video of the config's size.
        console: where the table is printed; default the terminal.

    Returns:
        An entry for each self-attention and each cross-attention, in the model's order.

    Raises:
        ValueError: a model with another attention, or one that does not tell which of its modules attend; tokens that
            are not those of an image of the config's size.

    Example:
        >>> import transformers
        >>> from rich.console import Console
        >>> from sparseflash.integrations.transformers import describe, use_pattern
        >>> config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        >>> model = use_pattern(transformers.LlamaModel(config), "local(512)", layers=[1])
        >>> first, second = describe(model, 8192, console=Console(quiet=True))
        >>> first.pattern, second.pattern, f"{second.density:.1%}", f"{second.speedup:.1f}"
        (None, 'local(512)', '7.6%', '6.7')
    """
    if model.config._attn_implementation != NAME:
        raise ValueError(
            f"the attention of {type(model).__name__} is {model.config._attn_implementation!r}, which does not support "
            "patterns: call use_pattern(model, ...) first"
        )
    mark_crossing(model)
    attending = layers(model)
    crossing = [part for part in model.modules() if crosses(part) and hasattr(part, "config")]
    listed, length = set(map(id, [*attending, *crossing])), _length(attending, tokens)

    @cache
    def density(text: str, block: int, rules: Description) -> float:
        return compiled(text, rules, (length, length), block, 0).density

    found = []
    for name, module in model.named_modules():
        if id(module) in listed:
            text, block = pattern_of(module)
            rules = _crossed(length) if crosses(module) else _rules(module, length)
            stored = density(at_home(module, text) if names_patches(text) else text, block, rules)
            speedup = density(EVERYTHING, block, rules) / stored if stored else None
            found.append(Layer(name, None if text == EVERYTHING else text, stored, speedup, crosses(module)))
    (console or Console()).print(_table(found, length))
    return found


def _length(attending: list[nn.Module], tokens: int | None) -> int:
    """The length of the sequence to describe; with ``{grid}`` in a pattern, that of the config's images."""
    for module in attending:
        text, _ = pattern_of(module)
        if names_patches(text):
            patches = of_module(module, text)
            length = patches.special + prod(patches.home)
            if tokens not in (None, length):
                raise ValueError(
                    f"images of {' x '.join(map(str, patches.home))} patches make {length:,} tokens, got "
                    f"tokens={tokens}: leave it out"
                )
            return length
    return 4096 if tokens is None else tokens


def _rules(module: nn.Module, tokens: int) -> Description:
    """What the model allows in this layer, for one sequence without padding."""
    config: Any = module.config
    causal = bool(getattr(module, "is_causal", True)) and getattr(config, "is_causal", True)
    kinds, layer = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    kind = kinds[layer] if kinds and layer is not None and layer < len(kinds) else "sliding_attention"
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    chunk = config.attention_chunk_size if kind == "chunked_attention" else None
    samples = (((0, tokens, 0),),)
    return Description(causal, window if kind == "sliding_attention" else None, 0, samples, chunk)


def _crossed(tokens: int) -> Description:
    """The same for cross-attention from one sequence without padding to another of its length."""
    return Description(False, None, 0, (((0, tokens, 0),),), crossing=(0,))


def _table(found: list[Layer], tokens: int) -> Table:
    both = any(layer.crosses for layer in found)
    table = Table(title=f"{'attention' if both else 'self-attention'} at {tokens:,} tokens")
    for column in ("layer", *(["reads"] if both else []), "pattern"):
        table.add_column(column, overflow="fold")
    for column in ("density", "expected speed-up"):
        table.add_column(column, justify="right")
    for layer in found:
        speedup = "nothing to compute" if layer.speedup is None else f"{layer.speedup:.1f} x"
        reads = [OF_ENCODER if layer.crosses else ITSELF] if both else []
        table.add_row(layer.name, *reads, layer.pattern or "-", f"{layer.density:.1%}", speedup)
    return table
