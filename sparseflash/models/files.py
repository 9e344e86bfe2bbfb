"""Model files: weights in safetensors, config in JSON, never pickle, written atomically."""

import hashlib
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from sparseflash.patterns.atomic_write import temporary_beside, write_text
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import open_untrusted
from sparseflash.utils.untrusted import MOST_BYTES, parse_json, read_text

WEIGHTS = "model.safetensors"
CONFIG = "config.json"

Built = TypeVar("Built", bound=nn.Module)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file under a temporary name and rename it; it has the permissions of the umask.

    Raises:
        OSError: the disk is full, not writable, or failed.
    """
    temporary = temporary_beside(path)
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: Path, sha256: str | None = None, inside: Path | None = None) -> dict[str, Tensor]:
    """Read a safetensors file into memory, independent of later changes of the file.

    Args:
        path: the file.
        sha256: hexadecimal digest that the file must have; None: any.
        inside: a folder that links may not lead out of.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a complete safetensors file, or one with another digest.
    """
    with open_untrusted(path, inside) as (file, size):
        if _size_in_header(file) != size:
            raise ValueError(f"{path} is not a complete safetensors file; it is damaged, truncated or foreign")
        file.seek(0)
        content = file.read(size)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its checksum does not fit")
    try:
        return dict(load(content))
    except (SafetensorError, KeyError) as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({shown(error)}): damaged, truncated or foreign"
        ) from None


def _size_in_header(file: BinaryIO) -> int | None:
    """The size of a safetensors file according to its header; None without a header."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MOST_BYTES:
        return None
    try:
        entries = parse_json(file.read(length).decode())
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return None
    return 8 + length + max((end for end in ends if isinstance(end, int)), default=0)


def save_model(folder: Path, config_text: str, weights: Mapping[str, Tensor]) -> None:
    """Write weights and config into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, weights)
    write_text(folder / CONFIG, config_text)


def load_model(folder: Path) -> tuple[str, dict[str, Tensor]]:
    """Config text and weights from a folder that `save_model` wrote."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no model: it has no {name}")
    return read_text(folder / CONFIG), read_tensors(folder / WEIGHTS)


def check_weights(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ValueError unless the weights match a model, without allocating it.

    A config may describe a model that is larger than its weights, and than memory.
    """
    with torch.device("meta"):
        expected = make()
    wanted = {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        odd = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
        raise ValueError(
            f"the weights in {folder} are not of the model in its config.json: {odd!r} should be "
            f"{wanted.get(odd, 'absent')}; got {found.get(odd, 'nothing')}"
        )


def loaded(make: Callable[[], Built], weights: Mapping[str, Tensor], folder: Path) -> Built:
    """A model with the weights that `load_model` read together with its config.

    Args:
        make: makes the model.
        weights: weights of all parameters.
        folder: the folder, for the error message.

    Raises:
        ValueError: weights that do not match the model.
    """
    check_weights(make, weights, folder)
    model = make()
    model.load_state_dict(weights)
    return model
