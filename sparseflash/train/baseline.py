"""The accuracy of a rule that uses only the distance between the markers, on a stage or a folder."""

import re
from pathlib import Path
from typing import Final

from sparseflash.pathfinder import Geometry, marker_distance_baseline
from sparseflash.pathfinder.folders import level_folder
from sparseflash.pathfinder.geometry import LRA_SIZES
from sparseflash.pathfinder.targets import NoPairError
from sparseflash.train.stage import AnyStage
from sparseflash.utils.untrusted import parse_json, read_text

# Measured once by `marker_distance_baseline`, on 3,000, 200, 1,000 and 4,000 pairs: at 64 and 128 pairs are rare.
KNOWN: Final = {(32, "hard"): 0.543, (64, "hard"): 0.556, (128, "hard"): 0.526, (256, "hard"): 0.626}
_LEVEL_OF: Final = {"curv_baseline": "easy", "curv_contour_length_9": "intermediate", "curv_contour_length_14": "hard"}


def folder_baseline(folder: Path) -> float | None:
    """The marker-distance baseline of a level folder; None if it is unknown.

    It is known for folders from `sparseflash.pathfinder.write`, which record their distribution, and for folders with
    the names of the release.

    Args:
        folder: such as ``pathfinder256/curv_contour_length_14``.
    """
    try:
        made = parse_json(read_text(folder / "generator.json", inside=folder))
        geometry = Geometry(**made["geometry"])
        match_distance = bool(made["match_distance"])
    except (OSError, ValueError, KeyError, TypeError):
        size, level = re.fullmatch(r"pathfinder(\d+)", folder.parent.name), _LEVEL_OF.get(folder.name)
        return KNOWN.get((int(size[1]), level)) if size and level else None
    try:
        return geometry_baseline(geometry, match_distance)
    except NoPairError:  # the file may claim any distribution
        return None


def files_baseline(folder: str, level: str, size: int) -> float:
    """The marker-distance baseline of images in files; chance if their distribution is unknown.

    Args:
        folder: as `sparseflash.pathfinder.read` takes it.
        level: name of the level folder.
        size: side of the images.
    """
    found = folder_baseline(level_folder(folder, level, size))
    if found is not None:
        return found
    known = _LEVEL_OF.get(level)
    return 0.5 if known is None or size not in LRA_SIZES else geometry_baseline(Geometry.lra(size, known))


def geometry_baseline(geometry: Geometry, match_distance: bool = False) -> float:
    """The marker-distance baseline of drawn images: known for a published task, otherwise measured now."""
    for (size, level), baseline in KNOWN.items():
        if geometry == Geometry.lra(size, level) and not match_distance:
            return baseline
    return marker_distance_baseline(geometry=geometry, match_distance=match_distance, pairs=1000)


def stage_baseline(stage: AnyStage) -> float:
    """The accuracy of a simple rule: from the recipe, known for a published task, or measured now.

    For images the rule uses the distance of the markers; for sequences it always gives the most frequent answer.
    """
    return stage.known_baseline() if stage.baseline is None else stage.baseline
