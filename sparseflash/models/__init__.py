"""Models whose attention is a pattern."""

from sparseflash.models.config import PixelTransformerConfig
from sparseflash.models.looking import looks
from sparseflash.models.pixel_transformer import PixelOutput, PixelTransformer

__all__ = ["PixelOutput", "PixelTransformer", "PixelTransformerConfig", "looks"]
