"""How good a model is: accuracy with its interval, on fresh images or on a folder."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sparseflash.pathfinder import Dataset, splits
from sparseflash.pathfinder.workers import run_tasks
from sparseflash.train.batch import SYMMETRIES, turned
from sparseflash.train.data import draw
from sparseflash.train.stage import AnyStage


@dataclass(frozen=True)
class Score:
    """Right answers among ``count``.

    Attributes:
        right: how many.
        count: of how many.
        right_in_one_view: how many would be right without the other views; None if there were none.

    Example:
        >>> score = Score(right=950, count=1000)
        >>> score.accuracy, [round(end, 3) for end in score.interval]
        (0.95, [0.935, 0.962])
    """

    right: int
    count: int
    right_in_one_view: int | None = None

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
        return f"{self.accuracy:.1%} of {self.count:,} examples (95 % interval {low:.1%} to {high:.1%})"


def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: str | torch.device = "cpu",
    advance: Callable[[int], None] = lambda done: None,
    tokens: str | None = None,
    views: int = 1,
) -> Score:
    """Score a `PixelTransformer` or a `SequenceTransformer`.

    A mirrored or transposed Pathfinder image has the same answer, but a model with positions sees another image. With
    ``views`` the answer comes from the mean of the logits of several views (test-time augmentation).

    Args:
        model: the model; its mode (training or evaluation) is restored.
        batches: inputs of B examples, and labels int64 [B].
        device: device of the model.
        advance: called with the number of examples of each batch.
        tokens: which pixels are tokens, in place of the model's config.
        views: 1 to 8, for square images: the image itself, mirrored (2 to 4), and these transposed (5 to 8).

    Raises:
        ValueError: no examples, views out of range, or several views of symbols.
    """
    if not 1 <= views <= SYMMETRIES:
        raise ValueError(f"views must be 1 to {SYMMETRIES}; got {views!r}")
    options = {} if tokens is None else {"tokens": tokens}
    training, right, plain, count = model.training, 0, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for inputs, labels in batches:
                seen = torch.stack([model(x.to(device), **options).logits.cpu() for x in _views(inputs, views)])
                right += int((seen.mean(0).argmax(-1) == labels).sum())
                plain += int((seen[0].argmax(-1) == labels).sum())
                count += len(labels)
                advance(len(labels))
    finally:
        model.train(training)
    if not count:
        raise ValueError("there are no examples to evaluate on")
    return Score(right, count, plain if views > 1 else None)


def _views(inputs: Tensor, views: int) -> Iterator[Tensor]:
    if views > 1 and (inputs.ndim != 3 or inputs.shape[1] != inputs.shape[2]):
        raise ValueError(f"views are of square images [B, H, H]; got {list(inputs.shape)}")
    yield inputs
    for number in range(1, views):
        yield torch.from_numpy(turned(inputs.numpy(), np.full(len(inputs), number)))


def held_out(
    stage: AnyStage, count: int | None = None, split: str = "test", batch: int = 50, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first examples of a fixed set of a stage; no training run has seen those of "val" and "test".

    Args:
        stage: the stage.
        count: number of examples; default all.
        split: a name in `sparseflash.pathfinder.SPLITS`; reviews have no "val".
        batch: examples per batch.
        workers: processes that draw ahead; 0 draws on demand. The examples are the same.

    Raises:
        ValueError: an unknown split, or a count that is not in 1 to its size.
    """
    known = stage.splits
    if split not in known:
        raise ValueError(f"split must be one of {', '.join(known)}; got {split!r}")
    indices = known[split]
    count = len(indices) if count is None else count
    if not 1 <= count <= len(indices):
        raise ValueError(f"the {split} set has {len(indices):,} examples; got a count of {count!r}")
    parts = [indices[start : min(start + batch, count)] for start in range(0, count, batch)]
    for images, labels, _ in run_tasks(partial(draw, stage, splits.SEED), parts, max(1, workers)):
        yield images, labels


def stored_images(dataset: Dataset, batch: int = 50) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a folder that `sparseflash.pathfinder.read` opened."""
    for start in range(0, len(dataset), batch):
        images, labels = zip(*(dataset[index] for index in range(start, min(start + batch, len(dataset)))), strict=True)
        yield torch.from_numpy(np.stack(images)), torch.tensor(labels)
