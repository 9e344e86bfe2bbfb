"""The training loop, top to bottom."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseflash.models import Model, PixelTransformer, build
from sparseflash.models.files import check_weights
from sparseflash.pathfinder.workers import WorkerError
from sparseflash.patterns.atomic_write import check_no_links
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.beginning import begin_with
from sparseflash.train.checkpoint import checkpoints, latest_checkpoint, resolve, restore, save_checkpoint
from sparseflash.train.config import AnyStage, Stage, TrainConfig
from sparseflash.train.curriculum import Progress, begun, current, drawn_from, last_stage_since
from sparseflash.train.data import Stream
from sparseflash.train.interrupt import Interrupt
from sparseflash.train.logs import STEPS, Reporter
from sparseflash.train.losses import loss_of
from sparseflash.train.pictures import attention, mistakes
from sparseflash.train.processes import Processes
from sparseflash.train.sequences import SequenceStage
from sparseflash.train.validation import BEST, Validation, best_checkpoint, check_validation, keep_best
from sparseflash.utils.folder_lock import folder_lock

# What a run writes into its folder.
OWN_PATHS = ("checkpoints", BEST, "pictures", "tensorboard", STEPS)


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: the trained model, on its device: the moving average of the weights where the recipe keeps one.
        step: optimizer steps done in all.
        losses: loss of each step done by this call.
        checkpoint: the last one; None if not even one step was completed.
        interrupted: Ctrl-C or SIGTERM ended the run early.
        progress: where the run stands in its curriculum.
        out_of_time: the time budget ended the run early.
        out_of_patience: evaluations without a better one ended the run early.
        best: the checkpoint that did best on validation examples; None where there were no evaluations.
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
    """Train a model, or go on training it.

    On a CPU, a run that was stopped and resumed any number of times has, bit for bit, the losses and weights of an
    uninterrupted one. A process that is killed loses at most the last ``save_every`` steps, which a resume repeats; a
    damaged checkpoint is passed over, with a warning. Under torchrun every process trains on its share of each step's
    images, or of their tokens; another number of processes that goes on from a checkpoint takes the same steps, to
    within rounding. With ``config.eval_every`` the checkpoint that did best on validation examples is kept in
    ``best/``, which is read like a run folder; `keep` does not count it.

    Args:
        config: the recipe.
        out: run folder: ``checkpoints/``, ``best/``, ``tensorboard/``, ``pictures/`` and ``steps.jsonl`` go there.
        steps: optimizer steps in all, those before a resume included; default: until the last stage has had
            ``config.schedule_steps``.
        minutes: stop after so much time, with a checkpoint; None for no limit.
        resume: go on from the latest checkpoint in ``out`` that is whole; ``"auto"``: if there is one, else begin.
        device: where to train.
        context_parallel: ranks that share the tokens of each image; those that do not draw other images.
        workers: processes that draw images ahead; 0 draws them in this one.
        save_every: steps between checkpoints; one more is written at the end.
        keep: how many checkpoints stay.
        pictures: draw mistakes and attention at the end of each stage and of the run.
        line: takes a line of progress at a time, instead of the terminal.

    Raises:
        ValueError: another process trains into ``out``, or a folder in it is a link; ``out`` holds a run already and
            ``resume`` is off, all its checkpoints are damaged or the latest
            was made with another config or from other files, steps, minutes, save_every or keep are too small, or the
            processes cannot share images or tokens so, see `Processes`.
        FileNotFoundError: ``resume`` is on and there is nothing to resume.
        FloatingPointError: the loss or the gradient is not finite; earlier checkpoints stay.
        OSError: the disk is full or may not be written to; earlier checkpoints stay.
        WorkerError: workers died again and again; the completed steps are saved.

    Example:
        >>> import tempfile
        >>> from sparseflash.train import recipe, train
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = train(recipe("demo", batch=2), out, steps=2, line=lambda text: None)
        >>> result.step, len(result.losses)
        (2, 2)
    """
    started = time.monotonic()
    for name, value in (("steps", steps), ("save_every", save_every), ("keep", keep)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
    if minutes is not None and not (math.isfinite(minutes) and minutes > 0):
        raise ValueError(f"minutes must be a positive number; got {minutes!r}")
    run = Path(out)
    if run.exists() and not run.is_dir():
        raise ValueError(f"out must be a folder, but {str(out)!r} is a file")
    for name in OWN_PATHS:
        check_no_links(run / name, run)
    if resume == "auto":
        resume = bool(checkpoints(run))
    _check_free(run, resume)

    # Files that are not there, or not the same any more, show before anything is written.
    config = replace(config, stages=tuple(stage.noted() for stage in config.stages))
    if config.eval_every:
        check_validation(config, "eval_every")
    if pictures:
        if any(isinstance(stage, SequenceStage) for stage in config.stages):
            raise ValueError("pictures are drawn of Pathfinder images; sequences have none")
        check_validation(config, "pictures")

    processes = Processes.here(context_parallel)
    with ExitStack() as stack:
        # First of all: where Python swallows the exception that a signal raises, it has still been noted.
        interrupt = stack.enter_context(Interrupt(at_once=processes.world == 1))
        if processes.first and (there := run.is_dir()):
            stack.enter_context(folder_lock(run))
            _check_free(run, resume)  # another process may have trained until just now
        checkpoint = None
        if resume:
            with interrupt.shield():  # a load cut short would look like damage
                checkpoint = latest_checkpoint(run)
            if different := config.differences(checkpoint.config):
                raise ValueError(f"{checkpoint.path} was made with another {', '.join(different)}; resume with its own")
            check_weights(lambda: build(config.model), checkpoint.weights, checkpoint.path)
        streams = (checkpoint and checkpoint.streams) or processes.groups
        processes.check(config, streams)
        device, mesh, joined = processes.join(torch.device(device))
        torch.manual_seed(config.seed)
        model = build(config.model)
        if config.init and not resume:
            begin_with(model, resolve(Path(config.init)))
        model.activation_checkpointing = config.activation_checkpointing
        model.to(device).train()
        gates = [parameter for name, parameter in model.named_parameters() if ".key_gate." in name]
        optimizer = _optimizer(model, config)
        # The first update copies the weights.
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        averaged = None if average is None else average.module
        step, progress, saved = 0, begun(config, config.first_stage), None
        if checkpoint is not None:
            restore(checkpoint, model, optimizer, averaged)
            step, progress, saved = checkpoint.step, checkpoint.progress, checkpoint.path
            if average is not None:
                average.n_averaged.fill_(step)
        trained: nn.Module = DistributedDataParallel(model) if processes.world > 1 else model
        losses: list[float] = []
        out_of_time = False
        # A step's parts have a batch for each stream; each group of processes takes so many of these batches.
        batches = config.accumulate * streams
        turns = batches // processes.groups

        shown = model if averaged is None else averaged
        assert isinstance(shown, Model)

        def save() -> Path:
            return save_checkpoint(run, step, progress, config, model, optimizer, averaged, keep, streams)

        def show(stage: AnyStage) -> None:
            if pictures and processes.first:
                assert isinstance(shown, PixelTransformer)
                assert not isinstance(stage, SequenceStage)
                reporter.figure("mistakes", mistakes(shown, stage), step)
                if isinstance(stage, Stage):  # where the discs are is not in files
                    reporter.figure("attention", attention(shown, stage), step)

        if processes.first and not there:  # all that could be refused has been
            run.mkdir(parents=True, exist_ok=True)
            stack.enter_context(folder_lock(run))
            _check_free(run, resume)
        images = config.batch * batches
        reporter = stack.enter_context(
            Reporter(run, step, images, quiet=not processes.first, line=line, evaluated=progress.evaluated)
        )
        validation = Validation(config, processes, device, workers)
        stream = Stream(config, processes.group, processes.groups, workers, streams)
        stack.callback(stream.close)
        try:
            _enter(reporter, config, progress, step, steps)
            save_due = False
            while True:
                if progress.evaluation_due(config, step):
                    # A signal may come meanwhile: the step is done, and a resume evaluates again.
                    score = validation.score(shown, current(config, progress))
                    with interrupt.shield():
                        progress = progress.validated(score.accuracy, step)
                        reporter.evaluated(step, score, progress)
                        better = progress.best_step == step
                        if processes.first and (save_due or better or progress.exhausted(config)):
                            saved = save()
                            if better:
                                keep_best(run, saved)
                stop_at = _last_step(config, progress, steps)
                if progress.exhausted(config) or (stop_at is not None and step >= stop_at):
                    break
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate(step, last_stage_since(config, progress))
                optimizer.zero_grad(set_to_none=True)
                figures: list[Tensor] = []
                for turn in range(step * turns, (step + 1) * turns):
                    stage = config.stages[drawn_from(config, stream.part(turn), progress.stage)]
                    batch = stream.take(turn, progress.stage).to(device)
                    # Processes exchange gradients once a step, with the last batch.
                    alone = processes.world > 1 and (turn + 1) % turns
                    with trained.no_sync() if alone else nullcontext():  # type: ignore[operator]
                        loss, of_batch = loss_of(trained, batch, config, stage, mesh)
                        (loss / turns).backward()
                    figures.append(of_batch)
                # Before clipping, as the norm of all.
                gate_norm = nn.utils.get_total_norm([gate.grad for gate in gates if gate.grad is not None])
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                each = processes.gathered(torch.stack(figures)).unflatten(0, (-1, streams)).mean(1)
                mean = each.mean(0)
                loss_value, *accuracies = mean.tolist()
                if not (torch.isfinite(mean).all() and torch.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {step}: the loss is {loss_value} and the norm of the gradient {norm.item()}; "
                        f"a lower learning rate may help"
                    )

                # From here to the end of the step, weights, optimizer, step number and logs change together.
                with interrupt.shield():
                    optimizer.step()
                    if average is not None:
                        average.update_parameters(model)
                    lr = optimizer.param_groups[0]["lr"]
                    progress = _counted(config, progress, step, each[:, 1].tolist(), config.batch * streams)
                    step += 1
                    losses.append(loss_value)
                    logged = {"loss": loss_value, **dict(zip(("accuracy", "dense_accuracy"), accuracies, strict=False))}
                    logged |= {"stage": progress.stage + 1, "running_accuracy": progress.accuracy}
                    logged |= {"lr": lr, "gradient_norm": norm.item()}
                    if gates:
                        logged["key_gate_gradient_norm"] = gate_norm.item()
                    reporter.step(step, logged)
                    out_of_time = minutes is not None and time.monotonic() - started > 60 * minutes
                    stop = processes.any(interrupt.asked or out_of_time, device)
                    following = progress.promoted(config, step)
                    promoted, progress = following != progress, following
                    last = step == _last_step(config, progress, steps)
                    save_due = step % save_every == 0 or promoted or last
                    # An evaluation that is due belongs into the checkpoint.
                    if processes.first and (stop or (save_due and not progress.evaluation_due(config, step))):
                        saved = save()
                    if promoted:
                        show(config.stages[progress.stage - 1])
                        _enter(reporter, config, progress, step, steps)
                if stop:
                    break
            if not interrupt.asked:
                show(current(config, progress))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or interrupt.raised:
                # Raised between updates only: the step under way is dropped, the completed ones are saved.
                interrupt.hold()
                if losses:
                    saved = save()
            else:
                if isinstance(error, WorkerError) and losses and processes.first:
                    save()
                raise
    # DDP first: were its reducer the last to hold the group, Python's lock would be held while the group waits for its
    # threads, and one of these may want that lock to free a tensor.
    del trained
    if joined:
        distributed.destroy_process_group()
    exhausted, best = progress.exhausted(config), best_checkpoint(run)
    return TrainResult(shown, step, losses, saved, interrupt.asked, progress, out_of_time, exhausted, best)


def _check_free(run: Path, resume: bool) -> None:
    if not resume and (checkpoints(run) or best_checkpoint(run)):
        raise ValueError(f"{run} already holds a run: resume it, or train into another folder")


def _last_step(config: TrainConfig, progress: Progress, steps: int | None) -> int | None:
    """The step at which training ends, as far as it is known."""
    if steps is not None:
        return steps
    since = last_stage_since(config, progress)
    return None if since is None else since + config.schedule_steps


def _counted(config: TrainConfig, progress: Progress, step: int, accuracies: list[float], images: int) -> Progress:
    """The progress after the parts of a step; reviews of the stage before do not count."""
    for number, accuracy in enumerate(accuracies, start=step * config.accumulate):
        if drawn_from(config, number, progress.stage) == progress.stage:
            progress = progress.after(accuracy, images)
    return progress


def _enter(reporter: Reporter, config: TrainConfig, progress: Progress, step: int, steps: int | None) -> None:
    stage = current(config, progress)
    number = f"stage {progress.stage + 1} of {len(config.stages)}: " if len(config.stages) > 1 else ""
    reporter.stage(
        step, f"{number}{stage}", stage.rule, lambda: stage_baseline(stage), _last_step(config, progress, steps)
    )


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.startswith("embedding") and ".key_gate." not in name

    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
    )
