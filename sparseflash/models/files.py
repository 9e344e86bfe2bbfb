"""Model files: weights in safetensors, config in JSON, never pickle; each is complete or absent."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparseflash.foreign import read_text

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it.

    Raises:
        OSError: the disk refused, is full, or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); it is truncated or foreign") from None


def save_model(folder: Path, config_text: str, weights: Mapping[str, Tensor]) -> None:
    """Write weights and config into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    temporary = folder / f".{CONFIG}.{os.getpid()}"
    temporary.write_text(config_text)
    os.replace(temporary, folder / CONFIG)


def load_model(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Config text and weights from a folder that `save_model` wrote."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: it has no {name}")
    return read_text(folder / CONFIG), read_tensors(folder / WEIGHTS)
