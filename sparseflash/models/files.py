"""Model files: weights in safetensors, config in JSON, never pickle; each is complete or absent."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparseflash.foreign import read_text

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

Built = TypeVar("Built", bound=nn.Module)


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


def _check_weights(expected: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"the weights in {folder} are not of the model in its config.json: {odd!r} should be "
            f"{wanted.get(odd, 'absent')}; got {found.get(odd, 'nothing')}"
        )


def loaded(make: Callable[[], Built], weights: Mapping[str, Tensor], folder: Path) -> Built:
    """A model with the weights that `load_model` read beside its config.

    Args:
        make: makes the model.
        weights: of all its parameters.
        folder: for the message.

    Raises:
        ValueError: weights that are not of this model.
    """
    with torch.device("meta"):  # a config may promise more than the file holds, and than there is memory
        _check_weights(make(), weights, folder)
    model = make()
    model.load_state_dict(weights)
    return model
