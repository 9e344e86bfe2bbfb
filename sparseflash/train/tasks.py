"""The tasks that ``sparseflash train`` knows by name, and the presets, one file each, in ``recipes/``.

A preset is TOML: fields of `TrainConfig`, a ``[model]`` with fields of `PixelTransformerConfig`, and a ``[[stages]]``
for each stage, whose images are named by ``size`` and ``length`` (in dashes): the published task where they are a
published one's and nothing else is said, else the dashes of the ``base`` task on that canvas. ``geometry`` changes
single fields of the images. Of a sequence task the ``[model]`` is a `SequenceTransformerConfig`, and a stage has fields
of `SequenceStage`, with a ``grammar`` where its trees are not the Arena's. ``import`` in ``[patterns]`` names the
modules that register patterns of one's own; nothing imports them by itself.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sparseflash.lra import TASKS as SEQUENCE_TASKS
from sparseflash.models import PixelTransformerConfig, config_from
from sparseflash.pathfinder import Geometry
from sparseflash.pathfinder.geometry import LEVELS, LRA_SIZES
from sparseflash.patterns.shown import shown_lines
from sparseflash.train.config import TrainConfig
from sparseflash.train.image_stage import Stage
from sparseflash.train.sequences import sequence_stage_from
from sparseflash.train.stage import AnyStage
from sparseflash.utils.imports import checked, explained
from sparseflash.utils.untrusted import check_field_types, read_toml

TASKS: Final = ("demo", "path32", "path64", "pathx", "path256", "listops", "text", "retrieval", "image")
FOLDER: Final = Path(__file__).parent / "recipes"
PRESETS: Final = tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))
_LENGTHS: Final = {length: level for level, (_, length) in LEVELS.items()}
_PIXELS: Final = {field.name for field in dataclasses.fields(PixelTransformerConfig)}
_OF_STAGES: Final = {"size", "length", "base"} | {field.name for field in dataclasses.fields(Stage)}


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
        UnknownPatternError: a pattern that nothing has registered.

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
    imports: Any = ()
    try:
        fields = read_toml(path)
        imports = _imports(fields.pop("patterns", {}))
        summary, cpu_batch = fields.pop("summary"), fields.pop("cpu_batch", None)
        if not isinstance(summary, str):
            raise ValueError(f"summary must be a text; got {summary!r}")
        model = config_from(fields.pop("model"))
        stages = tuple(_stage(fields["task"], stage) for stage in fields.pop("stages"))
        config = TrainConfig(model=model, stages=stages, imports=imports, **fields)
        if cpu_batch is not None:
            replace(config, batch=_whole("cpu_batch", cpu_batch))  # bounded as every batch is
    except (AttributeError, RecursionError, KeyError, TypeError, ValueError) as error:
        raise explained(ValueError(f"{path} is not a preset: {shown_lines(error)}"), "", imports) from None
    if config.task not in TASKS:
        raise ValueError(f"{path} is not a preset: task must be one of {', '.join(TASKS)}; got {config.task!r}")
    return Preset(summary, config, config.batch if cpu_batch is None else cpu_batch)


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    return value


def _stage(task: str, fields: Mapping[str, Any]) -> AnyStage:
    if task in SEQUENCE_TASKS:
        return sequence_stage_from({"task": task, **fields})
    if unknown := sorted(set(fields) - _OF_STAGES):
        raise ValueError(f"a stage has no field {', '.join(map(repr, unknown))}; known: {sorted(_OF_STAGES)}")
    changes = fields.get("geometry", {})
    if not {"size", "length", "base"} & set(fields):
        return Stage(**{**fields, "geometry": Geometry(**check_field_types(Geometry, fields["geometry"]))})
    size, length = fields["size"], fields["length"]
    if "base" not in fields and size in LRA_SIZES and length in _LENGTHS:
        geometry = Geometry.lra(size, _LENGTHS[length])
    else:
        geometry = Geometry.curriculum(size, length, fields.get("base", 256))
    if changes:
        geometry = replace(geometry, **changes)
    others = {name: value for name, value in fields.items() if name not in ("size", "length", "base", "geometry")}
    return Stage(geometry, **check_field_types(Stage, others))


def _imports(fields: Any) -> tuple[str, ...]:
    if not isinstance(fields, dict):
        raise ValueError(f"[patterns] is a table; got {fields!r}")
    if unknown := sorted(set(fields) - {"import"}):
        raise ValueError(f"[patterns] has no field {', '.join(map(repr, unknown))}; known: ['import']")
    return checked(fields.get("import", []))


def recipe(
    task: str,
    *,
    preset: str | Path | None = None,
    device: str = "cpu",
    pattern: str | None = None,
    folder: str | Path | None = None,
    level: str | None = None,
    split: str | None = None,
    **changes: Any,
) -> TrainConfig:
    """The config of a task, with changes.

    Args:
        task: one of `TASKS`.
        preset: one of `PRESETS` for this task, or a file; default the preset with the task's name.
        device: a CPU gets the preset's smaller batch, and fp32.
        pattern: textual form of another attention pattern, over pixels unless ``unit`` says otherwise.
        folder: where a task's files are: of a sequence task see `sparseflash.lra.open_corpus`; of a Pathfinder task the
            Long Range Arena release, or a folder in its layout, see `sparseflash.pathfinder.read`. Images of files are
            one stage, the task itself, in the place of the preset's curriculum.
        level: of the images in the folder: easy, intermediate or hard; by default hard, or what the folder is.
        split: of the images in the folder, ``"s4"`` or ``"contiguous"``; s4 by default where the level is hard.
        changes: other fields of `TrainConfig`, or of its model; None leaves a field as it is. Tokens "all" instead of a
            preset's lit pixels come with a ``key_gate``, unless that is False.

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
    if "dense_weight" in given:
        given.setdefault("dense_classes", 3 if given["dense_weight"] else 0)
    in_model = {field.name for field in dataclasses.fields(config.model)}
    if foreign := sorted((given.keys() & _PIXELS) - in_model):
        raise ValueError(f"the task {task} has no {', '.join(foreign)}: it is not a task over pixels")
    if pattern is not None and "unit" in in_model and config.model.tokens == "all":
        given.setdefault("unit", "pixel")
    if given.get("tokens") == "all" and config.model.tokens == "lit_pixels":
        given.setdefault("key_gate", True)  # what dark pixels need to be left out
    if folder is not None:
        given.setdefault("data", "fixed")
        given["stages"] = config.stages[-1].of_files(config.stages, Path(folder).resolve(), level, split)
    elif level is not None or split is not None:
        raise ValueError("level and split are of images in files: name their folder too")
    model = replace(config.model, **{name: value for name, value in given.items() if name in in_model})
    return replace(config, model=model, **{name: value for name, value in given.items() if name not in in_model})
