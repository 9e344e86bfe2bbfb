"""Models whose attention is a pattern."""

from sparseflash.models.attention_maps import looks
from sparseflash.models.auto import Model, ModelConfig, build, config_from, from_pretrained
from sparseflash.models.config import PixelTransformerConfig
from sparseflash.models.pixel_transformer import PixelOutput, PixelTransformer
from sparseflash.models.sequence_config import SequenceTransformerConfig
from sparseflash.models.sequence_transformer import SequenceOutput, SequenceTransformer

__all__ = [
    "Model",
    "ModelConfig",
    "PixelOutput",
    "PixelTransformer",
    "PixelTransformerConfig",
    "SequenceOutput",
    "SequenceTransformer",
    "SequenceTransformerConfig",
    "build",
    "config_from",
    "from_pretrained",
    "looks",
]
