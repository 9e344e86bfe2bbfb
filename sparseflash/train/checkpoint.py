"""Checkpoints: safetensors and JSON, written atomically, verified when loaded.

A run folder holds ``checkpoints/step-00000120/`` with

- ``model.safetensors`` and ``config.json``, for the model's `from_pretrained`;
- ``optimizer.safetensors``: AdamW's moments, the random number generators and, if the model is a moving average, the
  weights that it averages;
- ``state.json``: step, place in the curriculum, training config, batches of a global batch, a SHA-256 of each of the
  other files and of itself.

A folder gets its name when all of it is on disk, and loses it before any of it is removed. So a process may be killed
at any time, and a folder with this name is complete. Names that begin with a dot are leftovers of killed processes.
Any number of processes can resume from a checkpoint, see `Processes.check`.
"""

import hashlib
import json
import os
import re
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparseflash.models import Model
from sparseflash.models.files import CONFIG, WEIGHTS, read_tensors, save_model, write_tensors
from sparseflash.patterns.atomic_write import (
    check_no_links,
    make_folder,
    new_folder_beside,
    remove_tree,
    temporary_beside,
    write_text,
)
from sparseflash.patterns.shown import shown, shown_lines
from sparseflash.train.config import MOST_BATCH, TrainConfig
from sparseflash.train.curriculum import Progress
from sparseflash.utils.imports import UnknownPatternError, explained, named
from sparseflash.utils.untrusted import check_field_types, parse_json, read_bytes, read_text

FORMAT = "sparseflash-checkpoint"
VERSION = 2
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
RAW = "weights/"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, on the CPU.

    ``shards``: batches of a global batch, see `DataShard`; None in checkpoints of older versions.
    """

    path: Path
    step: int
    progress: Progress
    config: TrainConfig
    shards: int | None
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first.

    Raises:
        ValueError: one of them, or the folder that holds them, is a link.
    """
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_step_of)
    for path in found:
        check_no_links(path, run)
    return found


def save_checkpoint(
    run: Path,
    step: int,
    progress: Progress,
    config: TrainConfig,
    model: Model,
    optimizer: torch.optim.Optimizer,
    averaged: nn.Module | None = None,
    keep: int = 3,
    shards: int = 1,
) -> Path:
    """Write a checkpoint under a temporary name, rename it, and remove all but the ``keep`` newest.

    Args:
        run: the run folder.
        step: steps done.
        progress: the position in the curriculum.
        config: the recipe.
        model: the trained model.
        optimizer: its optimizer, with moments.
        averaged: the moving average of the model, which users load; None without one.
        keep: number of checkpoints to keep.
        shards: batches of a global batch.

    Returns:
        The checkpoint's folder.
    """
    final = run / "checkpoints" / f"step-{step:08d}"
    if final.exists() and is_whole(final):
        # The step names a checkpoint and determines its content.
        return final
    temporary = new_folder_beside(make_folder(final.parent, run) / final.name)
    try:
        shown = model if averaged is None else averaged
        save_model(temporary, model.config.to_json(), shown.state_dict())
        raw = {} if averaged is None else {f"{RAW}{name}": value for name, value in model.state_dict().items()}
        write_tensors(temporary / OPTIMIZER, raw | _optimizer_tensors(model, optimizer))
        state: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "step": step,
            "progress": asdict(progress),
            "config": config.to_dict(),
            "streams": shards,
            "sha256": {name: _sha256(temporary / name) for name in (WEIGHTS, CONFIG, OPTIMIZER)},
        }
        state["sha256"][STATE] = _digest(state)
        write_text(temporary / STATE, json.dumps(state, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            flush_to_disk(path)
        remove(final)  # a damaged one that training has passed again
        os.replace(temporary, final)
        flush_to_disk(final.parent)
    finally:
        remove_tree(temporary)
    older = [path for path in checkpoints(run) if _step_of(path) < step]
    for path in older[: max(0, len(older) - keep + 1)]:
        remove(path)
    remove_nameless(final.parent)
    return final


def latest_checkpoint(run: Path) -> Checkpoint:
    """The newest complete checkpoint of a run; a warning names damaged ones.

    Raises:
        FileNotFoundError: there is none.
        ValueError: all are damaged.
        UnknownPatternError: its pattern is the user's own and is not registered.
    """
    found = checkpoints(run)
    problems: list[Exception] = []
    for path in reversed(found):
        try:
            checkpoint = load_checkpoint(path)
        except UnknownPatternError:  # not damaged: the user's own code is missing
            raise
        except (OSError, ValueError) as error:
            problems.append(error)
            continue
        for problem in problems:
            warnings.warn(f"{problem}; going on from {path.name}, which is whole", stacklevel=1)
        return checkpoint
    if problems:
        raise ValueError(f"{run} has no checkpoint that is whole: {problems[0]}")
    return load_checkpoint(run)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a checkpoint.

    Args:
        path: a checkpoint's folder, or a run folder, for its latest checkpoint.

    Raises:
        FileNotFoundError: there is none, or one of its files is missing.
        ValueError: foreign, truncated or altered files.
        UnknownPatternError: a pattern of the user's own that is not registered.
    """
    path = resolve(path)
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"{path} is not a training checkpoint: it has no {STATE}")
    try:
        state = parse_json(read_text(path / STATE, inside=path))
        if state["format"] != FORMAT:
            raise KeyError("format")
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path / STATE} is foreign or damaged: it does not describe a checkpoint") from None
    if state.get("version") != VERSION:
        raise ValueError(f"{path} has checkpoint version {state.get('version')!r}; this library reads {VERSION}")
    sums = state.get("sha256", {})
    if not isinstance(sums, dict) or sums.pop(STATE, None) != _digest(state):
        raise ValueError(f"{path / STATE} was altered or damaged: its checksum does not fit")
    for name in (WEIGHTS, CONFIG, OPTIMIZER):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} is incomplete: it has no {name}")
    content = read_bytes(path / CONFIG, inside=path)
    if hashlib.sha256(content).hexdigest() != sums.get(CONFIG):
        raise ValueError(f"{path / CONFIG} is damaged: its checksum does not fit")
    text = content.decode(errors="replace")
    recipe = state.get("config", {})
    try:
        config = TrainConfig.from_dict(recipe)
    except ValueError as error:
        raise explained(error, path, named(recipe)) from None
    step, place, shards = state.get("step"), state.get("progress"), state.get("streams")
    counts = {"stage": None, "since": None, "images": None, "evaluated": 0, "best_step": 0, "waited": 0}
    numbers = [step, *({**counts, **place}[name] for name in counts)] if isinstance(place, dict) else []
    try:
        progress = Progress(**check_field_types(Progress, place))
        if not all(type(number) is int and number >= 0 for number in numbers) or progress.stage >= len(config.stages):
            raise ValueError(f"step {step!r}, {progress}")
        if shards is not None and not (type(shards) is int and 0 < shards <= MOST_BATCH):
            raise ValueError(f"streams {shards!r}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path / STATE} does not tell the place in the curriculum: {shown(error)}") from None
    if _NAME.fullmatch(path.name) and _step_of(path) != step:
        raise ValueError(f"{path} was renamed: it is the checkpoint of step {step}")
    if type(config.model).from_json(text) != config.model:
        raise ValueError(f"{path / CONFIG} and the model described in {STATE} differ")
    weights, optimizer = (read_tensors(path / name, sums.get(name), inside=path) for name in (WEIGHTS, OPTIMIZER))
    return Checkpoint(path, step, progress, config, shards, weights, optimizer)


def resolve(path: Path) -> Path:
    """The folder with model files for a path: the path itself, or the latest checkpoint of a run folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    if (path / WEIGHTS).is_file() or (path / STATE).is_file():
        return path
    if found := checkpoints(path):
        return found[-1]
    if not path.exists():
        raise FileNotFoundError(f"no folder {path}")
    raise FileNotFoundError(
        f"{path} is neither a checkpoint nor a run: it has no {WEIGHTS} and no checkpoints/step-* folder"
    )


def restore(
    checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, averaged: nn.Module | None = None
) -> None:
    """Restore weights, optimizer state, random number generators and the moving average of the weights.

    Raises:
        ValueError: tensors that are not of this model.
    """
    tensors = dict(checkpoint.optimizer)
    torch.set_rng_state(tensors.pop("rng.cpu", torch.get_rng_state()))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for name, parameter in model.named_parameters():
        names = {key: f"{name}/{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
        moments = {key: tensors.pop(full, None) for key, full in names.items()}
        for key, moment in moments.items():
            if moment is None or moment.shape != (() if key == "step" else parameter.shape):
                raise ValueError(f"{checkpoint.path / OPTIMIZER} is not of this model: {names[key]!r} does not fit")
        optimizer.state[parameter] = {
            key: moment if key == "step" else moment.to(parameter.device)
            for key, moment in moments.items()
            if moment is not None
        }
    raw = {name.removeprefix(RAW): tensors.pop(name) for name in list(tensors) if name.startswith(RAW)}
    if tensors:
        raise ValueError(f"{checkpoint.path / OPTIMIZER} is not of this model: it also holds {sorted(tensors)[0]!r}")
    try:
        if averaged is not None:
            averaged.load_state_dict(checkpoint.weights)
        model.load_state_dict(checkpoint.weights if averaged is None else raw)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint.path / WEIGHTS} is not of this model: {shown_lines(error)}") from None


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of a state without its own checksum."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except (OSError, ValueError):
        return False
    return True


def remove(path: Path) -> None:
    """Rename a checkpoint, then remove it."""
    if path.is_symlink() or path.exists():
        nameless = temporary_beside(path)
        os.replace(path, nameless)
        remove_tree(nameless)


def remove_nameless(folder: Path) -> None:
    """Remove the leftovers of killed processes from a folder of checkpoints, as far as possible."""
    for path in folder.glob(".step-*"):
        with suppress(OSError):
            remove_tree(path)


def flush_to_disk(path: Path) -> None:
    """A file's content, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
