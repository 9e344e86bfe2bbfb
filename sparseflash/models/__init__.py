"""Models whose attention is a pattern."""

import warnings
from typing import TYPE_CHECKING, Any

from sparseflash.models.attention_maps import attention_map
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
    "attention_map",
    "build",
    "config_from",
    "from_pretrained",
]

if not TYPE_CHECKING:  # a checker would take every misspelt name for one of these

    def __getattr__(name: str) -> Any:
        """The former name of `attention_map`."""
        if name != "looks":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"{__name__}.looks is now {__name__}.attention_map", DeprecationWarning, stacklevel=2)
        return attention_map
