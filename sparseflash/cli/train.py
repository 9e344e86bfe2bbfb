"""``sparseflash train``: options to a recipe, and what came of it."""

import os
import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import typer

from sparseflash.cli.errors import block_size
from sparseflash.cli.files import check_preset, outside_of, with_files
from sparseflash.cli.importing import import_modules, told
from sparseflash.cli.masks import mask_lines
from sparseflash.cli.resuming import AUTO, LATEST, check_resume
from sparseflash.cli.saying import say
from sparseflash.cli.show import own_pattern
from sparseflash.pathfinder.geometry import LEVELS
from sparseflash.train import TASKS, SequenceStage, TrainConfig, TrainResult, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.checkpoint import checkpoints, latest_checkpoint
from sparseflash.train.config import DATA
from sparseflash.train.devices import resolve_device
from sparseflash.train.preset_text import preset_text
from sparseflash.train.processes import Processes
from sparseflash.train.tasks import load_preset
from sparseflash.train.validation import BEST


def run(
    task: str,
    preset: str | None,
    out: Path | None,
    steps: int | None,
    minutes: float | None,
    resume: str | None,
    device_name: str | None,
    folder: Path | None,
    first_stage: str | None,
    options: dict[str, Any],
    context_parallel: int,
    workers: int | None,
    save_every: int,
    keep: int,
    pictures: bool,
    print_config: bool = False,
) -> None:
    """Train, and say where the checkpoint is and how to go on."""
    if task not in TASKS:
        raise ValueError(f"TASK must be one of {', '.join(TASKS)}; got {task!r}")
    out = Path("runs") / (task if preset is None else Path(preset).stem) if out is None else out
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be at least 0; got {workers}")
    device = resolve_device(device_name)
    options = {name: value for name, value in options.items() if value is not None}
    imports = options.get("imports", ())
    import_modules(imports)
    if "{" not in options.get("pattern", "{"):  # {shape} and {order} are the model's to fill in
        options["pattern"] = str(own_pattern(options["pattern"], imports))
    if "block" in options:
        size = block_size(options["block"])
        options["block"] = (size, size) if isinstance(size, int) else size
    check_resume(resume)
    if options.get("data", DATA[0]) not in DATA:
        raise ValueError(f"--draw must be {' or '.join(DATA)}; got {options['data']!r}. Files are named by --folder")
    going_on = resume == LATEST or (resume == AUTO and bool(checkpoints(out)))
    if going_on:
        again = f"sparseflash train {task} --out {shlex.quote(str(out))} --resume"
        try:
            checkpoint = latest_checkpoint(out)
        except ValueError as error:
            raise told(error, imports, again) from None
        config, begins = checkpoint.config, checkpoint.progress.stage
        changes = {name: options.pop(name) for name in config.changeable if name in options}
        _refuse_changes(task, {name: value for name, value in options.items() if name != "imports"}, config, out)
        config = replace(config, **changes)
        _stage_option(first_stage, config, out)
        if folder is not None or not print_config:  # what is printed is not read
            config = with_files(config, folder, out)
    else:
        again = f"sparseflash train {task}" + ("" if preset is None else f" --preset {shlex.quote(preset)}")
        try:
            config = recipe(task, preset=preset, device=device.type, folder=folder, **options)
        except ValueError as error:
            raise told(error, imports, again) from None
        if preset is not None and Path(preset).suffix == ".toml":
            check_preset(config, Path(preset), files=folder is None, weights="init" not in options)
        config = begun_at(first_stage, config)
        begins = config.first_stage
    if print_config:
        summary = f"the recipe of {out}" if going_on else load_preset(task if preset is None else preset).summary
        typer.echo(preset_text(config, summary), nl=False)
        return
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))

    first = Processes.here(context_parallel).first
    if first:
        say(describe(config, device.type, begins), err=True)
        stage = config.stages[begins]
        size, which = (stage.length, None) if isinstance(stage, SequenceStage) else (stage.size, stage.tokens)
        for line in mask_lines(config.model, size, which):
            say(line, err=True)
    result = train(
        config,
        out,
        steps=steps,
        minutes=minutes,
        resume=going_on,
        device=device,
        context_parallel=context_parallel,
        workers=workers,
        save_every=save_every,
        keep=keep,
        pictures=pictures,
    )
    if not first:
        return
    again = f"sparseflash train {task} --out {shlex.quote(str(out))} --resume"
    again += "".join(f" --import {shlex.quote(name)}" for name in config.imports)
    if (elsewhere := outside_of(config, out)) is not None:
        again += f" --folder {shlex.quote(elsewhere)}"
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # torchrun sets it
        again = f"torchrun --nproc-per-node {processes} -m {again} --context-parallel {context_parallel}"
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
    which, examples = "", "examples"
    if not isinstance(stage, SequenceStage):
        kinds = {"all": "", "lit_tiles": ", those of lit tiles,", "lit_pixels": ", the lit ones,"}
        which, examples = kinds[stage.tokens or config.pixel_model.tokens], "images"
    if not stage.drawn:
        examples += f" from files ({stage})"
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
