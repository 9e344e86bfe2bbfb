"""A block mask as an array of pixels, and pixels as PNG bytes."""

from __future__ import annotations

from io import BytesIO
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.grid import Ints, is_int
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.runs import FIRST_TILE, FULL
from sparseflash.patterns.tiles import unpack

Pixels: TypeAlias = NDArray[np.uint8]  # RGB [h, w, 3]
Span: TypeAlias = tuple[int, int]  # half-open
Window: TypeAlias = tuple[Span, Span]  # of queries and of keys

# Okabe & Ito's colours: distinguishable with every common kind of colour vision, and in grey.
EMPTY_COLOUR, FULL_COLOUR, PARTIAL_COLOUR = (255, 255, 255), (0, 114, 178), (230, 159, 0)
MASKED_COLOUR = (252, 238, 206)  # pairs of a partial block that are not allowed: computed, then dropped
PALETTE = np.array([EMPTY_COLOUR, FULL_COLOUR, PARTIAL_COLOUR, MASKED_COLOUR], np.uint8)
MAX_PIXELS = 1024
# The least colour of a pixel with a stored block: paler ones would be lost among white neighbours.
LEAST_INK = 0.6
# The largest share of a picture that enlarged isolated pixels may take; more would look like a denser mask.
MOST_GROWN = 0.01


def checked_window(mask: MaskData, window: Any) -> Window:
    """The window, or all of the mask for None.

    Raises:
        TypeError: window is not two pairs of ints.
        ValueError: a span is empty or not inside the mask.
    """
    if window is None:
        return (0, mask.shape[0]), (0, mask.shape[1])
    try:
        (q0, q1), (k0, k1) = window
    except (TypeError, ValueError):
        raise TypeError(f"window must be ((q0, q1), (k0, k1)), half-open, in tokens; got window={window!r}") from None
    if not all(is_int(edge) for edge in (q0, q1, k0, k1)):
        raise TypeError(f"window must be made of ints, got window={window!r}")
    for what, first, stop, length in (("queries", q0, q1, mask.shape[0]), ("keys", k0, k1, mask.shape[1])):
        if not 0 <= first < stop <= length:
            raise ValueError(
                f"window: {what} {first}..{stop} must satisfy 0 <= first < stop <= {length}, the mask's {what}; "
                f"got window={window!r}"
            )
    return (int(q0), int(q1)), (int(k0), int(k1))


def token_kinds(mask: MaskData, pattern: int, window: Window) -> NDArray[np.uint8]:
    """The kind of each pair of the window, as an index into PALETTE, uint8 [queries, keys].

    0: in an EMPTY block; 1: in a FULL one; 2: allowed, in a PARTIAL one; 3: not allowed, in a PARTIAL one.
    """
    (q0, q1), (k0, k1) = window
    (bq, bk), (nq, nk) = mask.block, mask.grid_shape
    rows, cols = np.arange(q0 // bq, -(-q1 // bq)), np.arange(k0 // bk, -(-k1 // bk))
    codes = mask.runs.code_at((pattern * nq + rows)[:, None] * nk + cols)
    used, which = np.unique(codes, return_inverse=True)
    kinds = np.zeros((used.size, bq, bk), np.uint8)
    kinds[used == FULL] = 1
    partial = used >= FIRST_TILE
    kinds[partial] = np.where(unpack(mask.tiles[used[partial] - FIRST_TILE], bk), 2, 3)
    pairs = kinds[which.reshape(codes.shape)].swapaxes(1, 2).reshape(rows.size * bq, cols.size * bk)
    return pairs[q0 - rows[0] * bq : q1 - rows[0] * bq, k0 - cols[0] * bk : k1 - cols[0] * bk]


def block_counts(mask: MaskData, pattern: int, rows: Span, cols: Span, size: tuple[int, int]) -> tuple[Ints, Ints]:
    """Numbers of FULL and PARTIAL blocks in each of [h, w] pixels that divide the block rows and columns. O(runs)."""
    (height, width), (nq, nk) = size, mask.grid_shape
    runs = mask.runs
    row = runs.row - (pattern * nq + rows[0])
    start = np.maximum(runs.start - runs.row * nk, cols[0]) - cols[0]
    stop = np.minimum(runs.stop - runs.row * nk, cols[1]) - cols[0]
    here = (row >= 0) & (row < rows[1] - rows[0]) & (start < stop)
    line = row[here] * height // (rows[1] - rows[0])
    first = -(-np.arange(width + 2) * (cols[1] - cols[0]) // width)  # first block of each pixel
    counts = []
    for chosen in (runs.code[here] == FULL, runs.code[here] != FULL):
        own, later = np.zeros((2, height, width + 2))
        for edge, sign in ((start[here][chosen], 1), (stop[here][chosen], -1)):
            # A run that begins inside a pixel covers the rest of it, and all of each later one until it ends.
            pixel = edge * width // (cols[1] - cols[0])
            flat = line[chosen] * (width + 2) + pixel
            own += sign * np.bincount(flat, first[pixel + 1] - edge, own.size).reshape(own.shape)
            later += sign * np.bincount(flat + 1, minlength=own.size).reshape(own.shape)
        held = own[:, :width] + np.cumsum(later, axis=1)[:, :width] * np.diff(first)[:width]
        counts.append(held.astype(np.int64))
    return counts[0], counts[1]


def block_pixels(mask: MaskData, pattern: int, rows: Span, cols: Span, size: tuple[int, int]) -> Pixels:
    """The given block rows and columns as [h, w] pixels, at most one per block.

    A pixel that stands for many blocks mixes the colours of the stored ones, and is paler the fewer there are, down to
    LEAST_INK. If few pixels have no neighbours, these are enlarged to 3 x 3 pixels.
    """
    (height, width), (many, wide) = size, (rows[1] - rows[0], cols[1] - cols[0])
    full, partial = block_counts(mask, pattern, rows, cols, size)
    blocks = np.outer(*(np.bincount(np.arange(n) * m // n, minlength=m) for n, m in ((many, height), (wide, width))))
    stored = full + partial
    colour = full[..., None] * np.array(FULL_COLOUR) + partial[..., None] * np.array(PARTIAL_COLOUR)
    colour = colour / np.maximum(stored, 1)[..., None]
    ink = np.where(stored > 0, LEAST_INK + (1 - LEAST_INK) * stored / blocks, 0)[..., None]
    pixels: Pixels = np.rint(255 + ink * (colour - 255)).astype(np.uint8)
    if (height, width) != (many, wide):
        _grow_alone(pixels, stored != 0)
    return pixels


def _grow_alone(pixels: Pixels, stored: NDArray[np.bool_]) -> None:
    """Enlarge stored pixels whose neighbours are all empty; not if there are many, which are visible anyway."""
    height, width = stored.shape
    ringed = np.pad(stored, 1).astype(np.uint8)
    around = sum(ringed[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3))
    y, x = np.nonzero(stored & (around == 1))
    if 9 * y.size > MOST_GROWN * stored.size:
        return
    colour = pixels[y, x]
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            pixels[np.clip(y + dy, 0, height - 1), np.clip(x + dx, 0, width - 1)] = colour


def shows_tokens(window: Window, size: tuple[int, int]) -> bool:
    """Whether every pair of the window has its own pixel in a picture of [h, w]."""
    return all(stop - first <= n for (first, stop), n in zip(window, size, strict=True))


def picture(
    mask: MaskData, pattern: int = 0, window: Window | None = None, size: tuple[int, int] = (MAX_PIXELS, MAX_PIXELS)
) -> tuple[Pixels, Window]:
    """RGB pixels of a window and the tokens that they cover.

    A pixel is a pair of tokens if the window fits into ``size``, the largest [h, w]; else one or more blocks, and the
    window is extended to whole blocks, including ragged ones.
    """
    (q0, q1), (k0, k1) = window = checked_window(mask, window)
    if shows_tokens(window, size):
        pairs: Pixels = PALETTE[token_kinds(mask, pattern, window)]
        return pairs, window
    bq, bk = mask.block
    rows, cols = (q0 // bq, -(-q1 // bq)), (k0 // bk, -(-k1 // bk))
    fitted = min(rows[1] - rows[0], size[0]), min(cols[1] - cols[0], size[1])
    covered = (rows[0] * bq, rows[1] * bq), (cols[0] * bk, cols[1] * bk)
    return block_pixels(mask, pattern, rows, cols, fitted), covered


def enlarged(pixels: Pixels, size: int) -> Pixels:
    """The picture with pixels repeated, so that its longer side is about ``size``."""
    times = max(1, round(size / max(pixels.shape[:2])))
    larger: Pixels = pixels.repeat(times, axis=0).repeat(times, axis=1)
    return larger


def png_bytes(pixels: Pixels) -> bytes:
    """Pixels as a PNG file, with a palette if there are at most 256 colours."""
    from PIL import Image

    packed = (pixels.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(axis=2, dtype=np.uint32)
    colours, index = np.unique(packed, return_inverse=True)
    if colours.size <= 256:
        height, width = packed.shape
        image = Image.frombytes("P", (width, height), index.astype(np.uint8).tobytes())
        image.putpalette([int(c) >> shift & 255 for c in colours for shift in (16, 8, 0)])
    else:
        image = Image.fromarray(pixels)
    stream = BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()
