"""``sparseflash generate``: images, or ListOps, in the layout of the Long Range Arena."""

import os
from pathlib import Path

from sparseflash import pathfinder
from sparseflash.cli.saying import say
from sparseflash.pathfinder.geometry import SIZES


def run(
    out: Path, size: int | None, task: str | None, level: str, count: int, seed: int, start: int, workers: int | None
) -> None:
    """Write the images and say where they are."""
    if (size is None) == (task is None):
        raise ValueError(
            f"name either --size (32, 64, 128 or 256, or any from {SIZES[0]} to {SIZES[-1]}) or --task, and not both"
        )
    match_distance = False
    if size is not None:
        geometry = pathfinder.Geometry.sized(size, level)
    else:
        assert task is not None
        from sparseflash.train.tasks import recipe

        if task == "listops":
            _trees(out, count, seed, start, workers)
            return
        config = recipe(task)
        if config.model.symbols:
            raise ValueError(f"--task must be listops, or a task over pixels; got {task!r}")
        stage = config.pixel_stages[-1]
        geometry, match_distance = stage.geometry, stage.match_distance
    report = pathfinder.write(
        out,
        count=count,
        seed=seed,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        start=start,
        geometry=geometry,
        match_distance=match_distance,
    )
    there = f", {report.kept} were there already" if report.kept else ""
    skipped = f", {len(report.skipped)} complete batches were skipped" if report.skipped else ""
    say(f"{report.written:,} images written to {report.folder}{there}{skipped}")


def _trees(out: Path, count: int, seed: int, start: int, workers: int | None) -> None:
    """The three files of ListOps."""
    from sparseflash.lra.listops import LISTOPS, SPLITS
    from sparseflash.lra.listops_files import write

    if start:
        raise ValueError("--start is for images: ListOps is written from its first tree on")
    if not 1 <= count <= len(SPLITS["train"]):
        raise ValueError(f"--count must be 1 to {len(SPLITS['train']):,} training trees; got {count}")
    counts = write(out, LISTOPS, count, seed, (os.cpu_count() or 1) if workers is None else workers)
    say(", ".join(f"{number:,} {split}" for split, number in counts.items()) + f" trees written to {out}")
