"""The Pathfinder task: generator, ground truth, files and baselines.

Two long dashed contours, several short ones and two discs: are the discs on the same contour? Linsley et al. 2018
(NeurIPS, *Learning long-range spatial dependencies with horizontal gated recurrent units*) define the task, Tay et al.
2021 (ICLR, *Long Range Arena*) its sides 32 to 256, 128 being known as Path-X and 256 as Path-256.

The generator follows a specification of the original's distribution and keeps all of its quirks. Each quirk is
described where it is implemented: in ``strokes`` (kernels), ``tables`` (positions, seeds), ``contours`` (extension),
``targets``, ``distractors``, ``scene`` (order of draws) and ``render`` (contrast).

    >>> from sparseflash import pathfinder
    >>> images, labels = pathfinder.generate(size=32, count=4, seed=0)
    >>> images.shape, labels.dtype.name
    ((4, 32, 32), 'int64')
"""

from sparseflash.pathfinder.distance import marker_distance_baseline
from sparseflash.pathfinder.geometry import LADDER, Geometry
from sparseflash.pathfinder.images import draw, generate, generate_with_truth
from sparseflash.pathfinder.lra import WriteReport, write
from sparseflash.pathfinder.reader import Dataset, Splits, read, to_floats, to_tokens
from sparseflash.pathfinder.render import contour_strokes, curve_targets
from sparseflash.pathfinder.scene import Contour, Truth
from sparseflash.pathfinder.splits import SPLITS

__all__ = [
    "LADDER",
    "SPLITS",
    "Contour",
    "Dataset",
    "Geometry",
    "Splits",
    "Truth",
    "WriteReport",
    "contour_strokes",
    "curve_targets",
    "draw",
    "generate",
    "generate_with_truth",
    "marker_distance_baseline",
    "read",
    "to_floats",
    "to_tokens",
    "write",
]
