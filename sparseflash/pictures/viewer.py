"""Write a block mask as a zoomable HTML page: one file, which works in a browser without a network.

The page's parts are in ``page/``: markup, style, and the scripts in the order of :data:`SCRIPTS`. The mask is embedded
in it: the number of runs of each block row; the gap before each run, its length and its code; and the tiles. Each array
is little-endian 32-bit words, deflated, in base64.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseflash.patterns.atomic_write import atomic_write
from sparseflash.patterns.mask_data import MaskData
from sparseflash.patterns.runs import FULL
from sparseflash.patterns.tiles import tile_table
from sparseflash.pictures.pixels import EMPTY_COLOUR, FULL_COLOUR, LEAST_INK, MASKED_COLOUR, PARTIAL_COLOUR
from sparseflash.pictures.seen import BLIND_COLOUR, UNSEEN_COLOUR, images_in

PARTS = Path(__file__).with_name("page")
SCRIPTS = ("mask.js", "patches.js", "view.js", "drawing.js", "seen.js", "reading.js", "main.js")
MAX_UNPACKED = 128 << 20  # bytes of runs and tiles in the browser's memory
MAX_PAGE = 16 << 20  # bytes of the file


def write(mask: MaskData, path: str | PathLike[str], *, title: str | None = None) -> None:
    """Write the page atomically: an incomplete file is never left behind.

    Raises:
        ValueError: more runs or tiles than a page can hold.
        FileNotFoundError: no such folder.
    """
    with atomic_write(Path(path)) as file:
        file.write(page(mask, title).encode("utf-8", errors="replace"))


def page(mask: MaskData, title: str | None = None) -> str:
    """The page's text.

    Raises:
        ValueError: more runs or tiles than a page can hold.
    """
    title = title or mask.expression or "Block mask"
    # Inside a script element `</script>` and `<!--` would end or hide the data, so they are escaped.
    data = json.dumps(content_of(mask, title), separators=(",", ":")).translate(
        {ord(c): f"\\u{ord(c):04x}" for c in "<>&"}
    )
    script = "\n".join((PARTS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    values = {
        "TITLE": html.escape(title),
        "SHORT_TITLE": html.escape(shorten(title, 120, placeholder=" ...")),
        "STYLE": (PARTS / "style.css").read_text(encoding="utf-8").strip(),
        "SCRIPT": f'"use strict";\n(() => {{\n{script}}})();',
        "DATA": data,
    }
    # In one pass, so that a title that looks like a placeholder is not replaced.
    template = (PARTS / "page.html").read_text(encoding="utf-8")
    text = re.sub("@@([A-Z_]+)@@", lambda found: values[found[1]], template)
    if len(text) > MAX_PAGE:
        raise _too_large(mask, f"the page would take {len(text):,} bytes, at most {MAX_PAGE:,} are written")
    return text


def content_of(mask: MaskData, title: str) -> dict[str, Any]:
    """The data of the page, ready for JSON.

    Raises:
        ValueError: more runs or tiles than a page can hold.
    """
    runs, (nq, nk) = mask.runs, mask.grid_shape
    unpacked = 4 * (3 * len(runs) + mask.patterns * nq) + mask.tiles.nbytes
    if unpacked > MAX_UNPACKED or nk >= 1 << 31:
        raise _too_large(mask, f"a browser would have to hold {unpacked:,} bytes, at most {MAX_UNPACKED:,} are allowed")
    gap = runs.start.copy()
    gap[1:] -= runs.stop[:-1]
    first = np.flatnonzero(np.diff(runs.row, prepend=-1))
    gap[first] = runs.start[first] % nk
    arrays: dict[str, NDArray[Any]] = {
        "counts": np.bincount(runs.row, minlength=mask.patterns * nq),
        "gap": gap,
        "length": runs.length,
        "code": runs.code,
        "tiles": mask.tiles,
        "pattern_of": mask.pattern_of,
    }
    return {
        "format": "sparseflash.MaskPage/1",
        "title": title,
        "expression": mask.expression,
        "shape": mask.shape,
        "block": mask.block,
        "q_offset": mask.q_offset,
        "heads": mask.pattern_of.shape,
        "density": mask.density,
        "token_density": mask.token_density,
        "tiles": len(mask.tiles),
        "patterns": _patterns(mask),
        "colours": {
            "empty": EMPTY_COLOUR,
            "full": FULL_COLOUR,
            "partial": PARTIAL_COLOUR,
            "masked": MASKED_COLOUR,
            "unseen": UNSEEN_COLOUR,
            "blind": BLIND_COLOUR,
        },
        "images": [
            {
                "start": image.start,
                "shape": image.positions.shape,
                "place": None if image.order == "raster" else _packed(image.positions.ravel() - image.start),
            }
            for image in images_in(mask)
        ],
        "least_ink": LEAST_INK,
        "arrays": {name: _packed(array) for name, array in arrays.items()},
    }


def _packed(array: NDArray[Any]) -> str:
    words = array if array.dtype == np.uint32 else array.astype(np.int32)
    little = words.astype(words.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(zlib.compress(little.tobytes())).decode()


def _patterns(mask: MaskData) -> list[dict[str, Any]]:
    """The name and densities of each distinct pattern."""
    runs, (nq, nk), (q_len, kv_len) = mask.runs, mask.grid_shape, mask.shape
    owner = runs.row // nq
    pairs = np.bitwise_count(tile_table(mask.tiles, *mask.block)).sum(axis=(1, 2), dtype=np.int64)
    allowed = np.bincount(owner, pairs[runs.code] * runs.length, mask.patterns)
    full = np.bincount(owner, runs.length * (runs.code == FULL), mask.patterns)
    return [
        {
            "name": users(mask.pattern_of, p),
            "blocks": int(blocks),
            "full_blocks": int(full[p]),
            "density": int(blocks) / (nq * nk),
            "token_density": float(allowed[p]) / (q_len * kv_len),
        }
        for p, blocks in enumerate(mask.row_counts.sum(axis=1))
    ]


def users(pattern_of: NDArray[np.int32], pattern: int) -> str:
    """The samples and heads that have a pattern.

    Example:
        >>> users(np.array([[0, 1, 0, 0]], np.int32), 0)
        'heads 0, 2-3'
    """
    samples, heads = pattern_of.shape
    if samples == heads == 1:
        return "all heads"
    if samples == 1:
        return f"heads {_ranges(pattern_of[0] == pattern)}"
    if heads == 1:
        return f"samples {_ranges(pattern_of[:, 0] == pattern)}"
    having = np.flatnonzero((pattern_of == pattern).any(axis=1))
    text = "; ".join(f"sample {s}: heads {_ranges(pattern_of[s] == pattern)}" for s in having[:4])
    return text + (f"; and {having.size - 4} more samples" if having.size > 4 else "")


def _ranges(chosen: NDArray[np.bool_]) -> str:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]])))
    spans = [(int(a), int(b) - 1) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    text = ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans[:8])
    return text + (", ..." if len(spans) > 8 else "")


def _too_large(mask: MaskData, why: str) -> ValueError:
    return ValueError(
        f"{mask!r} is too large for a page: {len(mask.runs):,} runs and {len(mask.tiles):,} tiles in {mask.patterns:,} "
        f"patterns; {why}. Write the page of a shorter sequence, of fewer heads, or with larger blocks; or draw it "
        "with plot()"
    )
