"""What a model is trained on: the labels and, where a recipe asks for it, a dense loss over lit pixels."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.train.config import Stage, TrainConfig
from sparseflash.train.data import Batch
from sparseflash.train.sequences import SequenceStage


def loss_of(model: nn.Module, batch: Batch, config: TrainConfig, stage: Stage | SequenceStage) -> tuple[Tensor, Tensor]:
    """The loss, and detached figures: loss, accuracy and, with a dense loss, the accuracy over lit pixels.

    Args:
        model: a `PixelTransformer` or `SequenceTransformer`, or what wraps one.
        batch: on the model's device.
        config: weights of the losses, precision.
        stage: where the batch comes from.
    """
    half = config.precision == "bf16"
    with torch.autocast(batch.labels.device.type, torch.bfloat16) if half else nullcontext():
        output = model(batch.inputs, **stage.options)
        loss = F.cross_entropy(output.logits, batch.labels)
    right = (output.logits.argmax(-1) == batch.labels).float().mean()
    if batch.targets is None:
        return loss, torch.stack([loss.detach(), right])
    wanted = batch.targets.flatten()[output.dense_pixels]
    asked = wanted >= 0
    dense = F.cross_entropy(output.dense_logits.float()[asked], wanted[asked])
    loss = loss + config.dense_weight * dense
    dense_right = (output.dense_logits.argmax(-1)[asked] == wanted[asked]).float().mean()
    return loss, torch.stack([loss.detach(), right, dense_right])
