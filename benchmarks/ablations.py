"""Ablations of the Path-256 recipe: short runs that each change one choice, on the same images.

    python -m benchmarks.ablations --images 12000                       # all arms on the first stage, labels only
    python -m benchmarks.ablations --arms base,tied --images 12000
    python -m benchmarks.ablations --preset path64 --stage 5 --images 200000 --batch 32   # a 64-pixel stage

Every arm sees the same number of images from the same seed; that of masked-pixel pretraining spends a third of them on
hidden pixels. Accuracies are of the stage's fixed test set, with 95 % intervals. One seed: a difference inside the
intervals says nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.record import write
from sparseflash.train import TrainConfig, evaluate, held_out, load_preset, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.devices import resolve_device
from sparseflash.train.pretrain import pretrain

# What an arm changes in the model, beside nothing.
CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "tied": {"tied": True},
    "half the depth": {},
    "raster": {"order": "raster"},
    "morton": {"order": "morton"},
    "readout at the discs": {"readout_reach": 1},
    "masked pixels first": {},
}
PRETRAINED_SHARE = 1 / 3


def arm_config(config: TrainConfig, arm: str) -> TrainConfig:
    """The recipe of an arm."""
    model = config.pixel_model
    changes = dict(CHANGES[arm])
    if arm == "half the depth":
        changes["layers"] = max(1, model.layers // 2)
    return replace(config, model=replace(model, **changes))


def run_arm(config: TrainConfig, arm: str, images: int, test: int, device: str, folder: Path) -> dict[str, Any]:
    """Train one arm on ``images`` images of the recipe's first stage, and score it."""
    config = arm_config(config, arm)
    steps = images // config.batch
    begun = time.process_time()
    if arm == "masked pixels first":
        hidden = round(PRETRAINED_SHARE * steps)
        pretrain(config, folder / "pretrained", steps=hidden, device=device)
        config, steps = replace(config, init=str(folder / "pretrained")), steps - hidden
    config = replace(config, schedule_steps=steps)
    result = train(config, folder / "run", steps=steps, device=device, save_every=steps)
    cpu_seconds = time.process_time() - begun
    score = evaluate(result.model, held_out(config.stages[0], test, batch=50), device)
    return {
        "arm": arm,
        "images": images,
        "steps_on_labels": steps,
        "running_accuracy": result.progress.accuracy,
        "accuracy": score.accuracy,
        "interval_95": list(score.interval),
        "baseline": stage_baseline(config.stages[0]),
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "cpu_seconds": cpu_seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--stage", type=int, default=1, help="of the preset, from 1")
    parser.add_argument("--arms", default="base,tied,half the depth,raster,readout at the discs,masked pixels first")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--batch", type=int, help="if not the preset's for the device")
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    options = parser.parse_args(arguments)
    arms = options.arms.split(",")
    if unknown := sorted(set(arms) - CHANGES.keys()):
        parser.error(f"arms are {', '.join(CHANGES)}; got {', '.join(unknown)}")
    device = resolve_device(options.device)
    preset = load_preset(options.preset)
    batch = options.batch or (preset.cpu_batch if device.type == "cpu" else preset.config.batch)
    model = replace(preset.config.pixel_model, dense_classes=0)
    config = replace(preset.config, model=model, dense_weight=0.0, batch=batch, first_stage=options.stage - 1)
    if device.type == "cpu":
        config = replace(config, precision="fp32")
    stage = config.pixel_stages[config.first_stage]
    stage = replace(stage, baseline=stage_baseline(stage))
    config = replace(config, stages=(stage,), first_stage=0)
    rows = []
    for arm in arms:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_arm(config, arm, options.images, options.test, str(device), Path(folder)))
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in rows[-1].items()
            )
        )
    if not options.dry_run:
        print(write(f"ablations-{options.preset}", rows, preset=options.preset, stage=str(stage), batch=batch))


if __name__ == "__main__":
    main()
