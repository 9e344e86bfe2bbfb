"""Attention maps of a pixel transformer: the attention weights of one pixel, over any mask and backend."""

from typing import Any

import torch
from torch import Tensor, nn

from sparseflash.functional.attention import attention
from sparseflash.models.pixel_transformer import Layer, PixelTransformer


def attention_map(model: PixelTransformer, image: Tensor, pixel: tuple[int, int], tokens: str | None = None) -> Tensor:
    """The weights with which one pixel attends to the others, in every layer and head.

    Args:
        model: on the CPU or a GPU.
        image: uint8 [height, width].
        pixel: (y, x) of the query.
        tokens: see `PixelTransformer.forward`.

    Returns:
        fp32 [layers, heads, height, width] on the CPU; each [height, width] sums to 1.

    Raises:
        ValueError: the pixel is outside the image, or not a token.

    Example:
        >>> from sparseflash.models import PixelTransformerConfig
        >>> model = PixelTransformer(PixelTransformerConfig(pattern="local(16)", block=(16, 16), width=16, layers=3))
        >>> attention_map(model, torch.zeros(16, 16, dtype=torch.uint8), (4, 7)).shape
        torch.Size([3, 2, 16, 16])
    """
    height, width = image.shape
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel must lie in the image of {height} x {width}; got {pixel!r}")
    device = next(model.parameters()).device
    images = image[None].to(device)
    place = model.tokens(images, tokens).place[0]
    if not len(at := (place == pixel[0] * width + pixel[1]).nonzero()):
        raise ValueError(f"pixel {pixel!r} is not a token: it, or its tile, is black")

    inputs: list[tuple[Layer, tuple[Any, ...]]] = []

    def remember(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        assert isinstance(layer, Layer)
        inputs.append((layer, arguments))

    hooks = [layer.register_forward_pre_hook(remember) for layer in model.layers]
    try:
        with torch.no_grad():
            model(images, tokens=tokens)
    finally:
        for hook in hooks:
            hook.remove()
    found: Tensor = torch.zeros(len(inputs), model.config.heads, height * width)
    for weights, (layer, (x, mask, cos, sin, grey, *_)) in zip(found, inputs, strict=True):
        with torch.no_grad():
            q, k, v = layer.project(x, cos, sin, grey)
        # An output is the sum of weight * value, so its derivative with respect to a value is the weight.
        v = torch.zeros_like(v).requires_grad_()
        seen = attention(q, k, v, mask)[0, :, at[0, 0], 0].sum()
        (by_value,) = torch.autograd.grad(seen, v)
        weights[:, place.cpu()] = by_value[0, :, :, 0].float().cpu()
    return found.view(*found.shape[:2], height, width)
