"""Block-sparse self-attention for the video and image transformers of Diffusers.

:func:`use_pattern` switches a pipeline's transformer over and leaves its weights as they are. Wan, HunyuanVideo, Flux
and CogVideoX are supported. The pattern is over the tokens of the image or the video in the model's order: frame by
frame and row by row. Text in the same sequence sees all and is seen by all (:func:`sparseflash.patterns.beside`), and
cross-attention to text stays dense. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from sparseflash.integrations.diffusers.models import attention_of, kind_of
from sparseflash.integrations.diffusers.processors import dense, sparse
from sparseflash.integrations.diffusers.steps import Denoising
from sparseflash.integrations.diffusers.tables import checked
from sparseflash.patterns.grid import make_grid
from sparseflash.patterns.pattern import Pattern

__all__ = ["use_pattern"]


def use_pattern(
    transformer: Any,
    pattern: str | Pattern | None,
    *,
    layers: Collection[int] | None = None,
    steps: Collection[int] | None = None,
    dense_steps: int = 0,
    block: int = 128,
) -> Any:
    """Restrict the self-attention of a diffusion transformer to a pattern.

    In a pipeline: ``use_pattern(pipe.transformer, "...")``. Each call replaces the effect of earlier calls.

    A forward pass with a smaller timestep than the one before begins a new denoising step; passes with the same
    timestep (with and without the prompt) belong to one step, and a larger timestep begins the next sample. With
    ``steps`` or ``dense_steps``, each forward pass synchronises with the device once, to read the timestep.

    For an image pattern (``shape``) in another order than row by row, queries, keys and values are permuted to that
    order, and the output back, so that blocks of tokens are compact patches.

    Args:
        transformer: ``WanTransformer3DModel``, ``HunyuanVideoTransformer3DModel``, ``FluxTransformer2DModel`` or
            ``CogVideoXTransformer3DModel``, or a subclass.
        pattern: a pattern or its text, for the tokens of the image or the video after patching. None restores the
            model's own attention.
        layers: indices of the layers that use the pattern; negative ones count from the end. The others stay dense.
            Layers are numbered in the order in which the model runs them: in Flux and HunyuanVideo
            ``single_transformer_blocks`` follow ``transformer_blocks``. None: all.
        steps: indices, from 0, of the denoising steps that use the pattern; the others are dense. None: all.
        dense_steps: number of initial steps that stay dense; an alternative to ``steps``.
        block: tokens per block side, one of 16, 32, 64, 128, 256.

    Returns:
        The transformer.

    Raises:
        TypeError: a pattern that is neither a pattern nor text; layers or steps that are not ints.
        ValueError: a transformer of another class, text that is not a pattern, a pattern per sample, a missing layer,
            a negative step, ``steps`` and ``dense_steps`` together. In a forward pass: a pattern for another
            number of tokens; a mask that hides more than padding at the end of the text; an attention backend of
            diffusers that does not call torch's ``scaled_dot_product_attention``.

    Example:
        >>> import torch
        >>> from diffusers import WanTransformer3DModel
        >>> from sparseflash.integrations.diffusers import use_pattern
        >>> model = WanTransformer3DModel(
        ...     num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, ffn_dim=16,
        ...     num_layers=2, rope_max_seq_len=32,
        ... )
        >>> model = use_pattern(model, "neighborhood((6, 4), 2)", layers=[1])  # 3 frames of 2 x 4 patches
        >>> video, text = torch.randn(1, 4, 3, 4, 8), torch.randn(1, 5, 8)
        >>> with torch.no_grad():
        ...     model(video, torch.tensor([999]), text).sample.shape
        torch.Size([1, 4, 3, 4, 8])
    """
    kind = kind_of(transformer)
    modules = attention_of(transformer, kind)
    wanted = None if pattern is None else checked(pattern)
    chosen = set(range(len(modules))) if layers is None else _layers(layers, len(modules))
    denoising = Denoising.of(steps, dense_steps)
    make_grid(block, block, None)
    for module in modules:
        module.set_processor(dense(module.processor))
    Denoising.detach(transformer)
    if wanted is not None:
        denoising.attach(transformer)
        for number in sorted(chosen):
            module = modules[number]
            module.set_processor(sparse(module.processor, wanted, kind.text, denoising, block))
    return transformer


def _layers(layers: Collection[int], count: int) -> set[int]:
    found = set()
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise TypeError(f"layers must be ints, got {layer!r}")
        if not -count <= layer < count:
            raise ValueError(f"layers are numbered from 0 to {count - 1}, got {layer}")
        found.add(layer % count)
    return found
