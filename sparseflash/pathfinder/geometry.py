"""The numbers that define one Pathfinder task: the LRA presets and the curriculum.

Definitions: Linsley et al. 2018, *Learning long-range spatial dependencies with horizontal gated recurrent units*
(the Pathfinder task); Tay et al. 2021, *Long Range Arena* (the parameter lists for sides 32, 64, 128 and 256).
Coordinates are integer pixels (y, x) with y downwards; lengths are pixels.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Final

LEVELS: Final[dict[str, tuple[str, int]]] = {
    "easy": ("curv_baseline", 6),
    "intermediate": ("curv_contour_length_9", 9),
    "hard": ("curv_contour_length_14", 14),
}
"""Level name -> (folder of the LRA release, dashes of a target contour)."""

LRA_SIZES: Final = (32, 64, 128, 256)
SIZES: Final = range(28, 2049)
"""Sides of `Geometry.sized`: a smaller canvas has no room for the dashes, a larger one takes a minute per image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """All parameters of the distribution of images. Hashable; tables and random streams are keyed by it.

    Use :meth:`lra` for the published tasks and :meth:`curriculum` for the dashes of the 256 task on smaller canvases.
    ``dataclasses.replace`` changes single fields.

    Attributes:
        size: side H of the square canvas.
        padding: width of the frame that no contour may enter, at least 1.
        seed_distance: distance s between the tails of the two targets; the first tail keeps 2s from the border.
        paddle_length: length L of a dash.
        paddle_margins: choices of the clearance m around a dash; each image draws one uniformly.
        paddle_thickness: width w of a dash; ``w * antialias`` must be whole.
        continuity: c; a contour bends by at most 90 / c degrees per dash.
        marker_radius: radius of the two discs.
        snake_contrast: brightness of distractors; the brightness of targets is this times ``paddle_contrast``.
        paddle_contrast: the second factor of the targets' brightness.
        contour_length: dashes N in a target.
        distractor_length: dashes in a distractor.
        num_distractors: distractors to place (fewer may fit).
        antialias: supersampling of strokes and discs.

    Raises:
        TypeError: a field is not a number (or, for the margins, not a sequence of whole numbers).
        ValueError: a field is out of range, or the canvas has no room for a first seed.

    Example:
        >>> from dataclasses import replace
        >>> replace(Geometry.lra(128), num_distractors=2).num_distractors
        2
    """

    size: int
    padding: int
    seed_distance: int
    paddle_length: int
    paddle_margins: tuple[int, ...]
    paddle_thickness: float
    continuity: float
    marker_radius: float
    snake_contrast: float
    paddle_contrast: float
    contour_length: int
    distractor_length: int
    num_distractors: int
    antialias: int = 2

    def __post_init__(self) -> None:
        def store(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name, (least, most) in _WHOLE.items():
            store(name, whole_number(name, getattr(self, name), least, most))
        for name, limit in _POSITIVE.items():
            store(name, _positive(name, getattr(self, name), limit))
        margins: Any = self.paddle_margins
        if isinstance(margins, (str, bytes)) or not hasattr(margins, "__iter__"):
            raise TypeError(f"paddle_margins must be a tuple of whole numbers, got {margins!r}")
        if len(margins) > _MAX_MARGINS:
            raise ValueError(f"paddle_margins must be at most {_MAX_MARGINS}, got {len(margins)}")
        store("paddle_margins", tuple(whole_number("paddle_margins", m, 1, _MAX_MARGIN) for m in margins))
        if not self.paddle_margins:
            raise ValueError("paddle_margins must name at least one margin, got ()")
        if not math.isclose(self.line_width, self.paddle_thickness * self.antialias) or self.line_width < 1:
            raise ValueError(
                f"paddle_thickness * antialias must be a whole number of at least 1, "
                f"got {self.paddle_thickness} * {self.antialias}"
            )
        self._check_drawing()
        # With less, one probe of the first seed could be off the canvas while another is in the seed square, and the
        # rectangle of `tables.py` would not be the set of available tails.
        least = math.ceil((self.paddle_length + 2 * max(self.paddle_margins) + math.ceil(self.paddle_thickness)) / 2)
        if self.seed_distance < least:
            raise ValueError(f"seed_distance must be at least {least} for this dash, got {self.seed_distance}")
        if self.size <= 4 * self.seed_distance:
            raise ValueError(
                f"the first target starts 2 * seed_distance from every border, so size must exceed "
                f"{4 * self.seed_distance}; got size {self.size}"
            )
        if 2 * self.padding >= self.size:
            raise ValueError(f"padding {self.padding} leaves nothing of a canvas of side {self.size}")

    def _check_drawing(self) -> None:
        """Raise ValueError if drawing a dash in all directions would take gigabytes or minutes."""
        margin = max(self.paddle_margins)
        reach = self.paddle_length + margin
        side = 2 * (reach + math.ceil(self.paddle_thickness)) * self.antialias + 1
        cells = (360 + math.ceil(2 * math.pi * reach)) * side**2
        if cells > _MAX_CELLS or cells * (margin * self.antialias) ** 2 > _MAX_WORK:
            raise ValueError(
                f"a dash of paddle_length {self.paddle_length}, paddle_thickness {self.paddle_thickness}, margin "
                f"{margin} and antialias {self.antialias} is too large: {cells:,} cells in all directions"
            )

    @property
    def line_width(self) -> int:
        """Width of the supersampled dash, in subpixels."""
        return round(self.paddle_thickness * self.antialias)

    @property
    def folder(self) -> str:
        """Name of the level folder in the LRA layout; contours of 6 dashes are the ``curv_baseline``."""
        return "curv_baseline" if self.contour_length == 6 else f"curv_contour_length_{self.contour_length}"

    @classmethod
    def lra(cls, size: int = 256, level: str = "hard") -> Geometry:
        """The published geometry for ``size`` in 32, 64, 128, 256 and ``level`` easy, intermediate or hard.

        The antialias factor is 2: the LRA parameter lists set 4 and then 2, and the last value applies. The number of
        distractors depends on the level: budget // distractor length.

        Raises:
            ValueError: unknown size or level.
        """
        if level not in LEVELS:
            raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
        if size not in LRA_SIZES:
            raise ValueError(f"LRA sizes are 32, 64, 128 and 256, got {size!r}; see Geometry.curriculum for others")
        length = LEVELS[level][1]
        common, budget = _LRA[size]
        short = length // 3
        return cls(size=size, contour_length=length, distractor_length=short, num_distractors=budget // short, **common)

    @classmethod
    def curriculum(cls, size: int, length: int, base: int = 256) -> Geometry:
        """Dashes of the ``base`` task on a canvas of side ``size`` with contours of ``length`` dashes.

        Local features (dash, gap, bend, disc) are those of the task; canvas and length grow. For base 256 there are
        measured values for 64/3, 64/4, 96/4, 96/6, 128/6, 128/9, 160/9, 160/14, 192/9, 192/14 and 256/6, 9, 14. Other
        combinations get ``seed_distance = min(the task's, (size - 16) // 4)`` and the task's number of distractor
        dashes per pixel (base 256: about one in 1,800). At base 256 pairs are cheap while ``size >= 12 * length + 16``.

        Raises:
            TypeError: not whole numbers.
            ValueError: a canvas with no room for a first seed (below 44 at base 256), ``length`` below 2, or a base
                that is not an LRA size.

        Example:
            >>> Geometry.curriculum(96, 6).seed_distance
            14
        """
        size, length = whole_number("size", size, 16), whole_number("length", length, 2)
        if base not in LRA_SIZES:
            raise ValueError(f"LRA sizes are 32, 64, 128 and 256, got base {base!r}")
        row, budget = _LRA[base]
        short, area = max(1, length // 3), size * size
        dashes = area / 1800 if base == 256 else area * budget / (base * base)
        rule = min(row["seed_distance"], (size - 16) // 4), max(1, round(dashes / short))
        seed_distance, count = _CURRICULUM.get((size, length), rule) if base == 256 else rule
        common = dict(row)
        if base == 256:
            common["padding"] = 1 if size <= 160 else 8 if size < 256 else 22
        common["seed_distance"] = seed_distance
        return cls(size=size, contour_length=length, distractor_length=short, num_distractors=count, **common)

    @classmethod
    def sized(cls, size: int, level: str = "hard") -> Geometry:
        """The task of a level on a canvas of any side from 28 to 2,048.

        The published geometry, if there is one. Otherwise the dashes of the largest published task whose side is at
        most ``size`` (below 32: of the smallest task), with the same number of distractor dashes per pixel.

        Raises:
            TypeError: ``size`` is not a whole number.
            ValueError: an unknown level, or a size that is not in `SIZES`.

        Example:
            >>> geometry = Geometry.sized(48)
            >>> geometry.size, geometry.paddle_length == Geometry.lra(32).paddle_length
            (48, True)
        """
        size = whole_number("size", size, 1)
        if size not in SIZES:
            raise ValueError(f"size must be {SIZES[0]} to {SIZES[-1]:,}; got {size!r}")
        if size in LRA_SIZES or level not in LEVELS:
            return cls.lra(size, level)
        base = max(side for side in LRA_SIZES if side <= max(size, LRA_SIZES[0]))
        return cls.curriculum(size, LEVELS[level][1], base)

    def stream_words(self) -> tuple[int, ...]:
        """Extra words for the random streams: none for an LRA preset, else two that no other geometry shares."""
        for level, (_, length) in LEVELS.items():
            if self.size in LRA_SIZES and self.contour_length == length and self == Geometry.lra(self.size, level):
                return ()
        text = ",".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int of at least ``least``; TypeError or ValueError naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value!r}")
    return int(value)


def _positive(name: str, value: object, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value!r}")
    if number > most:
        raise ValueError(f"{name} must be at most {most:g}, got {value!r}")
    return number


# Presets and runs of unknown origin hold geometries too, so every number has limits: (minimum, maximum).
_WHOLE: Final = {
    "size": (16, SIZES[-1]),
    "padding": (1, SIZES[-1]),
    "seed_distance": (1, SIZES[-1]),
    "paddle_length": (1, 64),
    "contour_length": (2, 256),
    "distractor_length": (1, 256),
    "num_distractors": (0, 4096),
    "antialias": (1, 8),
}
_POSITIVE: Final = {
    "paddle_thickness": 64.0,
    "continuity": 1e6,
    "marker_radius": 64.0,
    "snake_contrast": 1e6,
    "paddle_contrast": 1e6,
}
_MAX_MARGINS: Final = 8
_MAX_MARGIN: Final = 64
# Limits for the drawings of a dash: cells, and steps of the dilation. The published tasks need 0.7 and 25 million.
_MAX_CELLS: Final = 1 << 24
_MAX_WORK: Final = 1 << 32


def _row(
    padding: int,
    seed_distance: int,
    length: int,
    margins: tuple[int, ...],
    thickness: float,
    continuity: float,
    radius: float,
    contrast: tuple[float, float],
) -> dict[str, Any]:
    return {
        "padding": padding,
        "seed_distance": seed_distance,
        "paddle_length": length,
        "paddle_margins": margins,
        "paddle_thickness": thickness,
        "continuity": continuity,
        "marker_radius": radius,
        "snake_contrast": contrast[0],
        "paddle_contrast": contrast[1],
    }


# size -> (fields, distractor budget Q in dashes)
_LRA: Final = {
    32: (_row(1, 7, 2, (1,), 0.5, 1.0, 1.5, (2.0, 0.75)), 20),
    64: (_row(1, 12, 5, (1,), 1.0, 1.8, 2.5, (0.8, 1.0)), 22),
    128: (_row(1, 20, 5, (2, 3), 1.5, 1.8, 3.0, (0.9, 1.0)), 35),
    256: (_row(22, 27, 5, (3,), 2.0, 1.8, 5.0, (1.0, 1.0)), 30),
}

# (size, length) -> (seed_distance, num_distractors); rows with more than 120 attempts per pair are omitted.
_CURRICULUM: Final = {
    (64, 3): (12, 2),
    (64, 4): (10, 2),
    (96, 4): (18, 4),
    (96, 6): (14, 3),
    (128, 6): (20, 6),
    (128, 9): (14, 4),
    (160, 9): (24, 6),
    (160, 14): (24, 4),
    (192, 9): (27, 7),
    (192, 14): (20, 5),
    (256, 6): (27, 15),
    (256, 9): (27, 10),
    (256, 14): (27, 7),
}

LADDER: Final[tuple[Geometry, ...]] = tuple(
    Geometry.curriculum(size, length)
    for size, length in ((64, 3), (64, 4), (96, 6), (128, 9), (160, 14), (192, 14), (256, 14))
)
"""A suggested curriculum, easiest first; the last rung is the LRA hard task at 256."""
