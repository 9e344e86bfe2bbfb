"""The training loop, top to bottom."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from sparseflash.models import Model, build
from sparseflash.models.files import check_weights
from sparseflash.pathfinder.workers import WorkerError
from sparseflash.patterns.atomic_write import check_no_links
from sparseflash.train.checkpoint import Checkpoint, checkpoints, latest_checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.curriculum import Progress
from sparseflash.train.interrupt import Interrupt
from sparseflash.train.logs import STEPS
from sparseflash.train.process_groups import Processes
from sparseflash.train.run import Limits, Run
from sparseflash.train.validation import BEST, best_checkpoint, check_validation
from sparseflash.utils.folder_lock import folder_lock

# The paths that a run writes in its folder.
OWN_PATHS = ("checkpoints", BEST, "pictures", "tensorboard", STEPS)


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: the trained model on its device, with averaged weights if the recipe keeps a moving average.
        step: total number of optimizer steps.
        losses: loss of each step of this call.
        checkpoint: the last checkpoint; None if no step was completed.
        interrupted: Ctrl-C or SIGTERM ended the run early.
        progress: the position in the curriculum.
        out_of_time: the time budget ended the run early.
        out_of_patience: too many evaluations without improvement ended the run early.
        best: the checkpoint with the best validation accuracy; None without evaluations.
    """

    model: Model = field(repr=False)
    step: int
    losses: list[float] = field(repr=False)
    checkpoint: Path | None
    interrupted: bool
    progress: Progress
    out_of_time: bool
    out_of_patience: bool = False
    best: Path | None = None


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    resume: bool | Literal["auto"] = False,
    device: str | torch.device = "cpu",
    context_parallel: int = 1,
    workers: int = 0,
    save_every: int = 500,
    keep: int = 3,
    pictures: bool = False,
    line: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a model, or resume training.

    On a CPU, a run that was stopped and resumed any number of times has, bit for bit, the losses and weights of an
    uninterrupted run. A process that is killed loses at most the last ``save_every`` steps, which a resume repeats. A
    damaged checkpoint is skipped with a warning. Under torchrun every process trains on its share of each step's
    images, or of their tokens. Any number of processes can resume from a checkpoint and takes the same steps, up to
    rounding. With ``config.eval_every`` the checkpoint with the best validation accuracy is kept in ``best/``, which
    can be read like a run folder; `keep` does not count it.

    Args:
        config: the recipe.
        out: run folder, for ``checkpoints/``, ``best/``, ``tensorboard/``, ``pictures/`` and ``steps.jsonl``.
        steps: total number of optimizer steps, including those before a resume; default: until the last stage has had
            ``config.schedule_steps``.
        minutes: save and stop after this time; None for no limit.
        resume: resume from the latest undamaged checkpoint in ``out``; ``"auto"``: start if there is none.
        device: where to train.
        context_parallel: number of ranks that share the tokens of each image; other ranks draw other images.
        workers: processes that draw images ahead; 0 draws them in this process.
        save_every: steps between checkpoints; one more is written at the end.
        keep: number of checkpoints to keep.
        pictures: draw mistakes and attention at the end of each stage and of the run.
        line: called with each line of progress, in place of printing it.

    Raises:
        ValueError: another process trains into ``out``, or a folder in it is a link; ``out`` already holds a run and
            ``resume`` is off; all its checkpoints are damaged, or the latest was made with another config or from other
            files; steps, minutes, save_every or keep are too small; or the processes cannot share images or tokens like
            this, see `Processes`.
        FileNotFoundError: ``resume`` is on and there is nothing to resume.
        FloatingPointError: the loss or the gradient is not finite; earlier checkpoints stay.
        OSError: the disk is full or not writable; earlier checkpoints stay.
        WorkerError: workers died repeatedly; the completed steps are saved.

    Example:
        >>> import tempfile
        >>> from sparseflash.train import recipe, train
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = train(recipe("demo", batch=2), out, steps=2, line=lambda text: None)
        >>> result.step, len(result.losses)
        (2, 2)
    """
    limits = Limits(steps, minutes, save_every, keep)
    folder = Path(out)
    resume = _checked_folder(folder, resume)
    config = _noted(config, pictures)
    processes = Processes.here(context_parallel)
    with ExitStack() as stack:
        # First of all: a signal is noted even if Python swallows the exception that it raises.
        interrupt = stack.enter_context(Interrupt(at_once=processes.world == 1))
        if processes.first and (there := folder.is_dir()):
            _lock(stack, folder, resume)
        checkpoint = _latest(folder, config, interrupt) if resume else None
        run = Run(config, folder, processes, torch.device(device), limits, interrupt, pictures)
        if checkpoint is None:
            run.start()
        else:
            run.resume(checkpoint)
        if processes.first and not there:  # every check has passed
            folder.mkdir(parents=True, exist_ok=True)
            _lock(stack, folder, resume)
        run.open(stack, workers, line)
        try:
            run.enter_stage()
            while True:
                if run.evaluation_due:
                    run.validate()
                if run.finished or run.take_step():
                    break
            if not interrupt.asked:
                run.draw_figures(run.stage)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or interrupt.raised:
                # Raised between updates only: the current step is dropped, completed steps are saved.
                interrupt.hold()
                if run.losses:
                    run.save()
            else:
                if isinstance(error, WorkerError) and run.losses and processes.first:
                    run.save()
                raise
    run.leave()
    return TrainResult(
        run.ema_or_model, run.step, run.losses, run.saved, interrupt.asked, run.progress, run.out_of_time,
        run.progress.exhausted(config), best_checkpoint(folder),
    )  # fmt: skip


def _checked_folder(folder: Path, resume: bool | Literal["auto"]) -> bool:
    """Raise ValueError for a folder that cannot hold the run; return whether to resume one in it."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out must be a folder, but {str(folder)!r} is a file")
    for name in OWN_PATHS:
        check_no_links(folder / name, folder)
    if resume == "auto":
        resume = bool(checkpoints(folder))
    _check_free(folder, resume)
    return resume


def _noted(config: TrainConfig, pictures: bool) -> TrainConfig:
    """The recipe with its files noted. Missing or changed files raise before anything is written."""
    config = replace(config, stages=tuple(stage.noted() for stage in config.stages))
    if config.eval_every:
        check_validation(config, "eval_every")
    if pictures:
        if not all(stage.figures for stage in config.stages):
            raise ValueError("pictures are drawn of Pathfinder images; sequences have none")
        check_validation(config, "pictures")
    return config


def _lock(stack: ExitStack, folder: Path, resume: bool) -> None:
    stack.enter_context(folder_lock(folder))
    _check_free(folder, resume)  # another process may have trained in the meantime


def _check_free(folder: Path, resume: bool) -> None:
    if not resume and (checkpoints(folder) or best_checkpoint(folder)):
        raise ValueError(f"{folder} already holds a run: resume it, or train into another folder")


def _latest(folder: Path, config: TrainConfig, interrupt: Interrupt) -> Checkpoint:
    """The latest checkpoint of a folder, of this recipe."""
    with interrupt.shield():  # an interrupted load would look like damage
        checkpoint = latest_checkpoint(folder)
    if different := config.differences(checkpoint.config):
        raise ValueError(f"{checkpoint.path} was made with another {', '.join(different)}; resume with its own")
    check_weights(lambda: build(config.model), checkpoint.weights, checkpoint.path)
    return checkpoint
