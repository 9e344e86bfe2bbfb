"""The display of a block mask in a notebook."""

from __future__ import annotations

from base64 import b64encode
from html import escape

import numpy as np

from sparseflash.patterns.mask_data import MaskData
from sparseflash.pictures.pixels import Pixels, enlarged, picture, png_bytes

SIZE = 320  # pixels on a side, about
PANELS = 4
GAP = 8
FRAME = 160  # grey
MAX_TEXT = 400  # characters of the expression


def png(mask: MaskData) -> bytes:
    """A small picture of the mask; for several patterns, of the first ones side by side."""
    panels = [_panel(mask, p) for p in range(min(mask.patterns, PANELS))]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    row = [part for panel in panels for part in (gap, panel)][1:]
    return png_bytes(np.concatenate(row, axis=1))


def html(mask: MaskData) -> str:
    """The mask's figures as a table beside its picture."""
    (q_len, kv_len), (bq, bk), (nq, nk) = mask.shape, mask.block, mask.grid_shape
    samples, heads = mask.pattern_of.shape
    figures = [("tokens", f"{q_len:,} queries &times; {kv_len:,} keys")]
    if mask.q_offset != kv_len - q_len:
        figures.append(("first query at", f"{mask.q_offset:,}"))
    figures.append(("block", f"{bq} &times; {bk}: {nq:,} &times; {nk:,} blocks"))
    if samples * heads > 1:
        figures.append(("masks", f"{samples:,} &times; {heads:,} (samples &times; heads), {mask.patterns:,} distinct"))
    partial = mask.nnz - mask.full_blocks
    figures += [
        ("blocks stored", f"{mask.nnz:,}: {mask.full_blocks:,} full, {partial:,} partial"),
        ("tiles", f"{len(mask.tiles):,}"),
        ("density", f"{mask.density:.3%} of blocks, {mask.token_density:.3%} of tokens"),
    ]
    if mask.expression:
        cut = mask.expression[:MAX_TEXT] + " ..." * (len(mask.expression) > MAX_TEXT)
        figures.insert(0, ("pattern", f"<code>{escape(cut)}</code>"))
    rows = "".join(
        f'<tr><th style="text-align:left">{name}</th><td style="text-align:left">{value}</td></tr>'
        for name, value in figures
    )
    picture_uri = f"data:image/png;base64,{b64encode(png(mask)).decode()}"
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
        f'<img src="{picture_uri}" alt="blocks of the mask: full blue, partial orange">'
        f"<table><tbody>{rows}</tbody></table></div>"
    )


def _panel(mask: MaskData, pattern: int) -> Pixels:
    """One pattern in a thin frame."""
    pixels, _ = picture(mask, pattern, size=(SIZE, SIZE))
    framed = np.pad(enlarged(pixels, SIZE), ((1, 1), (1, 1), (0, 0)), constant_values=FRAME)
    return framed
