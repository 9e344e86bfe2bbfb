"""Evaluate weights trained on lit pixels with every pixel a token: over their own pattern, and over coarser fixed ones.

    python -m benchmarks.all_pixels path256 --count 2000                # through the pattern they were trained with
    python -m benchmarks.all_pixels pathx --count 1000 --masks coarse   # and through those that tiles and kernels like
    python -m benchmarks.all_pixels pathx --count 1000 --masks trained --runs "window of 1,024, Morton=runs/window"
    python -m benchmarks.all_pixels path256 --count 8 --dry-run

The images are the first of the fixed test set. What is done is written after every 20 images, and the same line goes on
from the newest file of this machine. Accuracy is beside that of the lit pixels alone, on the same images, where `agree`
counts equal answers. Seconds are of one image through the whole model, masks of one image in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.path256 import tiles
from benchmarks.record import ROOT, result_path, write
from benchmarks.tables import MASKS, TASKS
from sparseflash.models import PixelTransformer
from sparseflash.pathfinder import SPLITS, splits
from sparseflash.train import Score, load_preset
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.checkpoint import resolve
from sparseflash.train.data import draw
from sparseflash.train.devices import resolve_device

OWN = "as trained"
CHUNK = 20
COARSE: dict[str, dict[str, Any]] = {
    "tiles, 5 x 5 of 8 x 8": tiles((8, 8), "2"),
    "tiles, 5 x 3 of 8 x 16": tiles((8, 16), "(2, 1)"),
    "tiles, 3 x 3 of 8 x 16": tiles((8, 16), "1"),
    "window of 4,096, Morton": {"pattern": "local(2048)"},
    "window of 1,024, Morton": {"pattern": "local(512)"},
    "butterfly, Morton": {"pattern": "butterfly(unit=128)", "block": (128, 128)},
    "window of 1,024 and butterfly, Morton": {"pattern": "local(512) | butterfly(unit=128)", "block": (128, 128)},
}


def over(model: PixelTransformer, masks: dict[str, dict[str, Any]]) -> dict[str, PixelTransformer]:
    """A model of lit pixels applied to all pixels, with masks given as changes of its config."""
    wide = model.over_all_pixels()
    models = {name: PixelTransformer(replace(wide.config, **changes)) for name, changes in masks.items()}
    for each in models.values():
        each.load_state_dict(wide.state_dict())
    return models


def answers(
    model: PixelTransformer,
    models: dict[str, PixelTransformer],
    task: str,
    count: int,
    rows: list[dict[str, Any]],
) -> bool:
    """Add the answers to the next images to the rows; whether there were any left.

    Args:
        model: of lit pixels.
        models: of all pixels, by the names of their masks, on the same device.
        task: whose images.
        count: images in all.
        rows: of each of the models, in their order; empty at first.
    """
    stage, device = load_preset(f"{task}-last").config.pixel_stages[-1], model.head.weight.device
    shape = (stage.size, stage.size)
    if not rows:
        for name, each in models.items():
            mask = each.masks(shape)[0]
            rows.append(
                {
                    "mask": name, "pattern": each.config.pattern, "order": each.config.order, "unit": each.config.unit,
                    "tile": each.config.tile, "block": mask.block, "density": mask.density,
                    "token_density": mask.token_density, "tokens": stage.size**2, "images": str(stage),
                    "marker_distance_baseline": stage_baseline(stage), "count": 0, "right": 0, "agree": 0,
                    "lit_pixels_right": 0, "largest_difference": 0.0, "seconds": [],
                }
            )  # fmt: skip
    start = rows[0]["count"]
    indices = SPLITS["test"][start : min(start + CHUNK, count)]
    if not indices:
        return False
    batch = draw(stage, splits.SEED, indices)
    with torch.no_grad():
        for image, label in zip(batch.inputs.to(device).split(1), batch.labels.tolist(), strict=True):
            few = model(image).logits
            for row, each in zip(rows, models.values(), strict=True):
                begun = time.perf_counter()
                logits = each(image).logits
                answer = int(logits.argmax())  # waits for a GPU
                row["seconds"].append(round(time.perf_counter() - begun, 4))
                row["count"] += 1
                row["right"] += answer == label
                row["agree"] += answer == int(few.argmax())
                row["lit_pixels_right"] += int(few.argmax()) == label
                row["largest_difference"] = max(row["largest_difference"], float((logits - few).abs().max()))
    return True


def finished(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is written: medians instead of every time, accuracy with its interval."""
    score = Score(row["right"], row["count"])
    seconds = sorted(row["seconds"])
    return {
        **row,
        "seconds_median": statistics.median(seconds),
        "seconds_quartiles": [seconds[len(seconds) // 4], seconds[3 * len(seconds) // 4]],
        "accuracy": score.accuracy,
        "interval_95": list(score.interval),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--weights", type=Path, help="of lit pixels; default: the committed ones of the task")
    parser.add_argument("--count", type=int, default=100, help="images of the test set")
    parser.add_argument("--masks", choices=MASKS, default=MASKS[0])
    parser.add_argument("--runs", nargs="+", metavar="NAME=RUN", help="with --masks trained: models of all pixels")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    weights = options.weights or ROOT / "benchmarks" / "weights" / options.task
    model = PixelTransformer.from_pretrained(weights, device).eval()
    part = f"path256-all-pixels-{options.task}-{options.masks}"
    path = result_path(part)
    path = max(path.parent.glob(f"*-{part}.json"), default=path)
    rows: list[dict[str, Any]] = []
    if path.exists() and not options.dry_run:
        rows = json.loads(path.read_text())["rows"]
    if options.masks == "trained":
        runs = dict(run.rsplit("=", 1) for run in options.runs or [])
        models = {name: PixelTransformer.from_pretrained(resolve(Path(run))) for name, run in runs.items()}
    else:
        models = over(model, {OWN: {}} if options.masks == "own" else {OWN: {}, **COARSE})
    models = {name: each.to(device).eval() for name, each in models.items()}
    while answers(model, models, options.task, options.count, rows):
        if not options.dry_run:
            write(part, [finished(row) for row in rows], path, weights=weights.name)
        for row in rows:
            score = Score(row["right"], row["count"])
            print(f"{row['mask']}: {score}, {statistics.median(row['seconds']):.2f} s an image", flush=True)


if __name__ == "__main__":
    main()
