"""Training examples, straight from a generator or from files.

(seed, stage, index) determines an example, and the number of a global batch its indices. So the batches of a run depend
neither on the number of workers nor on when it was stopped and resumed.
"""

from collections import deque
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sparseflash.pathfinder import splits
from sparseflash.pathfinder.workers import Workers
from sparseflash.patterns.renamed import renamed
from sparseflash.train.batch import SYMMETRIES, Batch
from sparseflash.train.config import TrainConfig
from sparseflash.train.stage import AnyStage


def draw(
    stage: AnyStage,
    seed: int,
    indices: NDArray[np.int64] | range,
    dense: bool = False,
    symmetries: NDArray[np.int64] | None = None,
) -> Batch:
    """Examples of a stage.

    Args:
        stage: the distribution, or the files.
        seed: seed of drawn examples; ignored for files.
        indices: indices of the examples.
        dense: also return the ground truth for a dense loss, which files do not have.
        symmetries: symmetry of each image, 0 to 7: bit 0 mirrors y, bit 1 mirrors x, bit 2 transposes.

    Example:
        >>> from sparseflash.pathfinder import Geometry
        >>> from sparseflash.train import Stage
        >>> draw(Stage(Geometry.lra(32)), seed=0, indices=range(7, 9), dense=True).targets.shape
        torch.Size([2, 32, 32])
    """
    return stage.batch(seed, indices, dense, symmetries)


Draw = tuple[AnyStage, int, NDArray[np.int64], bool, NDArray[np.int64] | None]


class DataShard:
    """One process's share of the training data: `take` a batch for each of its micro-steps, in order.

    A global batch has one batch, a *shard*, for each process that the run was started with. If the run continues with
    more or fewer processes, shards are distributed round-robin, so all processes together see the same examples.

    Args:
        config: stages, batch size, data, seed.
        rank: number of this process.
        world: number of processes that share the images of a step.
        workers: processes that draw ahead; 0 draws on demand. The images are the same.
        shards: number of shards of a global batch; default one per process.

    Raises:
        WorkerError: (from `take`) workers die repeatedly; a single one that dies is replaced.
    """

    @renamed(streams="shards")
    def __init__(
        self, config: TrainConfig, rank: int = 0, world: int = 1, workers: int = 0, shards: int | None = None
    ) -> None:
        self._config, self._rank, self._world, self._workers = config, rank, world, workers
        self._shards = world if shards is None else shards
        self._ahead: deque[tuple[int, int]] = deque()  # micro-step, and the stage it is drawn for
        self._pool: Workers[Draw, Batch] | None = Workers(_draw, workers) if workers else None

    def take(self, micro_step: int, stage: int) -> Batch:
        """The batch of a micro-step of a run in this stage. Drops batches that were drawn ahead for another stage."""
        if self._pool is None:
            return draw(*self._planned(micro_step, stage))
        if self._ahead and self._ahead[0] != (micro_step, stage):
            self._pool.drop()
            self._ahead.clear()
        following = self._ahead[-1][0] + 1 if self._ahead else micro_step
        for number in range(following, micro_step + 2 * self._workers + 1):
            self._pool.submit(self._planned(number, stage))
            self._ahead.append((number, stage))
        batch = self._pool.take()
        self._ahead.popleft()
        return batch

    def global_batch(self, micro_step: int) -> int:
        """The number of the global batch that the batch of a micro-step belongs to."""
        return self._number(micro_step) // self._shards

    def _number(self, micro_step: int) -> int:
        return micro_step * self._world + self._rank

    def _planned(self, micro_step: int, stage: int) -> Draw:
        global_batch, shard = divmod(self._number(micro_step), self._shards)
        return planned(self._config, global_batch, stage, shard, self._shards)

    def close(self) -> None:
        """End the workers."""
        if self._pool is not None:
            self._pool.close()


def _draw(wanted: Draw) -> Batch:
    return draw(*wanted)


def planned(config: TrainConfig, global_batch: int, stage: int, shard: int = 0, shards: int = 1) -> Draw:
    """The arguments of `draw` for one batch of a global batch."""
    first = (global_batch * shards + shard) * config.batch
    order = np.arange(first, first + config.batch)
    source = config.stages[config.drawn_from(global_batch, stage)]
    # Training examples come first, so that a place among them is an index.
    count = len(source.splits["train"])
    if config.data == "fixed":
        indices, seed = _of_rounds(_shuffled, config.seed, order, count), splits.SEED
    else:
        indices, seed = splits.FRESH + order, config.seed
        if indices[-1] >= splits.END:
            raise ValueError(f"batch {global_batch} would need images past index 2**32; use another seed")
    symmetries = _of_rounds(_symmetries, config.seed, order, count) if config.augment else None
    return source, seed, indices, config.dense_weight > 0, symmetries


def _of_rounds(
    numbers: Callable[[int, int, int], NDArray[np.int64]], seed: int, order: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """Entries at given places of an endless list, which is made in rounds of ``count`` numbers."""
    rounds = range(order[0] // count, order[-1] // count + 1)
    return np.concatenate([numbers(seed, number, count)[order[order // count == number] % count] for number in rounds])


@lru_cache(maxsize=2)
def _shuffled(seed: int, number: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 0, number)).permutation(count)


@lru_cache(maxsize=2)
def _symmetries(seed: int, number: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng((seed, 1, number)).integers(SYMMETRIES, size=count)
