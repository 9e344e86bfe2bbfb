"""``sparseflash evaluate``: accuracy on a fixed set of generated images, or on a folder."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sparseflash import pathfinder
from sparseflash.models import PixelTransformer
from sparseflash.train import Stage, TrainConfig, evaluate, held_out, recipe, stored_images
from sparseflash.train.baseline import folder_baseline, stage_baseline
from sparseflash.train.checkpoint import STATE, load_checkpoint, resolve
from sparseflash.train.devices import resolve_device

TOKENS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class _Set:
    """Images to score a model on."""

    name: str
    split: str
    side: int
    count: int
    images: Iterator[tuple[Tensor, Tensor]]
    baseline: float | None
    tokens: str | None


def run(
    checkpoint: Path,
    data: Path | None,
    device_name: str | None,
    as_json: bool,
    *,
    level: str | None,
    size: int | None,
    split: str | None,
    task: str | None,
    stage: int | None,
    tokens: str | None,
    limit: int | None,
    batch: int | None,
    workers: int,
) -> None:
    """Load, score, print."""
    for name, value, least in (
        ("--limit", limit, 1),
        ("--batch", batch, 1),
        ("--stage", stage, 1),
        ("--workers", workers, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    folds = ("all", "s4", "contiguous") if data is not None else ("test", "val")
    split = folds[0] if split is None else split
    if split not in folds:
        raise ValueError(f"--split must be {', '.join(folds[:-1])} or {folds[-1]}; got {split!r}")
    device = resolve_device(device_name)
    folder = resolve(checkpoint)
    model = PixelTransformer.from_pretrained(folder, device)
    if data is not None:
        if (folder / STATE).is_file():
            load_checkpoint(folder)  # verifies
        if task is not None or stage is not None:
            raise ValueError("--task and --stage name a fixed set; leave them out with --data")
        found = _folder(data, level, size, split, limit, batch)
    else:
        if level is not None or size is not None:
            raise ValueError("--level and --size are for --data; name a fixed set by --task and --stage")
        found = _fixed(folder, task, stage, split, limit, batch, workers)
    # A size that the pattern or the order cannot take shows before any image is read.
    model.masks((found.side, found.side))
    tokens = found.tokens if tokens is None else tokens

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=found.count)
        score = evaluate(model, found.images, device, lambda done: progress.advance(bar, done), tokens)
    low, high = score.interval
    if as_json:
        result = {
            "checkpoint": str(folder),
            "data": found.name,
            "split": split,
            **asdict(score),
            "accuracy": score.accuracy,
            "interval_95": [low, high],
            "marker_distance_baseline": found.baseline,
        }
        print(json.dumps(result, indent=2))
        return
    typer.echo(f"{folder} on {found.name} ({split})")
    typer.echo(f"accuracy                  {score}")
    known = "not known for these images" if found.baseline is None else f"{found.baseline:.1%}"
    typer.echo(f"marker-distance baseline  {known}")


def _folder(data: Path, level: str | None, size: int | None, split: str, limit: int | None, batch: int | None) -> _Set:
    dataset = pathfinder.read(data, level, size=size)
    if split != "all":
        dataset = dataset.split(split).test
    if limit is not None:
        dataset = dataset.subset(slice(limit))
    images = stored_images(dataset, batch or _batch(dataset.size))
    baseline = folder_baseline(dataset.folder)
    return _Set(str(dataset.folder), split, dataset.size, len(dataset), images, baseline, None)


def _fixed(
    folder: Path, task: str | None, number: int | None, split: str, limit: int | None, batch: int | None, workers: int
) -> _Set:
    config, stage = _stage(folder, task, number)
    count = len(pathfinder.SPLITS[split]) if limit is None else limit
    side = stage.geometry.size
    images = held_out(stage, count, split, batch or _batch(side), workers)
    return _Set(f"{config.task}: {stage}", split, side, count, images, stage_baseline(stage), stage.tokens)


def _stage(folder: Path, task: str | None, number: int | None) -> tuple[TrainConfig, Stage]:
    """The stage to be examined in: of the task, or else of the run that the checkpoint belongs to."""
    reached = None
    if (folder / STATE).is_file():
        found = load_checkpoint(folder)  # verifies
        config, reached = found.config, found.progress.stage + 1
    elif task is None:
        raise ValueError(f"{folder} holds weights alone: name the --task they are for, or images by --data")
    if task is not None and (reached is None or task != config.task):
        config, reached = recipe(task), None
    chosen = number or reached or len(config.stages)
    if chosen > len(config.stages):
        raise ValueError(f"--stage must be at most {len(config.stages)}, the stages of {config.task}; got {chosen}")
    return config, config.stages[chosen - 1]


def _batch(side: int) -> int:
    return max(1, TOKENS_AT_ONCE // side**2)
