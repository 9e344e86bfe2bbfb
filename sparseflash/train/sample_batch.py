"""A model and a batch of a preset, for measurements: nothing is read from files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseflash.models import Model, build
from sparseflash.train.batch import Batch
from sparseflash.train.stage import AnyStage
from sparseflash.train.tasks import load_preset


def model_and_batch(
    preset: str | Path,
    *,
    batch: int = 1,
    pattern: str | None = None,
    layers: int | None = None,
    length: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[Model, Batch, AnyStage]:
    """The model of a preset and examples of its last stage, ready for a training step.

    Sequences are random symbols of full length: they cost what real ones of that length cost, with no file to read.
    A step is ``model(batch.inputs, **stage.options).logits`` into a cross-entropy with ``batch.labels``.

    Args:
        preset: a name in `sparseflash.train.PRESETS`, or a file.
        batch: examples.
        pattern: another attention pattern, such as ``"full()"`` to compare with; over pixels for images.
        layers: of the model, if not the preset's.
        length: tokens of a document, if not the preset's; of sequences alone.
        device: where both shall be.
        seed: of weights and examples.

    Raises:
        ValueError: an unknown preset, or a length for images.

    Example:
        >>> model, batch, stage = model_and_batch("listops", batch=2, layers=1, length=256)
        >>> model(batch.inputs, **stage.options).logits.shape
        torch.Size([2, 10])
    """
    config = load_preset(preset).config
    model_config, stage = config.model, config.stages[-1]
    if layers is not None:
        model_config = replace(model_config, layers=layers)
    if pattern is not None:
        over_pixels: dict[str, Any] = {} if model_config.symbols else {"unit": "pixel"}
        model_config = replace(model_config, pattern=pattern, **over_pixels)
    torch.manual_seed(seed)
    model = build(model_config).to(device)
    if length is not None and stage.length is None:
        raise ValueError(f"a length is for sequences; {preset} is of images")
    return model, stage.sample(batch, seed, length).to(torch.device(device)), stage
