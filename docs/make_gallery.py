"""Write docs/gallery.md and its pictures.

python -m docs.make_gallery          # rewrite the page, and the pictures that have changed
python -m docs.make_gallery --check  # exit 1 when they are not what the code draws
"""

from __future__ import annotations

import sys
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np

from docs.gallery_entries import BLOCK, IMAGE, SECTIONS, TOKENS, Entry, entries
from sparseflash.patterns import BlockMask
from sparseflash.pictures.pixels import EMPTY_COLOUR, FULL_COLOUR, MASKED_COLOUR, PARTIAL_COLOUR, Pixels, png_bytes
from sparseflash.pictures.pixels import picture as drawn

PAGE = Path(__file__).parent / "gallery.md"
PICTURES = Path(__file__).parent / "gallery"
GAP, FRAME, GREY = 64, 3, 160  # pixels between the masks of one picture and around each, and the frame's colour
WIDTH = 384  # of a mask on the page, in CSS pixels
# What is white, blue, orange, pale orange and grey on a light page, on a dark one.
DARK = {
    EMPTY_COLOUR: (30, 35, 41),
    FULL_COLOUR: (74, 168, 224),
    PARTIAL_COLOUR: (240, 176, 64),
    MASKED_COLOUR: (82, 64, 34),
    (GREY,) * 3: (96, 104, 112),
}
HEAD = f"""# Gallery of patterns

Every pattern of `sparseflash.patterns` on the same {TOKENS:,} tokens (images: {IMAGE[0]} x {IMAGE[1]} pixels), in
blocks of {BLOCK} x {BLOCK}: queries from top to bottom, keys from left to right, one pixel a pair. `make gallery`
draws the pictures and computes every figure.

- **Blue**: an allowed pair in a FULL block, which kernels run without masking.
- **Orange**: an allowed pair in a PARTIAL block, which has a tile of bits.
- **Pale orange** (brown on dark pages): a pair of a PARTIAL block that is masked. It costs time all the same: where
  much is pale, the pattern wastes work at this block size.
- **White** (or dark): EMPTY blocks, which cost nothing.

*Blocks* is the share of stored blocks, *tokens* the share of allowed pairs, *tiles* the number of distinct PARTIAL
blocks. Real sequences are longer and blocks larger (128 x 128 by default); the same pictures of any pattern:

```python
from sparseflash import patterns as P

P.parse("causal() & local(64)").compile(1024, block=16).plot("mask.png")
```
"""


def compiled(entry: Entry) -> BlockMask:
    return entry.pattern.compile(TOKENS, block=BLOCK)


def pixels(mask: BlockMask) -> Pixels:
    """Every pair of every distinct pattern, side by side, each in a frame: pages are white, as EMPTY is."""
    around = ((FRAME, FRAME), (FRAME, FRAME), (0, 0))
    panels = [np.pad(drawn(mask, p)[0], around, constant_values=GREY) for p in range(mask.patterns)]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)


def darkened(light: Pixels) -> Pixels:
    """The same picture for a dark page."""
    dark = np.empty_like(light)
    for colour, instead in DARK.items():
        dark[(light == np.array(colour, np.uint8)).all(axis=2)] = instead
    return dark


def pictures(entry: Entry) -> dict[str, Pixels]:
    """The pictures of an entry by their file names."""
    light = pixels(compiled(entry))
    return {entry.file: light, entry.dark_file: darkened(light)}


def described(entry: Entry) -> str:
    """A card: on the site they stand in a grid, on GitHub below each other."""
    mask = compiled(entry)
    also = ""
    if entry.python is None and str(entry.pattern) != entry.text:
        also = f", which is `{entry.pattern}`"
    tiles = f"{len(mask.tiles)} tile{'s' * (len(mask.tiles) != 1)}"
    source = f"\n\n{entry.source}." if entry.source else ""
    wide = " sf-card--wide" * (mask.patterns > 1)
    alt = escape(f"The mask of {entry.text}. {entry.sentence}")
    return (
        f'<div class="sf-card{wide}" markdown>\n\n### {entry.title}\n\n'
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{PICTURES.name}/{entry.dark_file}">\n'
        f'  <img src="{PICTURES.name}/{entry.file}" width="{WIDTH * mask.patterns}" loading="lazy" alt="{alt}">\n'
        f"</picture>\n\n`{entry.text}`{also}\n\n{entry.sentence}{source}\n\n"
        f"Blocks {mask.density:.2%}, tokens {mask.token_density:.2%}, {tiles}.\n\n</div>\n"
    )


def contents() -> str:
    """A line of links for each section."""
    return "\n".join(
        f"- {section}: " + ", ".join(f"[{entry.title}](#{entry.title.replace(' ', '-')})" for entry in shown)
        for section, shown in SECTIONS.items()
    )


def page() -> str:
    parts = [HEAD, f"{contents()}\n"]
    for section, shown in SECTIONS.items():
        parts += [f"## {section}\n", '<div class="sf-cards" markdown>\n', *map(described, shown), "</div>\n"]
    return "\n".join(parts)


def is_current(path: Path, wanted: Pixels) -> bool:
    """Whether the file holds these pixels; its bytes may differ, as versions of zlib do."""
    from PIL import Image

    if not path.exists():
        return False
    found = np.asarray(Image.open(BytesIO(path.read_bytes())).convert("RGB"))
    return np.array_equal(found, wanted)


def outdated() -> list[str]:
    """Names of the files that are not what the code draws."""
    wrong = [] if PAGE.exists() and PAGE.read_text() == page() else [PAGE.name]
    wanted = {name: picture for entry in entries() for name, picture in pictures(entry).items()}
    wrong += [name for name, picture in wanted.items() if not is_current(PICTURES / name, picture)]
    return wrong + sorted({path.name for path in PICTURES.glob("*")} - set(wanted))


def main() -> None:
    if "--check" in sys.argv[1:]:
        wrong = outdated()
        if wrong:
            sys.exit(f"not what the code draws: {', '.join(wrong)}; run make gallery")
        return
    PICTURES.mkdir(exist_ok=True)
    wanted = {name: picture for entry in entries() for name, picture in pictures(entry).items()}
    for path in PICTURES.glob("*.png"):
        if path.name not in wanted:
            path.unlink()
    for name, picture in wanted.items():
        if not is_current(PICTURES / name, picture):
            (PICTURES / name).write_bytes(png_bytes(picture))
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
