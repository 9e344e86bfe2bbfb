"""Training images straight from the generator: (seed, index) decides an image, so the step number decides a batch."""

import multiprocessing
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparseflash import pathfinder
from sparseflash.train.config import Stage, TrainConfig

# Fresh images for a score come from indices that no training run reaches.
TEST_INDEX = 1 << 31


class Batch(NamedTuple):
    """Images and what is to be learned about them, B images of H x H pixels."""

    images: Tensor  # uint8 [B, H, H]
    labels: Tensor  # int64 [B]
    targets: Tensor | None  # int64 [B, H, H]: markers on the curve of each pixel, -1 where there is none

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        return Batch(self.images.to(device), self.labels.to(device), targets)


def draw(stage: Stage, seed: int, start: int, count: int, dense: bool = False) -> Batch:
    """Images ``start .. start + count - 1`` of a stage.

    Args:
        stage: the distribution.
        seed: of the image stream.
        start: index of the first image.
        count: how many.
        dense: with the ground truth for a dense loss.

    Example:
        >>> from sparseflash.pathfinder import Geometry
        >>> draw(Stage(Geometry.lra(32)), seed=0, start=7, count=2, dense=True).targets.shape
        torch.Size([2, 32, 32])
    """
    images, labels, truths = pathfinder.generate_with_truth(
        count=count, seed=seed, start=start, geometry=stage.geometry, match_distance=stage.match_distance
    )
    targets = np.stack([pathfinder.curve_targets(truth) for truth in truths]) if dense else None
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(labels),
        None if targets is None else torch.from_numpy(targets).long(),
    )


Draw = tuple[Stage, int, int, int, bool]


def stream(
    config: TrainConfig, start_step: int = 0, rank: int = 0, world: int = 1, workers: int = 0
) -> Generator[list[Batch], None, None]:
    """The batches of each optimizer step from ``start_step`` on, ``accumulate`` of them at a time, without end.

    Args:
        config: stages, batch size, seed.
        start_step: the first step.
        rank: number of this process.
        world: how many processes share the images of a step.
        workers: processes that draw ahead; 0 draws when asked. The images are the same.
    """
    draws = _draws(config, start_step, rank, world)
    batches = _drawn_ahead(draws, workers) if workers else (draw(*each) for each in draws)
    try:
        while True:
            yield [next(batches) for _ in range(config.accumulate)]
    finally:
        batches.close()


def _draws(config: TrainConfig, start_step: int, rank: int, world: int) -> Iterator[Draw]:
    """Arguments of `draw`, in the order of training."""
    part = start_step * config.accumulate
    while True:
        start = (part * world + rank) * config.batch
        if start + config.batch > TEST_INDEX:
            raise ValueError(f"step {part // config.accumulate} would train on the images kept for tests")
        yield config.stage(part // config.accumulate), config.seed, start, config.batch, config.dense_weight > 0
        part += 1


def _drawn_ahead(draws: Iterator[Draw], workers: int) -> Generator[Batch, None, None]:
    # Fresh processes: forking one that has started threads can deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_prepare_worker)
    try:
        waiting = deque(pool.submit(draw, *next(draws)) for _ in range(2 * workers))
        while True:
            batch = waiting.popleft().result()
            waiting.append(pool.submit(draw, *next(draws)))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    # Ctrl-C goes to the whole process group; the trainer decides what it means.
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
