"""Configs and models of both kinds, by the fields of the config."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from sparseflash.models.config import PixelTransformerConfig
from sparseflash.models.files import CONFIG, load_model, loaded
from sparseflash.models.pixel_transformer import PixelTransformer
from sparseflash.models.sequence_config import SequenceTransformerConfig
from sparseflash.models.sequence_transformer import SequenceTransformer
from sparseflash.patterns.shown import shown_lines
from sparseflash.utils.untrusted import parse_json

Model: TypeAlias = PixelTransformer | SequenceTransformer
ModelConfig: TypeAlias = PixelTransformerConfig | SequenceTransformerConfig


def build(config: ModelConfig) -> Model:
    """A model with random weights."""
    return PixelTransformer(config) if isinstance(config, PixelTransformerConfig) else SequenceTransformer(config)


def pixel_config(config: ModelConfig, otherwise: str) -> PixelTransformerConfig:
    """The config of a model over pixels.

    Raises:
        ValueError: a model over symbols; the message is ``otherwise``.
    """
    if not isinstance(config, PixelTransformerConfig):
        raise ValueError(otherwise)
    return config


def config_from(fields: Mapping[str, Any]) -> ModelConfig:
    """The config with these fields: of a sequence transformer if it has a number of symbols.

    Raises:
        ValueError: fields that are missing, unknown or out of range.

    Example:
        >>> config_from({"symbols": 15, "layers": 2}).layers
        2
    """
    kind = SequenceTransformerConfig if isinstance(fields, dict) and "symbols" in fields else PixelTransformerConfig
    return kind.from_dict(fields)


def from_pretrained(folder: str | Path, device: str | torch.device = "cpu") -> Model:
    """The model that either kind's `save_pretrained` wrote.

    Raises:
        FileNotFoundError: the folder or one of its two files is not there.
        ValueError: a corrupt file, or weights that do not match the config.
    """
    text, weights = load_model(Path(folder))
    try:
        config = config_from(parse_json(text))
    except ValueError as error:
        raise ValueError(f"{Path(folder) / CONFIG} is not a model config: {shown_lines(error)}") from None
    return loaded(lambda: build(config), weights, Path(folder)).to(device)
