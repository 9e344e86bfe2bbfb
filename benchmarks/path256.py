"""Path-256 and Path-X: what a training step costs through each kind of mask, and the runs themselves.

    python -m benchmarks.path256 compare path256             # steps through each mask, interleaved in one process
    python -m benchmarks.path256 compare path256 --side 64 --layers 1 --batch 1 --runs 1 --dry-run  # a look on a CPU
    python -m benchmarks.path256 run path256-lit --minutes 9 --out runs/path256-lit --workers 15
    python -m benchmarks.path256 run path256-last --tokens all --init benchmarks/weights/path256 --batch 16 --minutes 9
    # ... the same line again goes on; at the end of the schedule, or with --test N, it scores the fixed test set

Results go to results/<device>/<date>-path256-*.json. Attention's share of a step is one minus the time of the same step
with attention left out (each token gets its own value), over the time of the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import write
from sparseflash import attention
from sparseflash.functional.attention import Mask
from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.models.config import TOKENS
from sparseflash.models.pixel_transformer import Layer
from sparseflash.train import Stage, TrainConfig, evaluate, held_out, load_preset, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.batch import Batch
from sparseflash.train.checkpoint import checkpoints, load_checkpoint
from sparseflash.train.data import draw
from sparseflash.train.devices import resolve_device
from sparseflash.train.losses import loss_of

Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to attend, all else equal."""

    name: str
    model: PixelTransformerConfig
    attend: Attend = attention


def contenders(model: PixelTransformerConfig) -> list[Contender]:
    """The same weights through tiles around each tile, a fixed butterfly, everything, and what the image holds."""
    pixels = replace(model, unit="pixel", tokens="all", order="raster", block=(128, 128))
    lit_pixels = replace(
        pixels, tokens="lit_pixels", order="morton", pattern="neighborhood({shape}, 16, {order})", block=(64, 64)
    )
    return [
        Contender("tiles, 5 x 3 of 8 x 16", replace(model, **tiles((8, 16), "(2, 1)"), tokens="all")),
        Contender("butterfly", replace(pixels, pattern="butterfly(unit=128)")),
        Contender("dense", replace(pixels, pattern="full()")),
        Contender("dense, torch SDPA", replace(pixels, pattern="full()"), sdpa),
        Contender("lit tiles, 5 x 5 of 8 x 8", replace(model, **tiles((8, 8), "2"), tokens="lit_tiles")),
        Contender("lit pixels, 16 around", lit_pixels),
    ]


def tiles(tile: tuple[int, int], reach: str) -> dict[str, Any]:
    size = tile[0] * tile[1]
    pattern = f"neighborhood({{shape}}, {reach})"
    return {"pattern": pattern, "unit": "tile", "order": "tile", "tile": tile, "block": (size, size)}


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def left_out(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    return v


class Step:
    """A training step of a contender on one batch."""

    def __init__(self, contender: Contender, config: TrainConfig, batch: Batch, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = PixelTransformer(contender.model).to(device)
        self.attend = contender.attend
        self._config, self._batch, self._device = config, batch.to(device), device
        self._optimizer = torch.optim.AdamW(self.model.parameters())

    def seconds(self, attend: Attend) -> float:
        """One step."""
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            layer.attend = attend
        self._wait()
        begun = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        loss, _ = loss_of(self.model, self._batch, self._config, Stage(self._config.pixel_stages[-1].geometry))
        loss.backward()
        self._optimizer.step()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def compare(
    task: str, side: int | None, layers: int | None, batch: int, runs: int, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each contender."""
    config = load_preset(task).config
    config = replace(config, model=replace(config.model, layers=layers or config.model.layers))
    config = replace(config, precision="bf16" if device.type == "cuda" else "fp32")
    stage = next(s for s in reversed(config.pixel_stages) if side in (None, s.geometry.size))
    images = draw(stage, 0, range(batch))
    shape = (stage.geometry.size,) * 2
    rows: list[dict[str, Any]] = []
    times: list[tuple[Step, list[float], list[float]]] = []
    for contender in contenders(config.pixel_model):
        step = Step(contender, config, images, device)
        for attend in (step.attend, left_out):  # compiles masks and kernels
            step.seconds(attend)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step.seconds(step.attend)
        tokens = step.model.tokens(images.inputs.to(device))
        row = {
            "attention": contender.name,
            "pattern": contender.model.pattern,
            "tokens_an_image": round(tokens.place.numel() / batch),
            "density": step.model.masks(shape)[0].density if contender.model.tokens == "all" else None,
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        }
        rows.append(row)
        times.append((step, [], []))
    for _ in range(runs):
        for step, whole, without in times:
            whole.append(step.seconds(step.attend))
            without.append(step.seconds(left_out))
    for row, (_, whole, without) in zip(rows, times, strict=True):
        median = statistics.median(whole)
        row |= {
            "layers": config.model.layers,
            "batch": batch,
            "step_ms": 1e3 * median,
            "spread_ms": 1e3 * (max(whole) - min(whole)),
            "images_per_s": batch / median,
            "attention_share": max(0.0, 1 - statistics.median(without) / median),
        }
    return rows


def run(
    preset: str, minutes: float, out: Path, workers: int, test: int | None, device: torch.device, **changes: Any
) -> dict[str, Any]:
    """Begin or go on with a run; score it when its schedule is done, or when asked to."""
    found = checkpoints(out)
    if found:
        config = load_checkpoint(out).config
    else:
        config = recipe(load_preset(preset).config.task, preset=preset, device=device.type, **changes)
    result = train(
        config, out, minutes=minutes, resume=bool(found), device=device, workers=workers, pictures=True, save_every=200
    )
    stage = config.pixel_stages[result.progress.stage]
    row: dict[str, Any] = {
        "preset": preset,
        "steps": result.step,
        "images": result.step * config.batch * config.accumulate,
        "stage": str(stage),
        "running_accuracy": result.progress.accuracy,
        "marker_distance_baseline": stage_baseline(stage),
        "tokens": config.pixel_model.tokens if stage.tokens is None else stage.tokens,
    }
    if not result.out_of_time or test is not None:
        score = evaluate(result.model, held_out(stage, test, batch=16, workers=workers), device, tokens=stage.tokens)
        row |= {**asdict(score), "accuracy": score.accuracy, "interval_95": list(score.interval)}
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("compare")
    costs.add_argument("task", choices=("path64", "pathx", "path256"))
    costs.add_argument("--side", type=int, help="canvas of an earlier stage, in pixels")
    costs.add_argument("--layers", type=int, help="of the model, if not the preset's")
    costs.add_argument("--batch", type=int, default=4)
    costs.add_argument("--runs", type=int, default=10)
    runs = commands.add_parser("run")
    runs.add_argument("preset")
    runs.add_argument("--minutes", type=float, default=9.0)
    runs.add_argument("--out", type=Path)
    runs.add_argument("--workers", type=int, default=0)
    runs.add_argument("--test", type=int, help="score on so many test images, wherever the run stands")
    runs.add_argument("--tokens", choices=TOKENS, help="instead of the preset's")
    runs.add_argument("--init", type=Path, help="weights to begin with")
    for name, kind in {"batch": int, "accumulate": int, "schedule-steps": int, "lr": float}.items():
        runs.add_argument(f"--{name}", type=kind, help="instead of the preset's")
    for each in (costs, runs):
        each.add_argument("--device", default=argparse.SUPPRESS)
        each.add_argument("--dry-run", action="store_true", default=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    if options.command == "compare":
        rows = compare(options.task, options.side, options.layers, options.batch, options.runs, device)
        part = f"path256-compare-{options.task}"
        more: dict[str, Any] = {"runs": options.runs}
    else:
        out = options.out or Path("runs") / options.preset
        changes = {
            "tokens": options.tokens, "init": options.init and str(options.init), "batch": options.batch,
            "accumulate": options.accumulate, "schedule_steps": options.schedule_steps, "lr": options.lr,
        }  # fmt: skip
        rows = [run(options.preset, options.minutes, out, options.workers, options.test, device, **changes)]
        part = f"path256-run-{options.preset}" + (f"-{options.tokens}" if options.tokens else "")
        more = {}
    for row in rows:
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if not options.dry_run:
        print(write(part, rows, **more))


if __name__ == "__main__":
    main()
