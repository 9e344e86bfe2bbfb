"""A block mask as a picture."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.runs import FULL, Runs

if TYPE_CHECKING:
    from sparseflash.patterns.block_mask import BlockMask

# Okabe & Ito's colours: told apart with every common kind of colour vision, and in grey.
FULL_COLOUR, PARTIAL_COLOUR = (0, 114, 178), (230, 159, 0)
MAX_PIXELS = 1024
MAX_PANELS = 8


def coverage(runs: Runs, row0: int, rows: int, height: int, width: int) -> NDArray[np.float64]:
    """Share of each of height x width pixels that the runs in ``rows`` rows from row0 cover. O(runs)."""
    cols = runs.shape[1]
    here = (runs.row >= row0) & (runs.row < row0 + rows)
    row = (runs.row[here] - row0) * height // rows
    scale = width / cols
    total = np.zeros((height, width + 2))
    for edge, sign in ((runs.start[here] % cols, 1.0), (runs.start[here] % cols + runs.length[here], -1.0)):
        x = edge * scale
        pixel = np.minimum(x.astype(np.int64), width)
        # A run that begins inside a pixel covers the rest of it, and all of each later one until it ends.
        rest = pixel + 1 - x
        flat = row * (width + 2) + pixel
        for index, amount in ((flat, rest), (flat + 1, 1 - rest)):
            total += sign * np.bincount(index, weights=amount, minlength=total.size).reshape(total.shape)
    rows_of_pixel = np.bincount(np.arange(rows) * height // rows, minlength=height)
    share: NDArray[np.float64] = np.cumsum(total, axis=1)[:, :width] / rows_of_pixel[:, None]
    return share


def picture(mask: BlockMask, pattern: int = 0, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """RGB pixels [h, w, 3], a pixel a block where it fits; white is empty.

    A pixel that stands for many blocks takes the colour of what they hold and never fades out entirely, so that
    single blocks stay visible at any size.
    """
    rows, cols = mask.grid_shape
    height, width = min(rows, max_pixels), min(cols, max_pixels)
    is_full = mask.runs.letter == FULL
    shares = []
    for chosen in (is_full, ~is_full):
        part = Runs(mask.runs.shape, mask.runs.start[chosen], mask.runs.stop[chosen], mask.runs.letter[chosen])
        shares.append(np.clip(coverage(part, pattern * rows, rows, height, width), 0, 1))
    full, partial = shares
    stored = full + partial
    colour = (full[..., None] * FULL_COLOUR + partial[..., None] * PARTIAL_COLOUR) / np.maximum(stored, 1e-9)[..., None]
    ink = np.where(stored > 1e-6, 0.25 + 0.75 * np.clip(stored, 0, 1), 0)[..., None]
    return np.rint(255 + ink * (colour - 255)).astype(np.uint8)


def draw(mask: BlockMask, path: str | PathLike[str], *, title: str | None = None) -> None:
    """Write the picture with axes, densities and a legend; the first patterns beside each other when there are many.

    Raises:
        ValueError: the suffix of path is not a picture format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    path = Path(path)
    panels = min(mask.patterns, MAX_PANELS)
    figure = Figure(figsize=(6.4 * panels, 7.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    kinds = canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise ValueError(f"cannot write {path.name!r}: a picture ends in one of .{', .'.join(sorted(kinds))}")
    q_len, kv_len = mask.shape
    for p in range(panels):
        axes = figure.add_subplot(1, panels, p + 1)
        axes.imshow(picture(mask, p), extent=(0, kv_len, q_len, 0), interpolation="nearest", aspect="auto")
        axes.set_xlabel("key position")
        axes.set_ylabel("query position")
        if mask.patterns > 1:
            axes.set_title(f"pattern {p} of {mask.patterns}")
    figure.suptitle(
        f"{title + chr(10) if title else ''}blocks {mask.density:.2%} of {mask.grid_shape[0]:,} x "
        f"{mask.grid_shape[1]:,} ({mask.block[0]} x {mask.block[1]} tokens), tokens {mask.token_density:.2%}"
    )
    handles = [
        Patch(color=np.array(FULL_COLOUR) / 255, label="full"),
        Patch(color=np.array(PARTIAL_COLOUR) / 255, label="partial"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        figure.savefig(temporary, dpi=150)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
