"""``sparseflash generate``: images in the LRA layout."""

import os
from pathlib import Path

import typer

from sparseflash import pathfinder


def run(
    out: Path, size: int | None, task: str | None, level: str, count: int, seed: int, start: int, workers: int | None
) -> None:
    """Write the images and say where they are."""
    if (size is None) == (task is None):
        raise ValueError("name either --size (32, 64, 128 or 256) or --task, and not both")
    geometry, match_distance = None, False
    if task is not None:
        from sparseflash.train.tasks import recipe

        stage = recipe(task).stages[-1]
        geometry, match_distance = stage.geometry, stage.match_distance
    report = pathfinder.write(
        out,
        size=256 if size is None else size,
        count=count,
        seed=seed,
        level=level,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        start=start,
        geometry=geometry,
        match_distance=match_distance,
    )
    there = f", {report.kept} were there already" if report.kept else ""
    skipped = f", {len(report.skipped)} complete batches were skipped" if report.skipped else ""
    typer.echo(f"{report.written:,} images written to {report.folder}{there}{skipped}")
