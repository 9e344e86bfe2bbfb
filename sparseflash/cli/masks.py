"""A line about each mask that a model attends through, for ``train`` and ``evaluate``."""

import torch

from sparseflash.cli.mask_summary import MaskSummary
from sparseflash.models import ModelConfig, PixelTransformerConfig
from sparseflash.models.auto import pixel_config
from sparseflash.models.tokens import Canvas

_FROM_IMAGES = {"lit_tiles": "over the tiles that hold a lit pixel", "lit_pixels": "over the lit pixels"}


def mask_lines(config: ModelConfig, size: int, tokens: str | None = None) -> list[str]:
    """What the layers attend through: pattern, tokens, block and density.

    Args:
        config: of the model.
        size: side of its images; or tokens of a document that fills its row.
        tokens: which pixels are tokens, where it is not what the config says.

    Returns:
        A line for each distinct pattern, with the layers that have it where there are several.

    Raises:
        ValueError: images that the patterns cannot take.

    Example:
        >>> from sparseflash.train import recipe
        >>> print(*mask_lines(recipe("demo").model, 24))
        mask: local(112): 576 x 576 tokens in blocks of 64 x 64, density 48.148%
    """
    patterns, which = config.patterns_at(size), config.tokens if tokens is None else tokens
    if which == "all":
        masks = dict(zip(patterns, config.masks_at(size), strict=True))
        told = {str(pattern): MaskSummary.of(pattern, masks[pattern], compile_seconds=0.0).line for pattern in masks}
    else:
        _try(pixel_config(config, "tokens are chosen among pixels alone"), (size, size), which)
        told = {str(pattern): f"{pattern}, {_FROM_IMAGES[which]}: a table for each batch" for pattern in patterns}
    if len(told) == 1:
        return [f"mask: {line}" for line in told.values()]
    numbers = {text: [n for n, pattern in enumerate(patterns, 1) if str(pattern) == text] for text in told}
    return [f"mask of layer{'s' * (len(numbers[t]) > 1)} {', '.join(map(str, numbers[t]))}: {told[t]}" for t in told]


def _try(config: PixelTransformerConfig, shape: tuple[int, int], which: str) -> None:
    """Patterns that lit tokens cannot take show before anything is read or written."""
    canvas = Canvas(config, shape, torch.device("cpu"))
    dark = torch.zeros(1, shape[0] * shape[1], dtype=torch.bool)
    if which == "lit_tiles":
        canvas.lit_tiles(dark)
    else:
        canvas.lit_pixels(dark)
