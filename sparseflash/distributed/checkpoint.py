"""Sharded checkpoints: every rank writes its part, and any number of ranks can load the whole.

`torch.distributed.checkpoint` knows which part of which tensor each rank holds (DTensors of FSDP2, plain tensors of
DDP), and reads the parts that a rank of another mesh needs. Its safetensors storage is used, so nothing in the folder
is pickled. A folder holds

- ``shard-*.safetensors``: each rank's part of the weights (``model.*``) and of the optimizer's moments
  (``optimizer.*``);
- ``state.json``: the sizes of these files and the program's progress, such as its step and its position in the data.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from sparseflash.distributed.exchange import all_ranks_agree
from sparseflash.patterns.atomic_write import write_text
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import open_untrusted
from sparseflash.utils.untrusted import parse_json, read_text

FORMAT, VERSION, STATE = "sparseflash-distributed-checkpoint", 1, "state.json"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)

Number: TypeAlias = int | float | str


def save_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, **progress: Number
) -> None:
    """Save the weights and the optimizer of all ranks in one folder, completely or not at all.

    A collective of the default process group. All ranks must see the same file system.

    Args:
        folder: a path that does not exist yet.
        model: under DDP, FSDP2 or neither.
        optimizer: of the model's parameters. Its tensors are saved; options such as the learning rate are not.
        progress: numbers and strings to save with them, e.g. ``step=100``; those of rank 0 are saved.

    Raises:
        ValueError: the folder exists, or progress holds other values; on every rank, before anything is written.
    """
    path = Path(folder).absolute()
    temporary = path.with_name(f".{path.name}.part")
    first = dist.get_rank() == 0
    intent: str | Exception = f"save into {path}"
    if first and path.exists():
        intent = ValueError(f"{path} exists already: save into another folder, or remove it")
    for name, value in progress.items():
        if not isinstance(value, int | float | str):
            intent = ValueError(f"progress is made of numbers and texts, got {name}={value!r}")
    if first and temporary.is_symlink():
        intent = ValueError(f"{temporary} is a link, and nothing is written through links: remove it")
    _all_ranks_agree(model, ("save", str(path)), intent)
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
    save(_tensors(model, optimizer), storage_writer=writer)
    if first:
        sizes = {part.name: part.stat().st_size for part in sorted(temporary.glob("*.safetensors"))}
        state = {"format": FORMAT, "version": VERSION, "ranks": dist.get_world_size(), "files": sizes}
        write_text(temporary / STATE, json.dumps(state | {"progress": progress}, indent=2) + "\n")
        os.replace(temporary, path)
    dist.barrier()


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Number]:
    """Load a checkpoint of :func:`save_checkpoint` on any number of ranks, sharded in any way.

    A collective of the default process group.

    Args:
        folder: the checkpoint.
        model: the same model, under DDP, FSDP2 or neither; its weights are replaced.
        optimizer: of the same class, over the model's parameters; its tensors are replaced.

    Returns:
        The progress that was saved.

    Raises:
        FileNotFoundError: no such folder, or one of its files is missing.
        ValueError: foreign or truncated files, or tensors that do not match this model and optimizer. Nothing is
            changed.
    """
    path = Path(folder).absolute()
    intent: str | Exception = f"load {path}"
    progress: dict[str, Number] = {}
    tensors = _tensors(model, optimizer)
    reader = HuggingFaceStorageReader(str(path))
    try:
        progress = _progress(path)
        _check_names(path, reader, tensors)
    except (OSError, ValueError) as error:
        intent = error
    _all_ranks_agree(model, ("load", str(path), os.stat(path).st_mtime_ns if path.exists() else 0), intent)
    load(tensors, storage_reader=reader)
    parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    set_model_state_dict(model, parts["model"])
    options: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    set_optimizer_state_dict(model, optimizer, options | parts["optimizer"], options=_FLAT)
    return progress


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors by name. Creates the tensors of an optimizer that has made no step yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch uses its own deprecated functions
        state = get_optimizer_state_dict(model, optimizer, options=_FLAT)
    tensors: dict[str, Any] = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    tensors |= {f"optimizer.{name}": x for name, x in state.items() if isinstance(x, torch.Tensor)}
    return tensors


def _progress(path: Path) -> dict[str, Number]:
    if not (path / STATE).is_file():
        raise FileNotFoundError(f"{path} is not a distributed checkpoint: it has no {STATE}")
    try:
        state = parse_json(read_text(path / STATE))
        if state["format"] != FORMAT or state["version"] != VERSION:
            raise KeyError("format")
        files, progress = dict(state["files"]), dict(state["progress"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{path / STATE} is foreign or damaged: it describes no checkpoint of version {VERSION}"
        ) from None
    shards = {part.name for part in path.glob("*.safetensors")}
    if missing := sorted(files.keys() - shards):
        raise FileNotFoundError(f"{path} is incomplete: it has no {shown(missing[0])}")
    if unknown := sorted(shards - files.keys()):
        raise ValueError(f"{path / STATE} does not name {shown(unknown[0])}: the folder is foreign or damaged")
    if not shards:
        raise ValueError(f"{path} holds no shards (*.safetensors)")
    for name, size in files.items():
        with open_untrusted(path / name, inside=path) as (_, actual):
            if actual != size:
                raise ValueError(f"{shown(path / name)} is damaged: it has {actual} bytes instead of {size}")
    return progress


def _check_names(path: Path, reader: HuggingFaceStorageReader, tensors: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model before any tensor is loaded."""
    try:
        entries: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is foreign or damaged: {shown(error)}") from None
    saved = {name: tuple(entry.size) for name, entry in entries.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(saved.keys() | expected.keys()):
        if saved.get(name) != expected.get(name):
            raise ValueError(
                f"{path} is of another model or optimizer: it has {shown(name)} {saved.get(name, 'not at all')}, "
                f"here it is {expected.get(name, 'not')}"
            )


def _all_ranks_agree(model: nn.Module, key: tuple[object, ...], intent: str | Exception) -> None:
    device = next(model.parameters()).device
    group = dist.group.WORLD
    assert group is not None, "no process group: call torch.distributed.init_process_group"
    all_ranks_agree(group, device, key, intent)
