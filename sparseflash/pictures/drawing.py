"""Plot a block mask with axes and write the figure to a file."""

from __future__ import annotations

from math import ceil, log2
from os import PathLike
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from sparseflash.patterns.atomic_write import atomic_write
from sparseflash.patterns.mask_data import MaskData
from sparseflash.pictures.pixels import (
    FULL_COLOUR,
    MASKED_COLOUR,
    MAX_PIXELS,
    PARTIAL_COLOUR,
    Window,
    checked_window,
    picture,
    shows_tokens,
)
from sparseflash.pictures.seen import checked_token, token_figure

SUFFIXES = (".png", ".svg", ".pdf")
MAX_PANELS, PANELS_PER_LINE = 8, 4
LARGEST_LINED = 32  # block borders are drawn for at most this many blocks per side
DPI = 150
# Pixels around a panel: tick and axis labels at the left and below, half a tick label at the right.
LEFT, RIGHT, BELOW, ABOVE, LINE = 180, 70, 110, 46, 26
TITLE_LINES = 5


def draw(
    mask: MaskData,
    path: str | PathLike[str],
    *,
    title: str | None = None,
    window: Window | None = None,
    token: int | None = None,
) -> None:
    """Write the picture with axes, densities and a legend; for several patterns, the first ones side by side.

    Raises:
        TypeError: window is not two pairs of ints, or token not an int.
        ValueError: the suffix of path is not a picture format, window or token is outside the mask, both are given, or
            a token for a pattern without an image.
        FileNotFoundError: the folder of path does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"cannot write {path.name!r}: a picture ends in one of {', '.join(SUFFIXES)}")
    if token is not None and window is not None:
        raise ValueError(f"give window= or token=, got window={window!r} and token={token!r}")
    drawn = (
        figure(mask, title, checked_window(mask, window))
        if token is None
        else token_figure(mask, title, checked_token(mask, token))
    )
    with atomic_write(path) as file:
        drawn.savefig(file, format=path.suffix[1:].lower(), dpi=DPI)


def figure(mask: MaskData, title: str | None, window: Window) -> Any:
    """The matplotlib figure. Panels are aligned to whole pixels and never smaller than their picture.

    Otherwise resampling could drop pixels of the picture, and single blocks with them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = min(mask.patterns, MAX_PANELS)
    room = panel_size(window, MAX_PIXELS if panels == 1 else MAX_PIXELS // 2)
    pictures = [picture(mask, p, window, room) for p in range(panels)]
    height, width = whole_multiple(pictures[0][0].shape[:2], room)
    across = min(panels, PANELS_PER_LINE)
    down = -(-panels // across)
    wide = across * (LEFT + width + RIGHT)
    notes = heading(mask, title, window, panels, pictures[0][0].shape[:2], wide)
    above, tall = LINE * (len(notes) + 1), down * (ABOVE + height + BELOW)
    total = above + tall + 2 * LINE  # the legend takes the last two lines
    drawn = Figure(figsize=(wide / DPI, total / DPI))
    FigureCanvasAgg(drawn)
    for p, (pixels, covered) in enumerate(pictures):
        left = LEFT + p % across * (LEFT + width + RIGHT)
        top = above + ABOVE + p // across * (ABOVE + height + BELOW)
        axes = drawn.add_axes((left / wide, 1 - (top + height) / total, width / wide, height / total))
        (q0, q1), (k0, k1) = covered
        axes.imshow(pixels, extent=(k0, k1, q1, q0), interpolation="none", aspect="auto")
        axes.spines[:].set_position(("outward", 2))  # a frame on the edge would hide the first and last pixels
        _scales(axes, mask, window, (height, width))
        if mask.patterns > 1:
            axes.set_title(f"pattern {p} of {mask.patterns}", fontsize=10)
    drawn.text(0.5, 1 - LINE / total, "\n".join(notes), ha="center", va="top", fontsize=10, parse_math=False)
    kinds = [(FULL_COLOUR, "full"), (PARTIAL_COLOUR, "partial")]
    if shows_tokens(window, room):
        kinds = [(FULL_COLOUR, "full block"), (PARTIAL_COLOUR, "partial block: allowed"), (MASKED_COLOUR, "masked")]
    handles = [Patch(facecolor=np.array(colour) / 255, edgecolor="0.6", label=text) for colour, text in kinds]
    drawn.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    return drawn


def panel_size(window: Window, longest: int) -> tuple[int, int]:
    """Pixels (high, wide) in the window's proportions, but neither side below a quarter of the longer one."""
    spans = [stop - first for first, stop in window]
    high, wide = (max(ceil(longest * span / max(spans)), longest // 4) for span in spans)
    return high, wide


def whole_multiple(picture_size: tuple[int, ...], room: tuple[int, int]) -> tuple[int, int]:
    """The size near ``room`` that is a multiple of the picture's, if that keeps the proportions; else ``room``."""
    high, wide = (n * max(1, round(space / n)) for n, space in zip(picture_size, room, strict=True))
    kept = abs(high * room[1] / (wide * room[0]) - 1) < 0.02
    return (high, wide) if kept else room


def tick_step(span: int, pixels: int) -> int:
    """Tokens between ticks: a power of two, as block borders are, with room for a label."""
    return 1 << max(0, ceil(log2(span / max(2, pixels // 120))))


def _scales(axes: Any, mask: MaskData, window: Window, size: tuple[int, int]) -> None:
    """Limits, ticks, labels and, if few blocks are in view, their borders."""
    from matplotlib.ticker import MultipleLocator, StrMethodFormatter

    (q0, q1), (k0, k1) = window
    few = all((stop - first) / side <= LARGEST_LINED for (first, stop), side in zip(window, mask.block, strict=True))
    for axis, (first, stop), pixels, side, name in (
        (axes.yaxis, window[0], size[0], mask.block[0], "query"),
        (axes.xaxis, window[1], size[1], mask.block[1], "key"),
    ):
        axis.set_major_locator(MultipleLocator(tick_step(stop - first, pixels)))
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.set_label_text(f"{name} token")
        if few:
            line = axes.axhline if name == "query" else axes.axvline
            for border in range(-(-(first + 1) // side) * side, stop, side):
                line(border, color="0.6", linewidth=0.4)
    axes.set(xlim=(k0, k1), ylim=(q1, q0))


def heading(
    mask: MaskData, title: str | None, window: Window, panels: int, picture_size: tuple[int, ...], wide: int
) -> list[str]:
    """Lines above the picture: the title, the mask's densities, and what a pixel stands for."""
    (q0, q1), (k0, k1) = window
    letters = wide // 14
    lines = wrap(title, letters, max_lines=TITLE_LINES, placeholder=" ...") if title else []
    (nq, nk), (bq, bk) = mask.grid_shape, mask.block
    lines += wrap(
        f"blocks {mask.density:.2%} of {nq:,} x {nk:,} ({bq} x {bk} tokens), tokens {mask.token_density:.2%}", letters
    )
    if window != ((0, mask.shape[0]), (0, mask.shape[1])):
        lines += wrap(f"queries {q0:,} to {q1 - 1:,}, keys {k0:,} to {k1 - 1:,}", letters)
    if panels < mask.patterns:
        lines.append(f"the first {panels} of {mask.patterns:,} patterns")
    blocks = -(-q1 // bq) - q0 // bq, -(-k1 // bk) - k0 // bk
    if any(n > m for n, m in zip(blocks, picture_size, strict=True)):
        each = " x ".join(f"{n / m:.3g}" for n, m in zip(blocks, picture_size, strict=True))
        lines += wrap(f"a pixel holds {each} blocks: the paler, the fewer of them are stored", letters)
    return lines
