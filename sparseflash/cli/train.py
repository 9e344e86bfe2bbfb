"""``sparseflash train``: options to a recipe, and what came of it."""

import os
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import typer

from sparseflash.cli.errors import block_size
from sparseflash.cli.files import check_preset, outside_of, with_files
from sparseflash.cli.importing import import_modules, told
from sparseflash.cli.masks import mask_lines
from sparseflash.cli.resuming import AUTO, LATEST, check_resume
from sparseflash.cli.saying import say
from sparseflash.cli.show import own_pattern
from sparseflash.cli.train_options import TrainOptions
from sparseflash.models import PixelTransformerConfig, SequenceTransformerConfig
from sparseflash.pathfinder.geometry import LEVELS
from sparseflash.train import TASKS, TrainConfig, TrainResult, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.checkpoint import checkpoints, latest_checkpoint
from sparseflash.train.config import DATA
from sparseflash.train.devices import resolve_device
from sparseflash.train.preset_text import preset_text
from sparseflash.train.process_groups import Processes
from sparseflash.train.tasks import load_preset
from sparseflash.train.validation import BEST

# Options of a recipe that `recipe` takes beside the fields of configs.
_OF_FILES = ("level", "split")


def run(options: TrainOptions) -> None:
    """Train, and say where the checkpoint is and how to go on."""
    if options.task not in TASKS:
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}; got {options.task!r}")
    out = options.out or Path("runs") / (options.task if options.preset is None else Path(options.preset).stem)
    if options.workers is not None and options.workers < 0:
        raise ValueError(f"--workers must be at least 0; got {options.workers}")
    device = resolve_device(options.device)
    changes = recipe_changes(options)
    check_resume(options.resume)
    if changes.get("data", DATA[0]) not in DATA:
        raise ValueError(f"--draw must be {' or '.join(DATA)}; got {changes['data']!r}. Files are named by --folder")
    going_on = options.resume == LATEST or (options.resume == AUTO and bool(checkpoints(out)))
    config, begins = _resumed(options, out, changes) if going_on else _begun(options, device, changes)
    if options.print_config:
        preset = options.task if options.preset is None else options.preset
        summary = f"the recipe of {out}" if going_on else load_preset(preset).summary
        typer.echo(preset_text(config, summary), nl=False)
        return
    workers = options.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))

    first = Processes.here(options.context_parallel).first
    if first:
        say(describe(config, device.type, begins), err=True)
        stage = config.stages[begins]
        for line in mask_lines(config.model, stage.size, stage.tokens):
            say(line, err=True)
    result = train(
        config,
        out,
        steps=options.steps,
        minutes=options.minutes,
        resume=going_on,
        device=device,
        context_parallel=options.context_parallel,
        workers=workers,
        save_every=options.save_every,
        keep=options.keep,
        pictures=options.pictures,
    )
    if first:
        _say_result(options, out, config, result)


def recipe_changes(options: TrainOptions) -> dict[str, Any]:
    """The options that change a recipe and were given, as `sparseflash.train.recipe` takes them."""
    configs = TrainConfig, PixelTransformerConfig, SequenceTransformerConfig
    names = {field.name for config in configs for field in fields(config)} | set(_OF_FILES)
    names -= {"task", "first_stage", "imports"}
    changes = {name: value for name, value in vars(options).items() if name in names and value is not None}
    imports = tuple(options.imports or ())
    import_modules(imports)
    if imports:
        changes["imports"] = imports
    if "{" not in changes.get("pattern", "{"):  # {shape} and {order} are the model's to fill in
        changes["pattern"] = str(own_pattern(changes["pattern"], imports))
    if options.init is not None:
        changes["init"] = str(options.init)
    if options.block is not None:
        size = block_size(options.block)
        changes["block"] = (size, size) if isinstance(size, int) else size
    return changes


def _resumed(options: TrainOptions, out: Path, changes: dict[str, Any]) -> tuple[TrainConfig, int]:
    """The recipe of the run that goes on, and the number of the stage that it stands in."""
    try:
        checkpoint = latest_checkpoint(out)
    except ValueError as error:
        again = f"sparseflash train {options.task} --out {shlex.quote(str(out))} --resume"
        raise told(error, changes.get("imports", ()), again) from None
    config = checkpoint.config
    changeable = {name: changes.pop(name) for name in config.changeable if name in changes}
    fixed = {name: value for name, value in changes.items() if name != "imports"}
    _refuse_changes(options.task, fixed, config, out)
    config = replace(config, **changeable)
    _stage_option(options.first_stage, config, out)
    if options.folder is not None or not options.print_config:  # what is printed is not read
        config = with_files(config, options.folder, out)
    return config, checkpoint.progress.stage


def _begun(options: TrainOptions, device: torch.device, changes: dict[str, Any]) -> tuple[TrainConfig, int]:
    """The recipe of a new run, and the number of the stage that it begins with."""
    preset = options.preset
    try:
        config = recipe(options.task, preset=preset, device=device.type, folder=options.folder, **changes)
    except ValueError as error:
        again = f"sparseflash train {options.task}" + ("" if preset is None else f" --preset {shlex.quote(preset)}")
        raise told(error, changes.get("imports", ()), again) from None
    if preset is not None and Path(preset).suffix == ".toml":
        check_preset(config, Path(preset), files=options.folder is None, weights="init" not in changes)
    config = begun_at(options.first_stage, config)
    return config, config.first_stage


def _say_result(options: TrainOptions, out: Path, config: TrainConfig, result: TrainResult) -> None:
    """Say where the checkpoint is and how to go on.

    Raises:
        Exit: with 130, after an interrupt.
    """
    again = f"sparseflash train {options.task} --out {shlex.quote(str(out))} --resume"
    again += "".join(f" --import {shlex.quote(name)}" for name in config.imports)
    if (elsewhere := outside_of(config, out)) is not None:
        again += f" --folder {shlex.quote(elsewhere)}"
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # torchrun sets it
        again = f"torchrun --nproc-per-node {processes} -m {again} --context-parallel {options.context_parallel}"
    if config.eval_every:
        say(_best(out, result))
    stage = config.stages[result.progress.stage]
    how = f"{result.progress.accuracy:.1%} running accuracy, {stage_baseline(stage):.1%} by {stage.rule}"
    where = f"in stage {result.progress.stage + 1} of {len(config.stages)} ({stage}): {how}"
    if result.interrupted:
        saved = f"saved {result.checkpoint}" if result.checkpoint else "nothing was completed, so nothing is saved"
        say(f"stopped after step {result.step}; {saved}" + (f"; go on with: {again}" if result.checkpoint else ""))
        raise typer.Exit(130)
    if result.out_of_time:
        say(f"time is up after step {result.step}, {where}; saved {result.checkpoint}; go on with: {again}")
        return
    if result.out_of_patience:
        say(
            f"stopped early after step {result.step}, {where}; {result.progress.waited} evaluations without a better "
            f"one; checkpoint {result.checkpoint}; go on with: {again} --patience N"
        )
        return
    say(f"step {result.step} done, {where}; checkpoint {result.checkpoint}; go on with: {again} --steps N")


def describe(config: TrainConfig, device: str, number: int | None = None) -> str:
    """A line that says what is trained on what.

    Args:
        config: the recipe.
        device: where.
        number: of the stage that training begins with, from 0; by default the first one of the recipe.
    """
    number = config.first_stage if number is None else number
    stage, last = config.stages[number], config.stages[-1]
    kinds = {"all": "", "lit_tiles": ", those of lit tiles,", "lit_pixels": ", the lit ones,"}
    which = kinds[stage.tokens or config.model.tokens]
    examples = stage.noun if stage.drawn else f"{stage.noun} from files ({stage})"
    place = ""
    if stage.tokens_each != last.tokens_each:
        place = f", stage {number + 1} of {len(config.stages)} ({last.tokens_each:,} tokens in the last)"
    pattern = config.model.pattern if isinstance(config.model.pattern, str) else " / ".join(config.model.pattern)
    loss = "labels and a dense loss on curves" if config.dense_weight else "labels only"
    return (
        f"{config.task}{place}: {stage.tokens_each:,} tokens{which} through {pattern}, {config.model.layers} layers "
        f"of width {config.model.width}, batch {config.batch} x {config.accumulate}, {loss}, {config.data} {examples}, "
        f"{config.precision} on {device}"
    )


def _refuse_changes(task: str, options: dict[str, Any], config: TrainConfig, out: Path) -> None:
    """A run goes on with the recipe it was started with."""
    in_model = {field.name for field in fields(config.model)}
    for name, wanted in {"task": task, **options}.items():
        if name in ("level", "split"):
            owner: object = config.stages[-1]
            wanted = LEVELS[wanted][0] if wanted in LEVELS else wanted
        else:
            owner = config.model if name in in_model else config
        found = getattr(owner, name, None)
        if found != wanted:
            option = {"task": "TASK", "data": "--draw"}.get(name, "--" + name.replace("_", "-"))
            raise ValueError(
                f"the run in {out} was started with {option} {found}; got {wanted}. Leave it out to resume"
            )


def begun_at(first_stage: str | None, config: TrainConfig) -> TrainConfig:
    """The recipe beginning with a stage as people count, from 1; ``last`` leaves nothing but the task itself."""
    if first_stage is None:
        return config
    if first_stage == "last":
        return replace(config, stages=config.stages[-1:], first_stage=0)
    number = int(first_stage) if first_stage.isdecimal() else 0
    if not 1 <= number <= len(config.stages):
        raise ValueError(f"--first-stage must be 1 to {len(config.stages)}, or last; got {first_stage!r}")
    return replace(config, first_stage=number - 1)


def _stage_option(first_stage: str | None, config: TrainConfig, out: Path) -> None:
    """A run goes on with the first stage that it was started with."""
    alone = "last" if len(config.stages) == 1 else None
    if first_stage not in (None, alone, str(config.first_stage + 1)):
        raise ValueError(
            f"the run in {out} was started with --first-stage {alone or config.first_stage + 1}; got {first_stage}. "
            f"Leave it out to resume"
        )


def _best(out: Path, result: TrainResult) -> str:
    """A line about the best checkpoint."""
    if result.best is None:
        return "no evaluation on validation examples yet"
    step, progress = int(result.best.name.removeprefix("step-")), result.progress
    how = f", {progress.best:.1%} of the validation examples" if progress.best_step == step else ""
    return f"best at step {step}{how}: sparseflash evaluate {shlex.quote(str(out / BEST))}"
