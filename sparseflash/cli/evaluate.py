"""``sparseflash evaluate``: accuracy on a folder."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparseflash import pathfinder
from sparseflash.models import PixelTransformer
from sparseflash.train import evaluate, stored_images
from sparseflash.train.baseline import folder_baseline
from sparseflash.train.checkpoint import STATE, load_checkpoint, resolve
from sparseflash.train.devices import resolve_device

TOKENS_AT_ONCE = 1 << 16


def run(
    checkpoint: Path,
    data: Path,
    level: str | None,
    size: int | None,
    split: str,
    limit: int | None,
    batch: int | None,
    device_name: str | None,
    as_json: bool,
) -> None:
    """Load, score, print."""
    for name, value in (("--limit", limit), ("--batch", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if split not in ("all", "s4", "contiguous"):
        raise ValueError(f"--split must be all, s4 or contiguous; got {split!r}")
    device = resolve_device(device_name)
    folder = resolve(checkpoint)
    if (folder / STATE).is_file():
        load_checkpoint(folder)  # verifies
    model = PixelTransformer.from_pretrained(folder, device)
    dataset = pathfinder.read(data, level, size=size)
    if split != "all":
        dataset = dataset.split(split).test
    if limit is not None:
        dataset = dataset.subset(slice(limit))
    tokens = dataset.size**2
    model.masks(tokens)  # a size that the pattern or the order cannot take shows before any image is read

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=len(dataset))
        images = stored_images(dataset, batch or max(1, TOKENS_AT_ONCE // tokens))
        score = evaluate(model, images, device, advance=lambda done: progress.advance(bar, done))
    baseline = folder_baseline(dataset.folder)
    low, high = score.interval
    if as_json:
        result = {
            "checkpoint": str(folder),
            "data": str(dataset.folder),
            "split": split,
            **asdict(score),
            "accuracy": score.accuracy,
            "interval_95": [low, high],
            "marker_distance_baseline": baseline,
        }
        print(json.dumps(result, indent=2))
        return
    typer.echo(f"{folder} on {dataset.folder}")
    typer.echo(f"accuracy                  {score}")
    known = "not known for these images" if baseline is None else f"{baseline:.1%}"
    typer.echo(f"marker-distance baseline  {known}")
