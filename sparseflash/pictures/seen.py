"""Draw what one token of an image or a video sees, in the image or its frames, with all other tokens beside them."""

from __future__ import annotations

from textwrap import wrap
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.grid import Ints, is_int
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.pictures.pixels import FULL_COLOUR, PARTIAL_COLOUR, Pixels, token_kinds

MAX_FRAMES = 24  # of a video, those nearest to the token's own
MAX_PATTERNS = 4
UNSEEN_COLOUR, BLIND_COLOUR = (238, 238, 238), (90, 90, 90)  # the latter: the token itself, if it does not see itself
PANEL, ACROSS = 220, 1500  # pixels: about the longer side of a panel, and the width of a line of panels
GAP, LABEL, LINE, DPI = 24, 26, 26, 150

Bools: TypeAlias = NDArray[np.bool_]


def images_in(mask: MaskData) -> tuple[PlacedImage, ...]:
    """The images of the pattern that a mask was compiled from; empty if they overlap or reach past the mask."""
    ends = [0, *(image.start + image.tokens for image in mask.images)]
    apart = all(image.start >= end for image, end in zip(mask.images, ends, strict=False))
    return mask.images if apart and ends[-1] <= mask.shape[1] else ()


def checked_token(mask: MaskData, token: Any) -> int:
    """The index of a query.

    Raises:
        TypeError: not an int.
        ValueError: not a query of the mask, or a mask of a pattern without an image.
    """
    if not is_int(token):
        raise TypeError(f"token must be an int, got token={token!r}")
    if not 0 <= token < mask.shape[0]:
        raise ValueError(f"token must be 0 to {mask.shape[0] - 1:,}, the mask's queries; got token={token}")
    if not images_in(mask):
        raise ValueError(
            "token= needs a pattern that has a shape, such as neighborhood((16, 16), 2); "
            f"{mask.expression or 'a mask without a text'} has none. To draw the token's keys in a row: "
            f"window=(({token}, {token + 1}), (0, {mask.shape[1]}))"
        )
    return int(token)


class Panel(NamedTuple):
    """A frame, or the tokens beside the images."""

    label: str
    tokens: Ints  # [height, width] the key at each place; -1: none


def panels_of(mask: MaskData, token: int) -> list[Panel]:
    """The frames of the image that contains a query (else of all images), and all keys outside of them."""
    position, images = token + mask.q_offset, images_in(mask)
    own = [image for image in images if image.start <= position < image.start + image.tokens] or list(images)
    found = []
    for image in own:
        frames = image.positions
        here = np.argwhere(frames == position)
        middle = int(here[0, 0]) if len(here) else 0
        first = min(max(middle - MAX_FRAMES // 2, 0), max(len(frames) - MAX_FRAMES, 0))
        for number in range(first, min(first + MAX_FRAMES, len(frames))):
            name = f"frame {number:,} of {len(frames):,}" if len(frames) > 1 else " x ".join(map(str, image.shape))
            found.append(Panel(name, frames[number]))
    inside = np.zeros(mask.shape[1], bool)
    for image in own:
        inside[image.start : image.start + image.tokens] = True
    beside = np.flatnonzero(~inside)
    if beside.size:
        width = max(min(beside.size, 16), int(np.sqrt(4 * beside.size)))
        lines = np.pad(beside, (0, -beside.size % width), constant_values=-1).reshape(-1, width)
        found.append(Panel(f"{beside.size:,} beside", lines))
    return found


def seen_by(mask: MaskData, pattern: int, token: int) -> Bools:
    """Which keys a query sees, bool [keys]."""
    kinds = token_kinds(mask, pattern, ((token, token + 1), (0, mask.shape[1])))[0]
    return np.asarray((kinds == 1) | (kinds == 2))


def panel_pixels(panel: Panel, seen: Bools, position: int) -> Pixels:
    """The colour of each position of a panel: seen, not seen, no token, or the token itself."""
    there = panel.tokens >= 0
    visible = seen[panel.tokens] & there
    pixels = np.full((*panel.tokens.shape, 3), 255, np.uint8)
    pixels[there] = UNSEEN_COLOUR
    pixels[visible] = FULL_COLOUR
    own = panel.tokens == position
    pixels[own & visible] = PARTIAL_COLOUR
    pixels[own & ~visible] = BLIND_COLOUR
    return pixels


def token_figure(mask: MaskData, title: str | None, token: int) -> Any:
    """The matplotlib figure of what a query sees; positions have equal sizes, and each pattern its own rows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels, position = panels_of(mask, token), token + mask.q_offset
    shapes = [panel.tokens.shape for panel in panels]
    times = max(1, PANEL // max(max(shape) for shape in shapes))
    high, wide = (times * max(side) + GAP for side in zip(*shapes, strict=True))
    across = max(1, min(len(panels), ACROSS // wide))
    down, patterns = -(-len(panels) // across), min(mask.patterns, MAX_PATTERNS)
    width = max(across * wide + GAP, 600)
    counts = [int(seen_by(mask, p, token).sum()) for p in range(patterns)]
    each = ", ".join(f"{count:,}" for count in counts)
    notes = wrap(title, width // 14, max_lines=5, placeholder=" ...") if title else []
    notes += wrap(f"token {position:,} sees {each} of {mask.shape[1]:,} tokens", width // 14)
    if patterns < mask.patterns:
        notes.append(f"the first {patterns} of {mask.patterns:,} patterns")
    above = LINE * (len(notes) + 1)
    height = above + patterns * down * (high + LABEL) + 2 * LINE
    drawn = Figure(figsize=(width / DPI, height / DPI))
    FigureCanvasAgg(drawn)
    for p in range(patterns):
        seen = seen_by(mask, p, token)
        for number, panel in enumerate(panels):
            pixels = panel_pixels(panel, seen, position)
            h, w = (times * side for side in pixels.shape[:2])
            left = GAP + number % across * wide
            top = above + LABEL + (p * down + number // across) * (high + LABEL)
            axes = drawn.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))
            axes.imshow(pixels, interpolation="none", aspect="auto")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_position(("outward", 1))
            axes.set_title(panel.label if patterns == 1 else f"{panel.label}, pattern {p}", fontsize=8, pad=3)
    drawn.text(0.5, 1 - LINE / height, "\n".join(notes), ha="center", va="top", fontsize=10, parse_math=False)
    kinds = [(FULL_COLOUR, "seen"), (PARTIAL_COLOUR, "the token, which sees itself"), (UNSEEN_COLOUR, "not seen")]
    if not (0 <= position < mask.shape[1] and seen_by(mask, 0, token)[position]):
        kinds[1] = BLIND_COLOUR, "the token, which does not see itself"
    handles = [Patch(facecolor=np.array(colour) / 255, edgecolor="0.6", label=text) for colour, text in kinds]
    drawn.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=8)
    return drawn
