"""A run: a model in training, with all state that a step changes."""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparseflash.models import Model, build
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.checkpoint import Checkpoint, resolve, restore, save_checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.curriculum import Progress
from sparseflash.train.data import DataShard
from sparseflash.train.figures import FIGURES
from sparseflash.train.interrupt import Interrupt
from sparseflash.train.logs import Reporter
from sparseflash.train.losses import loss_of
from sparseflash.train.process_groups import Processes
from sparseflash.train.stage import AnyStage
from sparseflash.train.validation import Validation, keep_best
from sparseflash.train.warm_start import load_initial_weights


@dataclass(frozen=True)
class Limits:
    """The limits of a call of `train`: when it stops and saves.

    Attributes:
        steps, minutes, save_every, keep: arguments of `train`.
        started: `time.monotonic` when the call began, from which minutes are counted.

    Raises:
        ValueError: a number out of range.
    """

    steps: int | None = None
    minutes: float | None = None
    save_every: int = 500
    keep: int = 3
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value!r}")
        if self.minutes is not None and not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ValueError(f"minutes must be a positive number; got {self.minutes!r}")

    @property
    def out_of_time(self) -> bool:
        """Whether the time budget is used up."""
        return self.minutes is not None and time.monotonic() - self.started > 60 * self.minutes


class Passes(NamedTuple):
    """Figures of the forward and backward passes of a step.

    Attributes:
        each: loss, accuracy and, with a dense loss, dense accuracy of each of the step's P global batches, over all
            processes: [P, 2] or [P, 3].
        norm: norm of the gradient, before clipping.
        gate_norm: norm of the key gates' gradient, before clipping.
    """

    each: Tensor
    norm: Tensor
    gate_norm: Tensor


@dataclass(eq=False)
class Run:
    """A model in training. `start` or `resume` makes the model, `open` its data and its log.

    Attributes:
        config: the recipe.
        folder: the run folder.
        processes: the processes that train together.
        device: device of this process.
        limits: when this call stops and saves.
        interrupt: signals wait for the end of its shields.
        pictures: draw figures at the end of each stage.
        shards: batches of a global batch, one for each group of processes that the run was started with.
        model: the trained model.
        trained: the model, wrapped if there are several processes.
        optimizer: its optimizer, with moments.
        average: the moving average of the weights, if the recipe keeps one.
        progress: the position in the curriculum.
        step: total number of optimizer steps.
        saved: the last checkpoint.
        losses: losses of the steps of this call.
        out_of_time: whether the time budget ended the run.
    """

    config: TrainConfig
    folder: Path
    processes: Processes
    device: torch.device
    limits: Limits
    interrupt: Interrupt
    pictures: bool = False
    shards: int = field(init=False)
    model: Model = field(init=False)
    trained: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    average: AveragedModel | None = field(init=False)
    progress: Progress = field(init=False)
    reporter: Reporter = field(init=False)
    validation: Validation = field(init=False)
    data: DataShard = field(init=False)
    step: int = field(init=False, default=0)
    saved: Path | None = field(init=False, default=None)
    losses: list[float] = field(init=False, default_factory=list)
    out_of_time: bool = field(init=False, default=False)
    _save_due: bool = field(init=False, default=False)

    def start(self) -> None:
        """Start with random weights, or with those that the recipe names.

        Raises:
            ValueError: these processes cannot share images or tokens like this, or weights of another shape.
            FileNotFoundError: no weights where the recipe says.
        """
        self._make(self.processes.groups, self.config.init)
        self._wrap()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Resume from a checkpoint.

        Raises:
            ValueError: these processes cannot share images or tokens like this, or tensors do not match the model.
        """
        self._make(checkpoint.shards or self.processes.groups)
        restore(checkpoint, self.model, self.optimizer, self._averaged)
        self.step, self.progress, self.saved = checkpoint.step, checkpoint.progress, checkpoint.path
        if self.average is not None:
            self.average.n_averaged.fill_(self.step)
        self._wrap()

    def _make(self, shards: int, init: str = "") -> None:
        config, self.shards = self.config, shards
        self.processes.check(config, shards)
        self.device, self._mesh, self._joined = self.processes.join(self.device)
        torch.manual_seed(config.seed)
        self.model = build(config.model)
        if init:
            load_initial_weights(self.model, resolve(Path(init)))
        self.model.activation_checkpointing = config.activation_checkpointing
        self.model.to(self.device).train()
        self._gates = [weight for name, weight in self.model.named_parameters() if ".key_gate." in name]
        self.optimizer = adamw(self.model, config)
        # The first update copies the weights.
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
        self.progress = Progress.begun(config, config.first_stage)

    def _wrap(self) -> None:
        # Last: DDP sends the weights to all processes.
        self.trained = DistributedDataParallel(self.model) if self.processes.world > 1 else self.model

    def open(self, stack: ExitStack, workers: int, line: Callable[[str], None] | None) -> None:
        """Open the log and start drawing examples, until the stack is closed."""
        config, processes = self.config, self.processes
        examples, quiet = config.batch * config.accumulate * self.shards, not processes.first
        evaluated = self.progress.evaluated
        self.reporter = stack.enter_context(
            Reporter(self.folder, self.step, examples, quiet=quiet, line=line, evaluated=evaluated)
        )
        self.validation = Validation(config, processes, self.device, workers)
        self.data = DataShard(config, processes.group, processes.groups, workers, self.shards)
        stack.callback(self.data.close)

    def leave(self) -> None:
        """Leave the process group, if this run started it."""
        # DDP first. If its reducer held the last reference to the group, the group would wait for its threads under
        # Python's lock, and one of these threads may need that lock to free a tensor.
        del self.trained
        if self._joined:
            distributed.destroy_process_group()

    @property
    def ema_or_model(self) -> Model:
        """The resulting model: the moving average of the weights if the recipe keeps one."""
        return self.model if self.average is None else cast(Model, self.average.module)

    @property
    def stage(self) -> AnyStage:
        """The current stage."""
        return self.progress.current(self.config)

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation is due and has not been done."""
        return self.progress.evaluation_due(self.config, self.step)

    @property
    def finished(self) -> bool:
        """Whether patience has run out, or all steps are done."""
        last = self.progress.last_step(self.config, self.limits.steps)
        return self.progress.exhausted(self.config) or (last is not None and self.step >= last)

    def enter_stage(self) -> None:
        """Report that a stage begins."""
        stage, count = self.stage, len(self.config.stages)
        number = f"stage {self.progress.stage + 1} of {count}: " if count > 1 else ""
        until = self.progress.last_step(self.config, self.limits.steps)
        self.reporter.stage(self.step, f"{number}{stage}", stage.rule, lambda: stage_baseline(stage), until)

    def draw_figures(self, stage: AnyStage) -> None:
        """Draw the figures of a stage, if pictures are on."""
        if self.pictures and self.processes.first:
            for name in stage.figures:
                self.reporter.figure(name, FIGURES[name](self.ema_or_model, stage), self.step)

    def save(self) -> Path:
        """Write a checkpoint and remove old ones."""
        self.saved = save_checkpoint(
            self.folder, self.step, self.progress, self.config, self.model, self.optimizer, self._averaged,
            self.limits.keep, self.shards,
        )  # fmt: skip
        return self.saved

    def validate(self) -> None:
        """Evaluate the model, and keep the best checkpoint."""
        # A signal may interrupt this: the step is done, and a resume evaluates again.
        score = self.validation.score(self.ema_or_model, self.stage)
        with self.interrupt.shield():
            self.progress = self.progress.validated(score.accuracy, self.step)
            self.reporter.evaluated(self.step, score, self.progress)
            better = self.progress.best_step == self.step
            if self.processes.first and (self._save_due or better or self.progress.exhausted(self.config)):
                saved = self.save()
                if better:
                    keep_best(self.folder, saved)

    def take_step(self) -> bool:
        """Train for a step, and save if that is due.

        Returns:
            Whether to stop: a signal has come, or the time is up.

        Raises:
            FloatingPointError: the loss or the gradient is not finite; nothing has changed then.
        """
        passes = self._passes()
        # From here to the end of the step, weights, optimizer, step number and logs change together.
        with self.interrupt.shield():
            self._update(passes)
            self.out_of_time = self.limits.out_of_time
            stop = self.processes.any(self.interrupt.asked or self.out_of_time, self.device)
            following = self.progress.promoted(self.config, self.step)
            promoted, self.progress = following != self.progress, following
            last = self.step == self.progress.last_step(self.config, self.limits.steps)
            self._save_due = self.step % self.limits.save_every == 0 or promoted or last
            # If an evaluation is due, save after it, so that the checkpoint includes it.
            if self.processes.first and (stop or (self._save_due and not self.evaluation_due)):
                self.save()
            if promoted:
                self.draw_figures(self.config.stages[self.progress.stage - 1])
                self.enter_stage()
        return stop

    def _passes(self) -> Passes:
        """Forward and backward passes of a step, with clipped gradients; weights do not change."""
        config, processes = self.config, self.processes
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step, self.progress.last_stage_since(config))
        self.optimizer.zero_grad(set_to_none=True)
        # The global batches of a step have a batch per shard; each group of processes takes this many of them.
        micro_steps = config.accumulate * self.shards // processes.groups
        figures: list[Tensor] = []
        for micro_step in range(self.step * micro_steps, (self.step + 1) * micro_steps):
            stage = config.stages[config.drawn_from(self.data.global_batch(micro_step), self.progress.stage)]
            batch = self.data.take(micro_step, self.progress.stage).to(self.device)
            # Processes exchange gradients once per step, with the last batch.
            alone = processes.world > 1 and (micro_step + 1) % micro_steps
            with self.trained.no_sync() if alone else nullcontext():  # type: ignore[operator]
                loss, of_batch = loss_of(self.trained, batch, config, stage, self._mesh)
                (loss / micro_steps).backward()
            figures.append(of_batch)
        # Before clipping, like the norm of all gradients.
        gate_norm = nn.utils.get_total_norm([gate.grad for gate in self._gates if gate.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        each = processes.gathered(torch.stack(figures)).unflatten(0, (-1, self.shards)).mean(1)
        mean = each.mean(0)
        if not (torch.isfinite(mean).all() and torch.isfinite(norm)):
            raise FloatingPointError(
                f"step {self.step}: the loss is {mean[0].item()} and the norm of the gradient {norm.item()}; "
                f"a lower learning rate may help"
            )
        return Passes(each, norm, gate_norm)

    def _update(self, passes: Passes) -> None:
        """Update the weights, count and report the step."""
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        accuracies, examples = passes.each[:, 1].tolist(), self.config.batch * self.shards
        self.progress = self.progress.counted(self.config, self.step, accuracies, examples)
        self.step += 1
        figures = dict(zip(("loss", "accuracy", "dense_accuracy"), passes.each.mean(0).tolist(), strict=False))
        self.losses.append(figures["loss"])
        figures |= {"stage": self.progress.stage + 1, "running_accuracy": self.progress.accuracy}
        figures |= {"lr": self.optimizer.param_groups[0]["lr"], "gradient_norm": passes.norm.item()}
        if self._gates:
            figures["key_gate_gradient_norm"] = passes.gate_norm.item()
        self.reporter.step(self.step, figures)

    @property
    def _averaged(self) -> nn.Module | None:
        return None if self.average is None else self.average.module


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of a recipe: matrices have weight decay; norms, biases, key gates and the embedding have none."""

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
