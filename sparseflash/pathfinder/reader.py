"""Reads the Long Range Arena layout: the release itself, and what ``write`` makes."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseflash.foreign import read_bytes
from sparseflash.pathfinder.folders import HARD, SIZED, level_folder
from sparseflash.pathfinder.geometry import SIZES
from sparseflash.pathfinder.metadata import first_few, metadata_files, read_rows
from sparseflash.pathfinder.strokes import Bytes, Ints
from sparseflash.patterns.progress import track
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import check_inside, open_untrusted

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_END: Final = b"\0\0\0\0IEND\xaeB\x60\x82"
_MAX_SIDE: Final = SIZES[-1]
_MAX_IMAGES: Final = 1 << 20  # the release has 200,000 per level
_MAX_SUBFOLDERS: Final = 1 << 16  # the release has 200 per level
_MODES: Final = ("1", "L", "LA", "P", "RGB", "RGBA")


class Splits(NamedTuple):
    """Three disjoint parts of a data set."""

    train: Dataset
    val: Dataset
    test: Dataset


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Images on disk, decoded on access: ``len``, and ``dataset[i] -> (uint8 [H, H], label)``.

    Attributes:
        folder: the level folder.
        size: side H of every image.
        files: their paths inside the folder, in file order.
        labels: int64 [n], 0 or 1.
        dropped: paths of the zero-length images that were left out.
    """

    folder: Path
    size: int
    files: tuple[str, ...]
    labels: Ints
    dropped: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Bytes, int]:
        """Image uint8 [H, H] and label of one index.

        Raises:
            IndexError: out of range.
            FileNotFoundError, ValueError: the file is missing, truncated, or not a PNG of the right size.
        """
        return self._decode(self.files[index]), int(self.labels[index])

    def digest(self) -> str:
        """SHA-256 of the names, labels and sizes in bytes of all files, in order. Equal for copies on other machines.

        Raises:
            FileNotFoundError: a file is missing.
        """
        sizes = _file_sizes(self.folder, {str(PurePosixPath(name).parent) for name in self.files})
        digest = hashlib.sha256()
        for name, label in zip(self.files, self.labels.tolist(), strict=True):
            if name not in sizes:
                raise FileNotFoundError(f"no file {shown(self.folder / name)}")
            digest.update(f"{name} {label} {sizes[name]}\n".encode())
        return digest.hexdigest()

    def subset(self, indices: Sequence[int] | Ints | slice) -> Dataset:
        """The images of ``indices``, in their order."""
        order = np.arange(len(self))[indices]
        files = tuple(self.files[i] for i in order.tolist())
        return Dataset(self.folder, self.size, files, self.labels[order], self.dropped)

    def split(self, name: str = "s4") -> Splits:
        """Train, validation and test parts, about 80, 10 and 10 %.

        Args:
            name: ``"s4"``, the split of S4 and its successors: ``torch.randperm`` with seed 42, cut into train, val and
                test, with int(0.1 n) images in each of the last two; defined for the hard level only.
                ``"contiguous"``: the first 80 %, the next 10 %, the rest. (The split of TensorFlow Datasets follows the
                hashed order of its builder, which the files do not contain. "contiguous" is a different split.)

        Raises:
            ValueError: unknown name, or s4 on another level.
        """
        n = len(self)
        if name == "contiguous":
            cuts = n * 8 // 10, n * 9 // 10
            order = np.arange(n)
        elif name == "s4":
            if self.folder.name != HARD:
                raise ValueError(f'the s4 split is of {HARD} alone, this is {self.folder.name}; use "contiguous"')
            import torch

            part = int(0.1 * n)
            cuts = n - 2 * part, n - part
            order = torch.randperm(n, generator=torch.Generator().manual_seed(42)).numpy()
        else:
            raise ValueError(f'split must be "s4" or "contiguous", got {name!r}')
        return Splits(*(self.subset(part) for part in np.split(order, cuts)))

    def _decode(self, name: str) -> Bytes:
        from PIL import Image

        path = self.folder / name
        data = read_bytes(path, inside=self.folder)
        problem = _header_problem(data[:33], self.size)
        if problem:
            raise ValueError(f"{shown(path)}: {problem}")
        if not data.endswith(_END):
            raise ValueError(f"{shown(path)}: a truncated PNG")
        try:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
                # A second header may contradict the first one, which was checked.
                if picture.size != (self.size, self.size) or picture.mode not in _MODES:
                    raise ValueError(f"{picture.size} pixels of mode {picture.mode}")
                return np.asarray(picture.convert("L"))
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,
        ) as error:
            raise ValueError(f"{shown(path)}: a damaged PNG ({shown(error)})") from error


def read(
    path: str | os.PathLike[str], level: str | None = None, *, size: int | None = None, verify: bool = True
) -> Dataset:
    """Open a Pathfinder folder in the layout of the Long Range Arena release (Tay et al. 2021).

    ``path`` may be the unpacked archive, its inner ``lra_release``, a ``pathfinder{H}`` or a level folder. If the
    archive holds two copies of a size, the inner one is read; copies are never merged. Metadata may be plain text (the
    release) or NumPy arrays (the original generator); nothing is ever unpickled. Zero-length images (the release has
    one) are dropped before any split, with a warning that names them.

    Args:
        path: an existing folder.
        level: easy, intermediate, hard or the name of a level folder. Default: the level of ``path``, else hard.
        size: which ``pathfinder{H}``; required if there are several.
        verify: check the start and the end of every image now; otherwise damage is found when an image is read.

    Returns:
        A :class:`Dataset`.

    Raises:
        FileNotFoundError: no such folder, or missing images; the message names the first ones and counts all.
        ValueError: no data, a packed archive, damaged metadata or images (the message names the first ones and counts
            all), images of another size, names that lead out of the folder, or an ambiguous ``size``.

    Example:
        >>> import tempfile
        >>> from sparseflash import pathfinder
        >>> with tempfile.TemporaryDirectory() as out:
        ...     report = pathfinder.write(out, 32, 20, progress=False)
        ...     train, val, test = pathfinder.read(out).split("s4")
        >>> len(train), len(val), len(test)
        (16, 2, 2)
    """
    folder = level_folder(path, level, size)
    rows: list[tuple[str, str, int]] = []
    for file in metadata_files(folder):
        rows += read_rows(file, inside=folder)
        if len(rows) > _MAX_IMAGES:
            raise ValueError(f"{folder}: the metadata files name more than {_MAX_IMAGES:,} images")
    if not rows:
        raise ValueError(f"{folder}: the metadata files name no images")
    sizes = _file_sizes(folder, {sub for sub, _, _ in rows})
    names = [f"{sub}/{name}" for sub, name, _ in rows]
    _raise_if_any(FileNotFoundError, folder, [name for name in names if name not in sizes], "missing", len(names))
    dropped = tuple(name for name in names if not sizes[name])
    if dropped:
        warnings.warn(f"{folder}: dropped {len(dropped)} empty image(s): {first_few(dropped)}", stacklevel=2)
    kept = [(name, label) for name, (_, _, label) in zip(names, rows, strict=True) if sizes[name]]
    if not kept:
        raise ValueError(f"{folder}: all {len(names)} images are empty")
    side = _side(folder, kept[0][0])
    if size not in (None, side):
        raise ValueError(f"{folder} holds images of {side} pixels a side, not of size={size}")
    if verify:
        indices = track(range(len(kept)), f"checking {folder.name}")
        damaged = [kept[i][0] for i in indices if _damaged(folder / kept[i][0], side)]
        _raise_if_any(ValueError, folder, damaged, f"damaged, truncated or not {side} pixels square", len(names))
    return Dataset(
        folder, side, tuple(name for name, _ in kept), np.array([label for _, label in kept], np.int64), dropped
    )


def to_tokens(images: Bytes) -> Bytes:
    """Images uint8 [..., H, H] as token sequences uint8 [..., H * H]: row-major, the raw bytes 0..255."""
    return images.reshape(*images.shape[:-2], -1)


def to_floats(images: Bytes, *, center: bool = False) -> NDArray[np.float32]:
    """Images as float32 of the same shape: x / 255, or (x / 255 - 1/2) / (1/2) with ``center``.

    The S4 code's loader class centres by default, but its Pathfinder configurations set ``center: False``.
    """
    floats: NDArray[np.float32] = images.astype(np.float32) / np.float32(255)
    if center:
        floats = (floats - np.float32(0.5)) / np.float32(0.5)
    return floats


def _file_sizes(folder: Path, subfolders: set[str]) -> dict[str, int]:
    """Path and size of the regular files in the subfolders.

    Raises:
        ValueError: too many subfolders, or a link that leads out of the folder.
    """
    if len(subfolders) > _MAX_SUBFOLDERS:
        raise ValueError(f"{folder}: images in {len(subfolders):,} subfolders, more than {_MAX_SUBFOLDERS:,}")
    sizes: dict[str, int] = {}
    for sub in sorted(subfolders):
        place = folder / sub
        check_inside(place, folder)
        if not place.is_dir():
            continue
        with os.scandir(place) as entries:
            for entry in entries:
                if entry.is_symlink():
                    check_inside(Path(entry.path), folder)
                if entry.is_file():
                    sizes[f"{sub}/{entry.name}"] = entry.stat().st_size
    return sizes


def _side(folder: Path, first: str) -> int:
    """H, from the name of the parent folder, or else from the first image."""
    match = SIZED.fullmatch(folder.parent.name)
    with open_untrusted(folder / first, inside=folder) as (file, _):
        head = file.read(33)
    side = int(match[1]) if match else int.from_bytes(head[16:20], "big")
    problem = None if 1 <= side <= _MAX_SIDE else f"a side of {side} pixels, more than {_MAX_SIDE}"
    problem = problem or (None if match else _header_problem(head, side))
    if problem:
        raise ValueError(f"{shown(folder / first)}: {problem}")
    return side


def _header_problem(head: bytes, side: int) -> str | None:
    """What is wrong with the first 33 bytes of a PNG of ``side`` pixels; sizes are checked before any decoding."""
    if len(head) < 33 or not head.startswith(_PNG) or head[12:16] != b"IHDR":
        return "not a PNG, or truncated"
    width, height = struct.unpack(">II", head[16:24])
    return None if (width, height) == (side, side) else f"{width} x {height} pixels, expected {side} x {side}"


def _damaged(path: Path, side: int) -> bool:
    with open_untrusted(path) as (file, size):  # _file_sizes has checked that it is inside the folder
        if _header_problem(file.read(33), side):
            return True
        file.seek(-min(12, size), os.SEEK_END)
        return file.read() != _END


def _raise_if_any(kind: type[Exception], folder: Path, names: Sequence[str], what: str, total: int) -> None:
    if names:
        raise kind(f"{folder}: {len(names)} of {total} images {what}: {first_few(names)}")
