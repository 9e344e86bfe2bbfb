"""The metadata files of the Long Range Arena layout: one line per image, in order of creation.

Eleven columns: subfolder, file name, index in the batch, **label**, continuity, contour length, distractor length,
paddle length, thickness, this image's margin, number of paddle contrasts. In the release the files are plain text
despite their ``.npy`` suffix, separated by spaces; the original generator writes real NumPy arrays of strings.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from sparseflash.foreign import read_bytes
from sparseflash.pathfinder.geometry import Geometry
from sparseflash.patterns.shown import shown

_COLUMNS: Final = 4  # the reader needs these
_MAX_ROWS: Final = 1 << 20  # per file; the release has 1,000, and 200,000 images in all
_MAX_NAME: Final = 255  # characters of a subfolder or a file name


def metadata_row(geometry: Geometry, batch: int, i: int, label: int, margin: int) -> str:
    """One line of a metadata file."""
    columns: Iterable[object] = (
        f"imgs/{batch}",
        f"sample_{i}.png",
        i,
        label,
        geometry.continuity,
        geometry.contour_length,
        geometry.distractor_length,
        geometry.paddle_length,
        f"{geometry.paddle_thickness:g}",
        margin,
        1,
    )
    return " ".join(map(str, columns))


def metadata_files(folder: Path) -> list[Path]:
    """Metadata files by *integer* stem: 10 comes after 9."""
    files = [file for file in (folder / "metadata").glob("*.npy") if not file.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder / 'metadata'} holds no .npy files")
    strange = [file.name for file in files if not re.fullmatch(r"[0-9]+", file.stem)]
    if strange:
        raise ValueError(f"{folder / 'metadata'}: names must be whole numbers, found {first_few(strange)}")
    return sorted(files, key=lambda file: int(file.stem))


def read_rows(file: Path, inside: Path | None = None) -> list[tuple[str, str, int]]:
    """(subfolder, file name, label) of each image in a metadata file. Links may not lead out of ``inside``."""
    data = read_bytes(file, inside=inside)
    try:
        if data.startswith(b"\x93NUMPY"):
            _check_array(data)
            table = np.load(io.BytesIO(data), allow_pickle=False)
            lines = [[c.decode() if isinstance(c, bytes) else str(c) for c in row] for row in table.tolist()]
        else:
            if data.count(b"\n") > _MAX_ROWS:
                raise ValueError(f"more than {_MAX_ROWS:,} lines")
            lines = [line.split(None, _COLUMNS) for line in data.decode().split("\n") if line.strip()]
    except Exception as error:  # NumPy's header parser raises many types: TokenError, TypeError, ...
        raise ValueError(f"{file}: neither text nor a plain NumPy array ({shown(error)})") from error
    return [_row(file, number, line) for number, line in enumerate(lines, 1)]


def _check_array(data: bytes) -> None:
    """Raise ValueError unless a NumPy file is a table of strings, as large as its header says.

    NumPy allocates what the header says before it checks the length of the file.
    """
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ValueError(f"a NumPy file of version {version}")
    shape, _, dtype = read_header[version](stream)
    if len(shape) != 2 or dtype.kind not in "SU" or not dtype.itemsize:
        raise ValueError(f"an array {shape} of {dtype}, expected rows and columns of strings")
    if shape[0] > _MAX_ROWS:
        raise ValueError(f"an array of {shape[0]:,} rows, more than {_MAX_ROWS:,}")
    if prod(shape) * dtype.itemsize != len(data) - stream.tell():
        raise ValueError(f"an array {shape} of {dtype} in a file of {len(data):,} bytes")


def _row(file: Path, number: int, line: list[str]) -> tuple[str, str, int]:
    where = f"{file}, row {number}"
    if len(line) < _COLUMNS:
        raise ValueError(f"{where}: expected 11 columns, got {len(line)}")
    sub, name, label = line[0], line[1], line[3]
    if max(len(sub), len(name)) > _MAX_NAME:
        raise ValueError(f"{where}: a name of {max(len(sub), len(name)):,} characters, more than {_MAX_NAME}")
    path = PurePosixPath(sub, name)
    plain = not path.is_absolute() and ".." not in path.parts and "/" not in name and name not in ("", ".")
    if not plain or any(c in sub + name for c in "\\:\0"):
        raise ValueError(f"{where}: {sub!r} {name!r} is not a path inside the folder")
    if label not in ("0", "1"):
        raise ValueError(f"{where}: the label must be 0 or 1, got {label[:20]!r}")
    return PurePosixPath(sub).as_posix(), name, int(label)


def first_few(names: Sequence[str]) -> str:
    """The first few of many names, for a message."""
    return ", ".join(map(shown, names[:3])) + (", ..." if len(names) > 3 else "")
