"""Model files: weights in safetensors, config in JSON, never pickle; each is complete or absent."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)
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
    try:
        text = (folder / CONFIG).read_text()
    except UnicodeDecodeError:
        raise ValueError(f"{folder / CONFIG} is not a text file") from None
    return text, read_tensors(folder / WEIGHTS)


def load_into(model: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Give a model the weights that `load_model` read beside its config.

    Raises:
        ValueError: weights that are not of this model.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != found:
        odd = sorted(set(expected.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"the weights in {folder} are not of the model in its config.json: {odd!r} should be "
            f"{expected.get(odd, 'absent')}; got {found.get(odd, 'nothing')}"
        )
    model.load_state_dict(weights)
