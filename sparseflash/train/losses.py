"""The loss: of the labels and, if the recipe has one, a dense loss over lit pixels."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.distributed import summed
from sparseflash.train.batch import Batch
from sparseflash.train.config import TrainConfig
from sparseflash.train.stage import AnyStage


def loss_of(
    model: nn.Module,
    batch: Batch,
    config: TrainConfig,
    stage: AnyStage,
    mesh: DeviceMesh | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and detached figures: loss, accuracy and, with a dense loss, the accuracy over lit pixels.

    If ranks share the tokens, the means of their losses and figures are those of the whole images: the dense part of a
    rank is the sum over its own pixels, times the number of ranks, divided by the number of all pixels.

    Args:
        model: a `PixelTransformer` or `SequenceTransformer`, possibly wrapped.
        batch: a batch on the model's device.
        config: the recipe, for weights of the losses and precision.
        stage: the stage of the batch.
        mesh: mesh of the ranks that share the tokens of these images.
    """
    half = config.precision == "bf16"
    shared = {} if mesh is None else {"mesh": mesh}
    with torch.autocast(batch.labels.device.type, torch.bfloat16) if half else nullcontext():
        output = model(batch.inputs, **stage.options, **shared)
        loss = F.cross_entropy(output.logits, batch.labels)
    right = (output.logits.argmax(-1) == batch.labels).float().mean()
    if batch.targets is None:
        return loss, torch.stack([loss.detach(), right])
    wanted = batch.targets.flatten()[output.dense_pixels]
    asked = wanted >= 0
    ranks, pixels = 1 if mesh is None else mesh.size(), asked.sum()
    if mesh is not None:
        pixels = summed(pixels, mesh)
    logits, wanted = output.dense_logits[asked], wanted[asked]
    # In fp32, because under autocast the logits are in half precision.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = loss + config.dense_weight * (ranks * F.cross_entropy(logits, wanted, reduction="sum") / pixels)
    dense_right = ranks * (logits.argmax(-1) == wanted).sum() / pixels
    return loss, torch.stack([loss.detach(), right, dense_right])
