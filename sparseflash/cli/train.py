"""``sparseflash train``: options to a recipe, and what came of it."""

import os
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from sparseflash.cli.errors import block_size
from sparseflash.cli.importing import import_modules, told
from sparseflash.cli.masks import mask_lines
from sparseflash.cli.show import own_pattern
from sparseflash.train import TASKS, SequenceStage, TrainConfig, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.checkpoint import latest_checkpoint
from sparseflash.train.devices import resolve_device
from sparseflash.train.preset_text import preset_text
from sparseflash.train.tasks import load_preset


def run(
    task: str,
    preset: str | None,
    out: Path | None,
    steps: int | None,
    minutes: float | None,
    resume: bool,
    device_name: str | None,
    folder: Path | None,
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
    if resume:
        if folder is not None:
            raise ValueError("--folder is of a run's recipe; leave it out to resume")
        again = f"sparseflash train {task} --out {shlex.quote(str(out))} --resume"
        try:
            checkpoint = latest_checkpoint(out)
        except ValueError as error:
            raise told(error, imports, again) from None
        config, number = checkpoint.config, checkpoint.progress.stage
        _refuse_changes(task, {name: value for name, value in options.items() if name != "imports"}, config, out)
    else:
        again = f"sparseflash train {task}" + ("" if preset is None else f" --preset {shlex.quote(preset)}")
        try:
            config = recipe(task, preset=preset, device=device.type, folder=folder, **options)
        except ValueError as error:
            raise told(error, imports, again) from None
        number = config.first_stage
    if print_config:
        summary = f"the recipe of {out}" if resume else load_preset(task if preset is None else preset).summary
        typer.echo(preset_text(config, summary), nl=False)
        return
    if workers is None:
        workers = 0 if device.type == "cpu" else min(8, max(1, (os.cpu_count() or 1) - 1))

    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        typer.echo(describe(config, device.type), err=True)
        begins = config.stages[number]
        size, which = (
            (begins.length, None) if isinstance(begins, SequenceStage) else (begins.geometry.size, begins.tokens)
        )
        for line in mask_lines(config.model, size, which):
            typer.echo(line, err=True)
    result = train(
        config,
        out,
        steps=steps,
        minutes=minutes,
        resume=resume,
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
    if processes := os.environ.get("LOCAL_WORLD_SIZE"):  # torchrun sets it
        again = f"torchrun --nproc-per-node {processes} -m {again} --context-parallel {context_parallel}"
    stage = config.stages[result.progress.stage]
    how = f"{result.progress.accuracy:.1%} running accuracy, {stage_baseline(stage):.1%} by {stage.rule}"
    where = f"in stage {result.progress.stage + 1} of {len(config.stages)} ({stage}): {how}"
    if result.interrupted:
        saved = f"saved {result.checkpoint}" if result.checkpoint else "nothing was completed, so nothing is saved"
        typer.echo(
            f"stopped after step {result.step}; {saved}" + (f"; go on with: {again}" if result.checkpoint else "")
        )
        raise typer.Exit(130)
    if result.out_of_time:
        typer.echo(f"time is up after step {result.step}, {where}; saved {result.checkpoint}; go on with: {again}")
        return
    typer.echo(f"step {result.step} done, {where}; checkpoint {result.checkpoint}; go on with: {again} --steps N")


def describe(config: TrainConfig, device: str) -> str:
    """A line that says what is trained on what."""
    last = config.stages[-1]
    if isinstance(last, SequenceStage):
        tokens, which, examples = last.length, "", "examples"
    else:
        tokens, examples = last.geometry.size**2, "images"
        kinds = {"all": "", "lit_tiles": ", those of lit tiles,", "lit_pixels": ", the lit ones,"}
        which = kinds[config.pixel_model.tokens]
    pattern = config.model.pattern if isinstance(config.model.pattern, str) else " / ".join(config.model.pattern)
    loss = "labels and a dense loss on curves" if config.dense_weight else "labels only"
    return (
        f"{config.task}: {tokens:,} tokens{which} through {pattern}, {config.model.layers} layers of width "
        f"{config.model.width}, batch {config.batch} x {config.accumulate}, {loss}, {config.data} {examples}, "
        f"{config.precision} on {device}"
    )


def _refuse_changes(task: str, options: dict[str, Any], config: TrainConfig, out: Path) -> None:
    """A run goes on with the recipe it was started with."""
    in_model = {field.name for field in fields(config.model)}
    for name, wanted in {"task": task, **options}.items():
        found = getattr(config.model if name in in_model else config, name, None)
        if found != wanted:
            option = "TASK" if name == "task" else "--" + name.replace("_", "-")
            raise ValueError(
                f"the run in {out} was started with {option} {found}; got {wanted}. Leave it out to resume"
            )
