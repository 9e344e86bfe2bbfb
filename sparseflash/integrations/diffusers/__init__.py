"""Diffusers: video and image transformers with a pattern in their self-attention.

:func:`use_pattern` switches a pipeline's transformer; its weights are not changed. Wan, HunyuanVideo, Flux and
CogVideoX are supported. The pattern covers the tokens of the image or the video in the model's order: frame by frame,
row by row. Text tokens in the same sequence are added beside it (:func:`sparseflash.patterns.beside`), and
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
    """Apply a pattern to the self-attention of a diffusion transformer.

    In a pipeline: ``use_pattern(pipe.transformer, "...")``. Each call starts from the model's own attention again.

    A denoising step is a forward pass with a smaller timestep than the one before it; passes with the same timestep
    (with and without the prompt) are one step, and a larger timestep begins the next sample. Where steps matter, each
    forward pass synchronises once with the device to read the timestep.

    If the pattern has an image (``shape``) whose order is not row by row, queries, keys and values are permuted to it,
    and the output back, so that blocks of tokens are compact patches.

    Args:
        transformer: ``WanTransformer3DModel``, ``HunyuanVideoTransformer3DModel``, ``FluxTransformer2DModel`` or
            ``CogVideoXTransformer3DModel``, or a subclass.
        pattern: a pattern or its text, for the tokens of the image or the video after patching. None restores the
            model's own attention.
        layers: indices of the layers with the pattern; negative ones count from the end. The others stay dense. Layers
            count in the order in which they run: in Flux and HunyuanVideo ``single_transformer_blocks`` follow
            ``transformer_blocks``. None: all.
        steps: indices of the denoising steps with the pattern, from 0; the others are dense. None: all.
        dense_steps: number of initial steps that stay dense, instead of ``steps``.
        block: tokens per block side, one of 16, 32, 64, 128, 256.

    Returns:
        The transformer.

    Raises:
        TypeError: a pattern that is neither a Pattern nor a text; layers or steps that are not ints.
        ValueError: a transformer of another class, text that is not a pattern, a pattern per sample, a missing layer,
            a negative step, ``steps`` together with ``dense_steps``. In a forward pass: a pattern for another
            number of tokens; a mask of the model that is more than text whose end is padding; an attention backend of
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
