"""How good a model is: accuracy with its interval, on fresh images or on a folder."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sparseflash.pathfinder import Dataset
from sparseflash.train.config import Stage
from sparseflash.train.data import TEST_INDEX, draw


@dataclass(frozen=True)
class Score:
    """Right answers among ``count``.

    Example:
        >>> score = Score(right=950, count=1000)
        >>> score.accuracy, [round(end, 3) for end in score.interval]
        (0.95, [0.935, 0.962])
    """

    right: int
    count: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy (Wilson 1927)."""
        z, n, p = 1.959964, self.count, self.accuracy
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} of {self.count:,} images (95 % interval {low:.1%} to {high:.1%})"


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda done: None,
) -> Score:
    """Score a model that returns logits, such as `PixelTransformer`.

    Args:
        model: left in the mode it came in.
        batches: images uint8 [B, H, H] and labels int64 [B].
        device: where the model is.
        advance: told how many images each batch had.

    Raises:
        ValueError: no images.
    """
    training, right, count = model.training, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for images, labels in batches:
                answers = model(images.to(device)).logits.argmax(-1).cpu()
                right, count = right + int((answers == labels).sum()), count + len(labels)
                advance(len(labels))
    finally:
        model.train(training)
    if not count:
        raise ValueError("there are no images to evaluate on")
    return Score(right, count)


def fresh_images(stage: Stage, count: int, seed: int = 0, batch: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of a stage that no training run has seen."""
    for start in range(0, count, batch):
        images, labels, _ = draw(stage, seed, TEST_INDEX + start, min(batch, count - start))
        yield images, labels


def stored_images(dataset: Dataset, batch: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a folder that `sparseflash.pathfinder.read` opened."""
    for start in range(0, len(dataset), batch):
        images, labels = zip(*(dataset[index] for index in range(start, min(start + batch, len(dataset)))), strict=True)
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
