"""The tasks that ``sparseflash train`` knows by name, and a sound recipe for each."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Final

from sparseflash.models.config import PixelTransformerConfig
from sparseflash.pathfinder import Geometry
from sparseflash.train.config import Stage, TrainConfig


@dataclass(frozen=True)
class Task:
    """A named recipe.

    Attributes:
        summary: a line for people.
        config: the recipe.
        cpu_batch: batch size when the device is a CPU.
    """

    summary: str
    config: TrainConfig
    cpu_batch: int


def _pathfinder(name: str, size: int, pattern: str, batch: int, cpu_batch: int) -> Task:
    config = TrainConfig(
        task=name,
        model=PixelTransformerConfig(pattern=pattern),
        stages=(Stage(Geometry.lra(size)),),
        schedule_steps=20_000,
        batch=batch,
        warmup=200,
    )
    return Task(f"the {size} x {size} task of the Long Range Arena, {size * size:,} tokens", config, cpu_batch)


def _demo() -> Task:
    # Small enough that all pixels can be tokens and two cores still see ten thousand images in minutes.
    geometry = replace(
        Geometry.curriculum(64, 3),
        size=24,
        contour_length=2,
        paddle_length=3,
        paddle_margins=(1,),
        paddle_thickness=1.0,
        seed_distance=4,
        marker_radius=1.5,
        num_distractors=0,
    )
    # Six tiles of 16 tokens a row: 112 tokens reach every neighbouring tile.
    model = PixelTransformerConfig(
        pattern="local(112)",
        block=(64, 64),
        order="tile",
        tile=(4, 4),
        width=32,
        heads=1,
        layers=3,
        mlp_width=64,
        dense_classes=3,
        wavelengths=(3.0, 40.0),
    )
    config = TrainConfig(
        task="demo",
        model=model,
        stages=(Stage(geometry, match_distance=True),),
        schedule_steps=1_000,
        batch=8,
        lr=4e-3,
        warmup=100,
        dense_weight=1.0,
    )
    return Task("two short contours on 24 x 24 pixels, with a dense loss: minutes on two cores", config, 8)


TASKS: Final[dict[str, Task]] = {
    "demo": _demo(),
    "path32": _pathfinder("path32", 32, "full()", 64, 32),
    "path64": _pathfinder("path64", 64, "local(512) | butterfly(unit=128)", 64, 8),
    "pathx": _pathfinder("pathx", 128, "local(512) | butterfly(unit=128)", 32, 4),
    "path256": _pathfinder("path256", 256, "local(512) | butterfly(unit=256)", 16, 1),
}


def recipe(task: str, *, device: str = "cpu", pattern: str | None = None, **changes: Any) -> TrainConfig:
    """The config of a named task, with changes.

    Args:
        task: one of `TASKS`.
        device: a CPU gets the task's smaller batch.
        pattern: textual form of another attention pattern.
        changes: other fields of `TrainConfig`, or of its model; None leaves a field as it is.

    Raises:
        ValueError: an unknown task, or a value out of range.

    Example:
        >>> recipe("path256", pattern="local(512)", lr=2e-3).model.pattern
        'local(512)'
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}; got {task!r}")
    config = TASKS[task].config
    if device.startswith("cpu"):
        config = replace(config, batch=TASKS[task].cpu_batch)
    given = {name: value for name, value in {"pattern": pattern, **changes}.items() if value is not None}
    in_model = {field.name for field in dataclasses.fields(PixelTransformerConfig)}
    if given.get("dense_weight") == 0:
        given.setdefault("dense_classes", 0)
    elif "dense_weight" in given:
        given.setdefault("dense_classes", 3)
    model = replace(config.model, **{name: value for name, value in given.items() if name in in_model})
    return replace(config, model=model, **{name: value for name, value in given.items() if name not in in_model})
