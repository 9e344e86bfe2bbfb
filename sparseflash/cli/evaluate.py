"""``sparseflash evaluate``: accuracy on a fixed set of generated images, or on a folder."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sparseflash.cli.files import checked_split, image_files, images_of, reading, with_files
from sparseflash.cli.importing import import_modules, told
from sparseflash.cli.masks import mask_lines
from sparseflash.cli.saying import say
from sparseflash.models import ModelConfig, PixelTransformer, from_pretrained
from sparseflash.pathfinder import Dataset
from sparseflash.train import AnyStage, Score, TrainConfig, evaluate, held_out, recipe, stored_images
from sparseflash.train.baseline import folder_baseline, stage_baseline
from sparseflash.train.batch import SYMMETRIES
from sparseflash.train.checkpoint import STATE, load_checkpoint, resolve
from sparseflash.train.devices import resolve_device
from sparseflash.utils.imports import explained
from sparseflash.utils.imports import named as named_imports
from sparseflash.utils.untrusted import parse_json, read_text

TOKENS_AT_ONCE = 1 << 16
# Pixels of images with only lit pixels as tokens: about 3 % of Path-X, 1 % of Path-256.
PIXELS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class _Set:
    """Examples to score a model on."""

    name: str
    size: int  # side of the images, or tokens of a document
    count: int
    examples: Iterator[tuple[Tensor, Tensor]]
    baseline: float | None
    tokens: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        checkpoint: the evaluated checkpoint.
        data, split: the examples.
        views: number of averaged views per image.
        score: the right answers.
        rule: the simple rule of the baseline.
        baseline: accuracy of the rule, if known.
    """

    checkpoint: Path
    data: str
    split: str
    views: int
    score: Score
    rule: str
    baseline: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; the key of the baseline is its rule."""
        return {
            "checkpoint": str(self.checkpoint),
            "data": self.data,
            "split": self.split,
            "views": self.views,
            **asdict(self.score),
            "accuracy": self.score.accuracy,
            "interval_95": list(self.score.interval),
            self.rule.replace("-", "_").replace(" ", "_"): self.baseline,
        }

    @property
    def lines(self) -> list[str]:
        """The result as text."""
        width = len(self.rule)
        known = "not known for these images" if self.baseline is None else f"{self.baseline:.1%}"
        found = [f"{self.checkpoint} on {self.data} ({self.split})", f"{'accuracy':<{width}}  {self.score}"]
        if self.score.right_in_one_view is not None:
            alone = Score(self.score.right_in_one_view, self.score.count)
            found.append(f"{'in one view':<{width}}  {alone}")
        return [*found, f"{self.rule}  {known}"]


def run(
    checkpoint: Path,
    data: Path | None,
    device_name: str | None,
    imports: Sequence[str],
    as_json: bool,
    *,
    level: str | None,
    size: int | None,
    split: str | None,
    task: str | None,
    stage: int | None,
    tokens: str | None,
    key_gate: bool,
    limit: int | None,
    batch: int | None,
    workers: int,
    views: int,
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
    device = resolve_device(device_name)
    folder = resolve(checkpoint)
    import_modules(imports)
    try:
        model = from_pretrained(folder, device)
    except ValueError as error:
        again = f"sparseflash evaluate {shlex.quote(str(checkpoint))}"
        raise told(_with_imports(error, folder), imports, again) from None
    over_pixels = model if isinstance(model, PixelTransformer) else None
    if tokens is not None and over_pixels is None:
        raise ValueError("--tokens is for models over pixels; this one is over symbols")
    if views != 1 and over_pixels is None:
        raise ValueError("--views is for models over pixels; symbols cannot be mirrored")
    gate = None
    if tokens == "all" and key_gate and over_pixels is not None and over_pixels.config.tokens != "all":
        model = over_pixels = over_pixels.over_all_pixels()
        gate = f"key gate: lit pixels do not see those up to grey {model.config.lit_above}; --no-key-gate: they do"
    if not 1 <= views <= SYMMETRIES:
        raise ValueError(f"--views must be 1 to {SYMMETRIES}; got {views}")
    if data is not None and over_pixels is not None:
        if task is not None or stage is not None:
            raise ValueError("--task and --stage name a fixed set; leave them out with --folder")
        trained = load_checkpoint(folder) if (folder / STATE).is_file() else None  # verifies
        its_stage = None if trained is None else image_files(trained.progress.current(trained.config))
        dataset, split = images_of(data, level, size, split, its_stage)
        found = _folder(dataset, limit, batch)
    else:
        if level is not None or size is not None:
            raise ValueError("--level and --size are for images in --folder; name a fixed set by --task and --stage")
        split = checked_split("test" if split is None else split, ("test", "val"))
        found = _fixed(checkpoint, folder, model.config, task, stage, data, split, tokens, limit, batch, workers)
    if over_pixels is not None:
        # Raises for a size that does not suit the pattern or the order, before any image is read.
        over_pixels.masks((found.size, found.size))
    tokens = found.tokens if tokens is None else tokens
    masks = [] if as_json else [*mask_lines(model.config, found.size, tokens), *([gate] if gate else [])]
    rule = "most frequent answer" if over_pixels is None else "marker-distance baseline"

    columns = (TextColumn("evaluating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("", total=found.count)
        score = evaluate(model, found.examples, device, lambda done: progress.advance(bar, done), tokens, views)
    outcome = Evaluation(folder, found.name, split, views, score, rule, found.baseline)
    if as_json:
        print(json.dumps(outcome.to_dict(), indent=2))
        return
    first, *rest = outcome.lines
    for line in (first, *masks, *rest):
        say(line)


def _with_imports(error: ValueError, folder: Path) -> ValueError:
    """Add the modules of the recipe to the error, because a model's config does not name them."""
    try:
        recipe = parse_json(read_text(folder / STATE))["config"]
    except (OSError, ValueError, KeyError, TypeError):
        return error
    return explained(error, "", named_imports(recipe))


def _folder(dataset: Dataset, limit: int | None, batch: int | None) -> _Set:
    if limit is not None:
        dataset = dataset.subset(slice(limit))
    images = stored_images(dataset, batch or max(1, TOKENS_AT_ONCE // dataset.size**2))
    baseline = folder_baseline(dataset.folder)
    return _Set(str(dataset.folder), dataset.size, len(dataset), images, baseline)


def _fixed(
    named: Path,
    folder: Path,
    model: ModelConfig,
    task: str | None,
    number: int | None,
    data: Path | None,
    split: str,
    tokens: str | None,
    limit: int | None,
    batch: int | None,
    workers: int,
) -> _Set:
    config, stage = _stage(named, folder, task, number, data)
    stage.check(model)
    count = limit or len(stage.splits.get(split, ()))
    tokens = tokens or stage.tokens
    few = (tokens or model.tokens) == "lit_pixels"
    at_once = (PIXELS_AT_ONCE if few else TOKENS_AT_ONCE) // stage.tokens_each
    examples = held_out(stage, count, split, batch or max(1, at_once), workers)
    return _Set(f"{config.task}: {stage}", stage.size, count, examples, stage_baseline(stage), tokens)


def _stage(
    named: Path, folder: Path, task: str | None, number: int | None, data: Path | None
) -> tuple[TrainConfig, AnyStage]:
    """The stage to evaluate on: of the task, or otherwise of the run of the checkpoint.

    Args:
        named: the run or the checkpoint, as the user named it.
        folder: the checkpoint.
        task: the option.
        number: the option for the number of the stage.
        data: the option.
    """
    reached = None
    if (folder / STATE).is_file():
        found = load_checkpoint(folder)  # verifies
        config, reached = found.config, found.progress.stage + 1
    elif task is None:
        raise ValueError(f"{folder} holds only weights: name their --task, or images by --folder")
    of_files = task is not None and reached is not None and image_files(config.stages[reached - 1]) is not None
    if task is not None and (reached is None or task != config.task or of_files):
        config, reached = recipe(task), None
    chosen = number or reached or len(config.stages)
    if chosen > len(config.stages):
        raise ValueError(f"--stage must be at most {len(config.stages)}, the stages of {config.task}; got {chosen}")
    stage = config.stages[chosen - 1]
    if data is not None:
        return config, reading(stage, data)
    return with_files(config, None, named), stage.noted()
