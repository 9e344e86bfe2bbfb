"""Pictures of what a model answers."""

from pathlib import Path

import torch

from sparseflash.models import PixelTransformer
from sparseflash.train.config import Stage
from sparseflash.train.evaluate import fresh_images


def draw_answers(model: PixelTransformer, stage: Stage, path: str | Path, seed: int = 0, count: int = 16) -> None:
    """Draw fresh images with the model's probability that both discs lie on one curve; wrong answers in red.

    Args:
        model: on the CPU or a GPU.
        stage: where the images come from.
        path: the picture; its suffix decides the format.
        seed: of the image stream.
        count: how many images.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    images, labels = next(fresh_images(stage, count, seed, batch=count))
    device = next(model.parameters()).device
    with torch.no_grad():
        same = model(images.to(device)).logits.softmax(-1)[:, 1].cpu()
    columns = min(8, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(1.6 * columns, 1.9 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes in (place := figure.subplots(rows, columns, squeeze=False).ravel()):
        axes.axis("off")
    for axes, image, label, chance in zip(place, images, labels.tolist(), same.tolist(), strict=False):
        axes.imshow(image.numpy(), cmap="gray", vmin=0, vmax=255)
        right = (chance > 0.5) == bool(label)
        axes.set_title(
            f"{'one curve' if label else 'two curves'}\nmodel: {chance:.0%} one",
            fontsize=8,
            color="black" if right else "red",
        )
    figure.savefig(path, dpi=120)
