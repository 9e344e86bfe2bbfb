"""The tasks that ``sparseflash train`` knows by name, and the presets, one file each, in ``recipes/``.

A preset is TOML: fields of `TrainConfig`, a ``[model]`` with fields of `PixelTransformerConfig`, and a ``[[stages]]``
for each stage, whose images are named by ``size`` and ``length`` (in dashes): the published task where they are a
published one's and nothing else is said, else the dashes of the ``base`` task on that canvas. ``geometry`` changes
single fields of the images.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sparseflash.foreign import read_text
from sparseflash.models.config import PixelTransformerConfig
from sparseflash.pathfinder import Geometry
from sparseflash.pathfinder.geometry import LEVELS, LRA_SIZES
from sparseflash.train.config import Stage, TrainConfig

TASKS: Final = ("demo", "path32", "path64", "pathx", "path256")
FOLDER: Final = Path(__file__).parent / "recipes"
PRESETS: Final = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
_LENGTHS: Final = {length: level for level, (_, length) in LEVELS.items()}
_OF_STAGES: Final = {"size", "length", "base", "match_distance", "tokens", "baseline", "geometry"}


@dataclass(frozen=True)
class Preset:
    """A recipe with a name.

    Attributes:
        summary: a line for people.
        config: the recipe.
        cpu_batch: batch size when the device is a CPU.
    """

    summary: str
    config: TrainConfig
    cpu_batch: int


def load_preset(name: str | Path) -> Preset:
    """A preset by its name, or from a file of your own that ends in ``.toml``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unknown name, no TOML, or fields that are missing, unknown or out of range.

    Example:
        >>> load_preset("demo").config.stages[-1].geometry.size
        24
    """
    path = Path(name)
    if path.suffix != ".toml":
        if str(name) not in PRESETS:
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, or a .toml file; got {str(name)!r}")
        path = FOLDER / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        fields = tomllib.loads(read_text(path))
        summary, cpu_batch = fields.pop("summary"), fields.pop("cpu_batch", None)
        model = PixelTransformerConfig.from_dict(fields.pop("model"))
        stages = tuple(_stage(stage) for stage in fields.pop("stages"))
        config = TrainConfig(model=model, stages=stages, **fields)
    except (RecursionError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no preset: {error}") from None
    if config.task not in TASKS:
        raise ValueError(f"{path} is no preset: task must be one of {', '.join(TASKS)}; got {config.task!r}")
    return Preset(summary, config, cpu_batch or config.batch)


def _stage(fields: Mapping[str, Any]) -> Stage:
    if unknown := sorted(set(fields) - _OF_STAGES):
        raise ValueError(f"a stage has no field {', '.join(map(repr, unknown))}; known: {sorted(_OF_STAGES)}")
    size, length, changes = fields["size"], fields["length"], fields.get("geometry", {})
    if "base" not in fields and size in LRA_SIZES and length in _LENGTHS:
        geometry = Geometry.lra(size, _LENGTHS[length])
    else:
        geometry = Geometry.curriculum(size, length, fields.get("base", 256))
    if changes:
        geometry = replace(geometry, **changes)
    return Stage(
        geometry, **{name: fields[name] for name in ("match_distance", "tokens", "baseline") if name in fields}
    )


def recipe(
    task: str, *, preset: str | Path | None = None, device: str = "cpu", pattern: str | None = None, **changes: Any
) -> TrainConfig:
    """The config of a task, with changes.

    Args:
        task: one of `TASKS`.
        preset: one of `PRESETS` for this task, or a file; default the preset with the task's name.
        device: a CPU gets the preset's smaller batch, and fp32.
        pattern: textual form of another attention pattern, over pixels unless ``unit`` says otherwise.
        changes: other fields of `TrainConfig`, or of its model; None leaves a field as it is.

    Raises:
        ValueError: an unknown task or preset, one of another task, or a value out of range.

    Example:
        >>> recipe("path256", pattern="local(512)", lr=2e-3).model.pattern
        'local(512)'
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}; got {task!r}")
    found = load_preset(task if preset is None else preset)
    config = found.config
    if config.task != task:
        raise ValueError(f"preset {str(preset)!r} is for the task {config.task}; got {task!r}")
    if device.startswith("cpu"):
        config = replace(config, batch=found.cpu_batch, precision="fp32")
    given = {name: value for name, value in {"pattern": pattern, **changes}.items() if value is not None}
    in_model = {field.name for field in dataclasses.fields(PixelTransformerConfig)}
    if given.get("dense_weight") == 0:
        given.setdefault("dense_classes", 0)
    elif "dense_weight" in given:
        given.setdefault("dense_classes", 3)
    if pattern is not None and config.model.tokens == "all":
        given.setdefault("unit", "pixel")
    model = replace(config.model, **{name: value for name, value in given.items() if name in in_model})
    return replace(config, model=model, **{name: value for name, value in given.items() if name not in in_model})
