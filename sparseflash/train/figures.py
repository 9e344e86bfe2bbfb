"""Pictures of the answers, the mistakes and the attention of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparseflash.models import PixelTransformer
from sparseflash.models.attention_maps import attention_map
from sparseflash.patterns.atomic_write import atomic_write
from sparseflash.train.evaluate import held_out
from sparseflash.train.folder_stage import FolderStage
from sparseflash.train.image_stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

COLUMNS = 8
# The number of pixels searched for mistakes: 128 images of 256 x 256.
SEARCHED = 1 << 23


def draw_answers(model: PixelTransformer, stage: Stage, path: str | Path, count: int = 16) -> None:
    """Draw test images with the model's probability that both discs lie on one curve; wrong answers in red.

    Args:
        model: on the CPU or a GPU.
        stage: where the images come from.
        path: the picture; its suffix decides the format.
        count: how many images.
    """
    images, labels = next(held_out(stage, count, batch=count))
    save(answers(images, labels, _chances(model, stage, images)), path)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure; the suffix of the path decides the format."""
    path = Path(path)
    with atomic_write(path) as file:
        figure.savefig(file, format=path.suffix[1:].lower(), dpi=120)


def mistakes(model: PixelTransformer, stage: Stage | FolderStage, count: int = 16) -> Figure:
    """Wrong answers on some validation images, the most confident first.

    Args:
        model: on the CPU or a GPU.
        stage: where the images come from.
        count: how many to draw at most.
    """
    searched = min(max(count, min(512, SEARCHED // stage.size**2)), len(stage.splits["val"]))
    found: list[tuple[float, Tensor, int, float]] = []
    for images, labels in held_out(stage, searched, "val", batch=8):
        for image, label, chance in zip(images, labels.tolist(), _chances(model, stage, images), strict=True):
            if (chance > 0.5) != bool(label):
                found.append((abs(chance - 0.5), image, label, chance))
    found.sort(key=lambda mistake: -mistake[0])
    chosen = found[:count]
    figure = answers([m[1] for m in chosen], torch.tensor([m[2] for m in chosen]), [m[3] for m in chosen])
    figure.suptitle(f"{len(found)} wrong of {searched} ({stage}); the surest first", fontsize=9)
    return figure


def attention(model: PixelTransformer, stage: Stage, index: int = 0) -> Figure:
    """The attention of each layer from a disc in one validation image, averaged over heads.

    A layer that attends only to nearby pixels is drawn enlarged; a frame in the image shows the part.

    Args:
        model: on the CPU or a GPU.
        stage: where the image comes from.
        index: of the image in the validation set.
    """
    from matplotlib.patches import Rectangle

    from sparseflash.pathfinder import SPLITS, splits
    from sparseflash.pathfinder import draw as drawn

    images, labels, truths = drawn(stage.geometry, splits.SEED, [SPLITS["val"][index]], stage.match_distance)
    image = torch.from_numpy(images[0])
    y, x = truths[0].markers[0]
    weights = attention_map(model, image, (y, x), tokens=stage.tokens).mean(1)  # [layers, height, width]
    figure = _canvas(min(COLUMNS, len(weights) + 1), -(-(len(weights) + 1) // COLUMNS))
    panels = [axes for axes in figure.axes if axes.axison is False]
    panels[0].imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
    panels[0].set_title("one curve" if labels[0] else "two curves", fontsize=8)
    top, bottom, left, right = _part(weights)
    panels[0].add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="c", linewidth=0.8))
    for number, (axes, seen) in enumerate(zip(panels[1:], weights, strict=False)):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=1000)
        axes.imshow(seen.numpy(), cmap="inferno", alpha=0.8, vmax=float(seen.max()))
        axes.plot(x, y, "c+", markersize=5)
        axes.set_xlim(left - 0.5, right + 0.5)
        axes.set_ylim(bottom + 0.5, top - 0.5)
        axes.set_title(f"layer {number + 1}", fontsize=8)
    return figure


FIGURES: Final[dict[str, Callable[[Any, Any], Figure]]] = {"mistakes": mistakes, "attention": attention}
"""What can be drawn of a model and a stage, by the names in a stage's ``figures``."""


def _part(weights: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column of a square that contains the attended pixels."""
    height, width = weights.shape[-2:]
    seen = (weights > 1e-3 * weights.amax((-2, -1), keepdim=True)).any(0).nonzero()
    least, most = seen.amin(0), seen.amax(0)
    half = int((most - least).max()) // 2 + 3
    if 2 * half + 1 > max(height, width) // 2:
        return 0, height - 1, 0, width - 1
    y, x = ((least + most) // 2).tolist()
    return max(0, y - half), min(height - 1, y + half), max(0, x - half), min(width - 1, x + half)


def _chances(model: PixelTransformer, stage: Stage | FolderStage, images: Tensor) -> list[float]:
    """Probability that both discs lie on one curve, of each image."""
    device = next(model.parameters()).device
    with torch.no_grad():
        logits = model(images.to(device), tokens=stage.tokens).logits
    return [float(chance) for chance in logits.softmax(-1)[:, 1].cpu()]


def answers(images: Tensor | list[Tensor], labels: Tensor, chances: list[float]) -> Figure:
    """Images with their labels and a model's answers, wrong ones in red.

    Args:
        images: uint8 [B, height, width].
        labels: int64 [B], 1 where both discs lie on one curve.
        chances: the model's probability of that, of each image.
    """
    figure = _canvas(min(COLUMNS, max(1, len(images))), -(-max(1, len(images)) // COLUMNS))
    for axes, image, label, chance in zip(figure.axes, images, labels.tolist(), chances, strict=False):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(
            f"{'one curve' if label else 'two curves'}\nmodel: {chance:.0%} one",
            fontsize=8,
            color="black" if (chance > 0.5) == bool(label) else "red",
        )
    return figure


def _canvas(columns: int, rows: int) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in figure.subplots(rows, columns, squeeze=False).ravel():
        axes.axis("off")
    return figure
