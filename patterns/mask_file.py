"""Block masks as files: safetensors, nothing executable, checked before use."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.atomic_write import atomic_write
from sparseflash.patterns.grid import make_grid
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.runs import FIRST_TILE, FULL, Runs
from sparseflash.patterns.shown import shown
from sparseflash.patterns.tiles import words_per_row
from sparseflash.patterns.untrusted import open_untrusted

FORMAT = "sparseflash.BlockMask/1"
ARRAYS = {"start": "<i8", "stop": "<i8", "letter": "<i4", "tiles": "<u4", "pattern_of": "<i4"}
MAX_HEADER = 1 << 20
MAX_BYTES = 1 << 30  # largest file, unless the caller allows more
# Limits of the block rows of all patterns together, because statistics of a mask take memory for every row.
MAX_ROWS = 1 << 20
ROWS_A_RUN = 16  # further rows for each run that the file holds


def save(mask: MaskData, path: str | PathLike[str], expression: str) -> None:
    """Write the mask atomically, by way of a temporary name.

    Raises:
        ValueError: the expression is too long for :func:`load`.
    """
    from safetensors.numpy import save as to_bytes

    arrays = {
        "start": mask.runs.start,
        "stop": mask.runs.stop,
        "letter": mask.runs.code,
        "tiles": mask.tiles,
        "pattern_of": mask.pattern_of,
    }
    metadata = {
        "format": FORMAT,
        "shape": json.dumps(mask.shape),
        "q_offset": json.dumps(mask.q_offset),
        "block": json.dumps(mask.block),
        "checksum": _checksum(mask, expression),
        "expression": expression,
    }
    content = to_bytes({name: np.ascontiguousarray(a).astype(ARRAYS[name]) for name, a in arrays.items()}, metadata)
    path = Path(path)
    header = _header_size(content)
    if header > MAX_HEADER:
        raise ValueError(
            f"cannot write {path.name!r}: the expression of {len(expression):,} characters makes a header of "
            f'{header:,} bytes, and at most {MAX_HEADER:,} are read back; save(path, expression="") leaves it out'
        )
    with atomic_write(path) as file:
        file.write(content)


def load(path: str | PathLike[str], max_bytes: int = MAX_BYTES) -> MaskData:
    """The mask with its expression. Memory is linear in the size of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a mask file, another version, damaged, or not in canonical form.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load as from_bytes

    path = Path(path)
    try:
        content = _content(path, max_bytes)
        arrays = from_bytes(content)
        metadata = _metadata(content)
    except (SafetensorError, ValueError, KeyError, struct.error, RecursionError) as error:
        raise ValueError(f"{path}: not a block mask file ({shown(error)})") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: expected format {FORMAT!r}, got {metadata.get('format')!r}")
    try:
        return _checked(arrays, metadata)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged block mask ({shown(error)})") from None


def _content(path: Path, max_bytes: int) -> bytes:
    """The content of the file, after checking its size and that of its header."""
    with open_untrusted(path) as (file, size):
        if size > max_bytes:
            raise ValueError(
                f"{size:,} bytes; at most {max_bytes:,} are read, unless load(path, max_bytes=...) allows more"
            )
        if (header := _header_size(file.read(8))) > MAX_HEADER:
            raise ValueError(f"header of {header:,} bytes; at most {MAX_HEADER:,} are read")
        file.seek(0)
        return file.read(size)


def _header_size(content: bytes) -> int:
    (size,) = struct.unpack("<Q", content[:8])
    return int(size)


def _checksum(mask: MaskData, expression: str) -> str:
    """The checksum of the content and the text."""
    return blake2b(mask.digest + expression.encode(), digest_size=16).hexdigest()


def _metadata(content: bytes) -> dict[str, str]:
    size = _header_size(content)
    found: dict[str, str] = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    return found


def _checked(arrays: dict[str, NDArray[Any]], metadata: dict[str, str]) -> MaskData:
    if set(arrays) != set(ARRAYS):
        raise ValueError(f"expected the arrays {', '.join(sorted(ARRAYS))}, got {', '.join(sorted(arrays))}")
    for name, dtype in ARRAYS.items():
        if arrays[name].dtype != np.dtype(dtype):
            raise ValueError(f"{name} must be {dtype}, got {arrays[name].dtype}")
    shape, block = (_pair(metadata, name) for name in ("shape", "block"))
    grid = make_grid(shape, block, json.loads(metadata["q_offset"]))
    start, stop, code, tiles, pattern_of = (np.array(arrays[name]) for name in ARRAYS)
    nq, nk = grid.shape
    if tiles.ndim != 3 or tiles.shape[1:] != (block[0], words_per_row(block[1])):
        raise ValueError(f"tiles of shape {tiles.shape}")
    if pattern_of.ndim != 2 or not pattern_of.size or pattern_of.min() < 0 or pattern_of.max() >= pattern_of.size:
        raise ValueError("pattern_of is out of range")
    if not start.ndim == stop.ndim == code.ndim == 1 or not start.size == stop.size == code.size:
        raise ValueError("runs of unequal number")
    patterns = int(pattern_of.max()) + 1
    if patterns * nq > (most := MAX_ROWS + ROWS_A_RUN * start.size):
        raise ValueError(f"{patterns * nq:,} block rows for {start.size:,} runs; at most {most:,} are read")
    if start.size:
        if start[0] < 0 or stop[-1] > patterns * nq * nk or (start >= stop).any() or (start[1:] < stop[:-1]).any():
            raise ValueError("runs are out of range or overlap")
        if (start // nk != (stop - 1) // nk).any():
            raise ValueError("a run crosses a row")
        if code.min() < FULL or code.max() >= FIRST_TILE + len(tiles):
            raise ValueError("a block code has no tile")
    runs = Runs((patterns * nq, nk), start, stop, code.astype(np.int32))
    mask = MaskData(grid, runs, tiles.astype(np.uint32), pattern_of.astype(np.int32))
    if _checksum(mask, metadata["expression"]) != metadata["checksum"]:
        raise ValueError("the checksum does not match")
    canonical = MaskData.canonical(grid, runs, mask.tiles, mask.pattern_of)
    if canonical != mask:
        raise ValueError("not in canonical form")
    return replace(canonical, expression=metadata["expression"])


def _pair(metadata: dict[str, str], name: str) -> tuple[int, int]:
    value = json.loads(metadata[name])
    if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
        raise ValueError(f"{name} is {value!r}")
    return value[0], value[1]
