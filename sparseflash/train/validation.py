"""Evaluation on validation examples during training, and the best checkpoint.

A run folder keeps the best checkpoint in ``best/``, which has the layout of a run folder with one checkpoint, so it can
be used like a run. Evaluating draws no random number of the training, so it changes nothing in a run.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparseflash.models import Model
from sparseflash.pathfinder.splits import SEED
from sparseflash.pathfinder.workers import run_tasks
from sparseflash.patterns.atomic_write import make_folder, new_folder_beside, remove_tree
from sparseflash.train.checkpoint import checkpoints, flush_to_disk, is_whole, remove, remove_nameless
from sparseflash.train.config import TrainConfig
from sparseflash.train.data import draw
from sparseflash.train.evaluate import Score, evaluate
from sparseflash.train.process_groups import Processes
from sparseflash.train.stage import AnyStage

BEST = "best"


class Validation:
    """Scores models on the first validation examples of a stage, which stay in memory between evaluations.

    Batches are distributed round-robin over the processes; each process reads whole images.

    Args:
        config: the recipe, for the number of examples and the batch size.
        processes: the processes that train together.
        device: device of the models.
        workers: processes that draw the examples.
    """

    def __init__(self, config: TrainConfig, processes: Processes, device: torch.device, workers: int = 0) -> None:
        self._config, self._processes, self._device, self._workers = config, processes, device, workers
        self._stage: AnyStage | None = None
        self._batches: list[tuple[Tensor, Tensor]] = []

    def score(self, model: Model, stage: AnyStage) -> Score:
        """Number of right answers of a model over all processes. A collective: every process calls it."""
        if stage != self._stage:
            self._batches = self._drawn(stage)
            self._stage = stage
        right = count = 0
        if self._batches:
            here = evaluate(model, self._batches, self._device, tokens=stage.tokens)
            right, count = here.right, here.count
        return Score(self._processes.total(right, self._device), self._processes.total(count, self._device))

    def _drawn(self, stage: AnyStage) -> list[tuple[Tensor, Tensor]]:
        indices, size = stage.splits["val"][: self._config.eval_examples], self._config.batch
        parts = [indices[start : start + size] for start in range(0, len(indices), size)]
        mine = parts[self._processes.rank :: self._processes.world]
        drawn = run_tasks(partial(draw, stage, SEED), mine, max(1, self._workers))
        return [(batch.inputs, batch.labels) for batch in drawn]


def check_validation(config: TrainConfig, wanted: str) -> None:
    """Raise ValueError if ``wanted`` needs validation examples and a stage has none."""
    for stage in config.stages:
        if not stage.splits.get("val"):
            raise ValueError(f"there are no validation examples of {stage}: leave {wanted} out")


def keep_best(run: Path, checkpoint: Path) -> Path:
    """Copy a checkpoint atomically into the run's ``best`` folder, then remove the previous one.

    Returns:
        Its folder there.
    """
    folder = run / BEST
    final = folder / "checkpoints" / checkpoint.name
    if not is_whole(final):
        remove(final)
        temporary = new_folder_beside(make_folder(final.parent, run) / final.name)
        try:
            shutil.copytree(checkpoint, temporary, copy_function=_link, dirs_exist_ok=True)
            flush_to_disk(temporary)
            os.replace(temporary, final)
            flush_to_disk(final.parent)
        finally:
            remove_tree(temporary)
    for path in checkpoints(folder):
        if path != final:
            remove(path)
    remove_nameless(final.parent)
    return final


def best_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run, if one has been kept."""
    found = checkpoints(run / BEST)
    return found[-1] if found else None


def _link(source: str, target: str) -> None:
    """A hard link to a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        flush_to_disk(Path(target))
