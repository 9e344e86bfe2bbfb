"""The training loop, top to bottom."""

import os
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseflash.models import PixelTransformer
from sparseflash.train.checkpoint import checkpoints, load_checkpoint, restore, save_checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.data import Batch, stream
from sparseflash.train.interrupt import Interrupt
from sparseflash.train.logs import Reporter


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        model: the trained model, on its device.
        step: optimizer steps done in all.
        losses: loss of each step done by this call.
        checkpoint: the last one; None if not even one step was completed.
        interrupted: Ctrl-C or SIGTERM ended the run early.
    """

    model: PixelTransformer = field(repr=False)
    step: int
    losses: list[float] = field(repr=False)
    checkpoint: Path | None
    interrupted: bool


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    steps: int | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    workers: int = 0,
    save_every: int = 500,
    keep: int = 3,
    line: Callable[[str], None] | None = None,
) -> TrainResult:
    """Train a model, or go on training it.

    On a CPU, a run that was stopped and resumed any number of times has, bit for bit, the losses and weights of an
    uninterrupted one. Under torchrun every process trains on its share of each step's images.

    Args:
        config: the recipe.
        out: run folder: ``checkpoints/``, ``tensorboard/`` and ``steps.jsonl`` go there.
        steps: optimizer steps in all, those before a resume included; default ``config.schedule_steps``.
        resume: go on from the latest checkpoint in ``out``.
        device: where to train.
        workers: processes that draw images ahead; 0 draws them in this one.
        save_every: steps between checkpoints; one more is written at the end.
        keep: how many checkpoints stay.
        line: takes a line of progress at a time, instead of the terminal.

    Raises:
        ValueError: ``out`` holds a run already and ``resume`` is off, its checkpoint is damaged or was made with
            another config, or steps, save_every or keep are below 1.
        FileNotFoundError: ``resume`` is on and there is nothing to resume.
        FloatingPointError: the loss or the gradient is not finite; earlier checkpoints stay.

    Example:
        >>> import tempfile
        >>> from sparseflash.train import recipe, train
        >>> with tempfile.TemporaryDirectory() as out:
        ...     result = train(recipe("demo", batch=2), out, steps=2, line=lambda text: None)
        >>> result.step, len(result.losses)
        (2, 2)
    """
    steps = config.schedule_steps if steps is None else steps
    for name, value in (("steps", steps), ("save_every", save_every), ("keep", keep)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value!r}")
    run = Path(out)
    if run.exists() and not run.is_dir():
        raise ValueError(f"out must be a folder, but {out!r} is a file")
    if not resume and checkpoints(run):
        raise ValueError(f"{run} already holds a run: resume it, or train into another folder")

    rank, world, device = _join_processes(torch.device(device))
    torch.manual_seed(config.seed)
    model = PixelTransformer(config.model)
    model.activation_checkpointing = config.activation_checkpointing
    model.to(device).train()
    optimizer = _optimizer(model, config)
    step, saved = 0, None
    if resume:
        checkpoint = load_checkpoint(run)
        if different := config.differences(checkpoint.config):
            raise ValueError(f"{checkpoint.path} was made with another {', '.join(different)}; resume with its own")
        restore(checkpoint, model, optimizer)
        step, saved = checkpoint.step, checkpoint.path
    trained: nn.Module = DistributedDataParallel(model) if world > 1 else model
    losses: list[float] = []

    with ExitStack() as stack:
        interrupt = stack.enter_context(Interrupt(at_once=world == 1))
        images = config.batch * config.accumulate * world
        reporter = stack.enter_context(Reporter(run, step, steps, images, quiet=rank > 0, line=line))
        batches = stream(config, step, rank, world, workers)
        stack.callback(batches.close)
        try:
            while step < steps:
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate(step)
                optimizer.zero_grad(set_to_none=True)
                parts: list[Tensor] = []
                for part, batch in enumerate(next(batches)):
                    # Processes exchange gradients once a step, with the last part.
                    alone = world > 1 and part < config.accumulate - 1
                    with trained.no_sync() if alone else nullcontext():  # type: ignore[operator]
                        loss, figures = _loss(trained, batch.to(device), config)
                        (loss / config.accumulate).backward()
                    parts.append(figures)
                norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
                mean = _mean_over_processes(torch.stack(parts).mean(0), world)
                loss_value, *accuracies = mean.tolist()
                if not (torch.isfinite(mean).all() and torch.isfinite(norm)):
                    raise FloatingPointError(
                        f"step {step}: the loss is {loss_value} and the norm of the gradient {norm.item()}; "
                        f"a lower learning rate may help"
                    )

                # From here to the end of the step, weights, optimizer, step number and logs change together.
                with interrupt.shield():
                    optimizer.step()
                    step += 1
                    losses.append(loss_value)
                    logged = {"loss": loss_value, **dict(zip(("accuracy", "dense_accuracy"), accuracies, strict=False))}
                    reporter.step(step, {**logged, "lr": config.learning_rate(step - 1), "gradient_norm": norm.item()})
                    stop = _in_any_process(interrupt.asked, world, device)
                    if rank == 0 and (step % save_every == 0 or step >= steps or stop):
                        saved = save_checkpoint(run, step, config, model, optimizer, keep)
                if stop:
                    break
        except KeyboardInterrupt:
            # Raised between updates only: the step under way is dropped, the completed ones are saved.
            interrupt.hold()
            if losses:
                saved = save_checkpoint(run, step, config, model, optimizer, keep)
    if world > 1:
        distributed.destroy_process_group()
    return TrainResult(model, step, losses, saved, interrupted=interrupt.asked)


def _loss(model: nn.Module, batch: Batch, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The loss, and detached figures: loss, accuracy and, with a dense loss, the accuracy over lit pixels."""
    half = config.precision == "bf16"
    with torch.autocast(batch.images.device.type, torch.bfloat16) if half else nullcontext():
        output = model(batch.images)
        loss = F.cross_entropy(output.logits, batch.labels)
    right = (output.logits.argmax(-1) == batch.labels).float().mean()
    if batch.targets is None:
        return loss, torch.stack([loss.detach(), right])
    wanted = batch.targets.flatten()[output.dense_pixels]
    asked = wanted >= 0
    dense = F.cross_entropy(output.dense_logits.float()[asked], wanted[asked])
    loss = loss + config.dense_weight * dense
    dense_right = (output.dense_logits.argmax(-1)[asked] == wanted[asked]).float().mean()
    return loss, torch.stack([loss.detach(), right, dense_right])


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not name.startswith("embedding")

    named = list(model.named_parameters())
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in named if decays(n, p)], "weight_decay": config.weight_decay},
            {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(0.9, 0.98),
    )


def _join_processes(device: torch.device) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device of this one; torchrun sets the environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return distributed.get_rank(), world, device


def _mean_over_processes(figures: Tensor, world: int) -> Tensor:
    if world > 1:
        distributed.all_reduce(figures)
    return figures / world


def _in_any_process(flag: bool, world: int, device: torch.device) -> bool:
    if world == 1:
        return flag
    shared = torch.tensor(float(flag), device=device)
    distributed.all_reduce(shared)
    return bool(shared > 0)
