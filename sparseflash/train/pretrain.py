"""Masked-pixel pretraining: squares of an image are hidden, and the model predicts which of their pixels are lit.

It uses no labels and gives a saved model for `TrainConfig.init`. Results that start from one are reported separately.
Amos et al. 2024, *Never Train from Scratch* (https://arxiv.org/abs/2310.02980), found that such pretraining on the
inputs of the task teaches what labels alone teach slowly. Hidden squares are as long as a dash and its gap, so the
model must continue a curve; single hidden pixels could be predicted from their neighbours.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from sparseflash.models import PixelTransformer
from sparseflash.train.config import TrainConfig
from sparseflash.train.data import DataShard

GREY = 128
"""Hidden pixels show this grey: no drawn area is so."""


def hidden_pixels(images: Tensor, side: int, share: float, rng: torch.Generator) -> Tensor:
    """Pixels under random squares that cover about a share of each image, bool [B, H, W].

    Args:
        images: uint8 [B, H, W].
        side: side of a square, in pixels.
        share: share of the pixels to cover.
        rng: random generator of the positions.
    """
    count, height, width = images.shape
    # A pixel stays visible only if none of the side^2 squares that would cover it is chosen.
    corner = 1 - (1 - share) ** (1 / side**2)
    corners = torch.rand(count, 1, height + side - 1, width + side - 1, generator=rng) < corner
    return F.max_pool2d(corners.float(), side, stride=1)[:, 0] > 0


class MaskedPixels(nn.Module):
    """A model and a head that predicts for each token whether it is lit.

    Args:
        model: a model whose tokens are all pixels.

    Raises:
        ValueError: a model whose tokens depend on the image, which would have no token at hidden pixels.
    """

    def __init__(self, model: PixelTransformer) -> None:
        super().__init__()
        if model.config.tokens != "all":
            raise ValueError(f'masked pixels need tokens "all"; got {model.config.tokens!r}')
        self.model = model
        self.lit_head = nn.Linear(model.config.width, 1)

    def forward(self, images: Tensor, hidden: Tensor) -> Tensor:
        """Mean cross-entropy over hidden pixels.

        Args:
            images: uint8 [B, H, W].
            hidden: bool [B, H, W].
        """
        seen = torch.where(hidden, torch.full_like(images, GREY), images)
        last: list[Tensor] = []
        # Tied layers are one module called several times; the last call is the last layer.
        hook = self.model.layers[-1].register_forward_hook(lambda _, __, output: last.append(output))
        try:
            self.model(seen)
        finally:
            hook.remove()
        place = self.model.tokens(seen).place
        asked = hidden.flatten()[place]
        logits = self.lit_head(last[-1][asked])[:, 0].float()
        lit = (images.flatten()[place][asked] > self.model.config.lit_above).float()
        return F.binary_cross_entropy_with_logits(logits, lit)


def pretrain(
    config: TrainConfig,
    out: str | Path,
    *,
    steps: int,
    side: int = 8,
    share: float = 0.25,
    device: str | torch.device = "cpu",
    workers: int = 0,
) -> list[float]:
    """Train a recipe's model on hidden pixels of its first stage, and save it.

    Args:
        config: model, first stage, batch, peak learning rate, warm-up, precision and seed; labels are not read.
        out: folder that gets the saved model, for `TrainConfig.init`.
        steps: optimizer steps.
        side: side of a hidden square, in pixels.
        share: share of the pixels to hide.
        device: where to train.
        workers: processes that draw images ahead.

    Returns:
        The loss of each step.

    Raises:
        ValueError: a model whose tokens are not all pixels, or a number out of range.
        FloatingPointError: the loss is not finite.
    """
    if steps < 1 or side < 1 or not 0 < share < 1:
        raise ValueError(f"steps and side must be at least 1, share in 0..1; got {steps!r}, {side!r} and {share!r}")
    device = torch.device(device)
    torch.manual_seed(config.seed)
    whole = MaskedPixels(PixelTransformer(config.pixel_model)).to(device)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98))
    rng = torch.Generator().manual_seed(config.seed)
    data, losses = DataShard(config, workers=workers), list[float]()
    try:
        for step in track(range(steps), "hidden pixels", console=Console(stderr=True), transient=True):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate(step, None)
            images = data.take(step, config.first_stage).inputs
            hidden = hidden_pixels(images, side, share, rng).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = whole(images.to(device), hidden)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(whole.parameters(), config.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
            if not losses[-1] < float("inf"):
                raise FloatingPointError(f"step {step}: the loss is {losses[-1]}; a lower learning rate may help")
    finally:
        data.close()
    whole.model.save_pretrained(out)
    return losses
