"""Finds the images in a folder of the Long Range Arena release, unpacked completely or in part."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from sparseflash.foreign import archive_in, check_folder, folders_below
from sparseflash.pathfinder.geometry import LEVELS
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import check_inside

SIZED: Final = re.compile(r"pathfinder(\d{1,4})")
HARD: Final = LEVELS["hard"][0]


def level_folder(path: str | os.PathLike[str], level: str | None = None, size: int | None = None) -> Path:
    """The folder with ``imgs`` and ``metadata`` that `read` opens for the same arguments.

    Raises:
        FileNotFoundError, ValueError: as `read`, if there is no such folder.
    """
    given = path = Path(path)
    check_folder(path)
    name = None if level is None else LEVELS[level][0] if level in LEVELS else level
    if name is not None and not re.fullmatch(r"curv_\w+", name):
        raise ValueError(f"level must be one of {', '.join(LEVELS)} or a folder name such as {HARD!r}, got {level!r}")
    if (path / "metadata").is_dir():
        if name is not None and path.resolve().name != name:
            raise ValueError(f"{path} is a level folder, but not {name!r}")
        check_inside(path / "metadata", path)
        return path.resolve()
    if not _levels(path):
        path = _sized_folder(path, size)
    elif size is not None and path.resolve().name != f"pathfinder{size}":
        raise ValueError(f"{path} is not pathfinder{size}")
    folder = path / (name or HARD)
    if not (folder / "metadata").is_dir():
        levels = _levels(path)
        named = f"; say which level is meant: {' or '.join(map(_level_name, levels))}" if levels else ""
        raise ValueError(
            f"{path}: no {folder.name} with metadata here; there is {shown(', '.join(levels)) or 'nothing'}{named}"
        )
    check_inside(folder / "metadata", given)
    return folder.resolve()


def _levels(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.glob("curv_*") if entry.is_dir())


def _level_name(folder: str) -> str:
    """The level of a folder, or else the folder's own name."""
    return next((level for level, (name, _) in LEVELS.items() if name == folder), shown(folder))


def _sized_folder(path: Path, size: int | None) -> Path:
    """The ``pathfinder{H}`` below an archive, innermost copy first."""
    seen: set[int] = set()
    for root in (path / "lra_release" / "lra_release", path / "lra_release", path):
        found = {int(m[1]): root / m[0] for m in map(SIZED.fullmatch, _names(root)) if m}
        if size is None and len(found) > 1:
            raise ValueError(f"{root} holds sizes {', '.join(map(str, sorted(found)))}; name one with size=")
        if found and (size is None or size in found):
            return found[min(found) if size is None else size]
        seen |= set(found)
    wanted = "pathfinder{H}" if size is None else f"pathfinder{size}"
    message = f"{path}: no {wanted} here; found sizes: {', '.join(map(str, sorted(seen))) or 'none'}"
    deeper = next(folders_below(path, lambda place: bool(_fits(place, size))), None)
    if deeper is not None:
        raise ValueError(f"{message}. There is {shown(deeper)}: name that folder")
    if archive := archive_in(path):
        raise ValueError(f"{message}. An archive lies there, unpack it: `{archive}`")
    layout = "PATHFINDER/LEVEL/imgs and PATHFINDER/LEVEL/metadata, such as pathfinder32/curv_contour_length_14"
    raise ValueError(f"{message}. The Long Range Arena release holds {layout}")


def _fits(place: Path, size: int | None) -> bool:
    match = SIZED.fullmatch(place.name)
    return match is not None and size in (None, int(match[1])) and bool(_levels(place))


def _names(root: Path) -> list[str]:
    return [entry.name for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
