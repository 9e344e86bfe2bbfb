"""Write the drawings of the pages and the logo of the site, all of them from a real mask and its lookup table.

python -m docs.make_drawings          # rewrite those that have changed
python -m docs.make_drawings --check  # exit 1 when they are not what the code draws
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import sparseflash as sf
from docs.svg import EMPTY, FULL, GREY, INK, MASKED, PARTIAL, Drawing
from sparseflash.kernels.layout import BlockLists
from sparseflash.patterns.tiles import unpack
from sparseflash.pictures.pixels import token_kinds

FOLDER = Path(__file__).parent / "drawings"
EXAMPLE, TOKENS, BLOCK = "causal() & (local(20) | butterfly(unit=32))", 128, 16
HEAVY, HEAVY_TOKENS = "local(16) | global_tokens(1)", 1024
CELL = 26  # pixels per block in lists


def example() -> sf.BlockMask:
    return sf.parse(EXAMPLE).compile(TOKENS, block=BLOCK)


def codes(mask: sf.BlockMask) -> list[list[int]]:
    """Codes of the blocks of a mask of one pattern, [nQ, nK]."""
    nq, nk = mask.grid_shape
    found: list[list[int]] = mask.runs.code_at(np.arange(nq)[:, None] * nk + np.arange(nk)).tolist()
    return found


def runs(bits: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Where neighbouring bits are set: row, start and stop."""
    edges = np.argwhere(np.diff(np.pad(bits.astype(np.int8), ((0, 0), (1, 1)))))
    return [(row, start, stop) for (row, start), (_, stop) in edges.reshape(-1, 2, 2).tolist()]


def mask_drawing() -> str:
    """Every pair of the example, and the code of every block."""
    mask, pixels, left, top = example(), 4, 60, 30
    side, drawn = BLOCK * pixels, TOKENS * pixels
    drawing = Drawing(left + drawn + 10, top + drawn + 10, f"Token mask and block codes of {EXAMPLE}")
    kinds = token_kinds(mask, 0, ((0, TOKENS), (0, TOKENS)))
    for row, line in enumerate(codes(mask)):
        drawing.words(left - 8, top + row * side + side / 2, f"row {row}", anchor="end")
        drawing.words(left + row * side + side / 2, top - 12, f"key {row}", anchor="middle")
        for col, code in enumerate(line):
            fill = EMPTY if code == 0 else FULL if code == 1 else MASKED
            drawing.box(left + col * side, top + row * side, side, side, fill, line=None)
    for q, start, stop in runs(kinds == 2):
        drawing.box(left + start * pixels, top + q * pixels, (stop - start) * pixels, pixels, PARTIAL, line=None)
    for at in range(TOKENS // BLOCK + 1):
        drawing.line(left, top + at * side, left + drawn, top + at * side)
        drawing.line(left + at * side, top, left + at * side, top + drawn)
    for row, line in enumerate(codes(mask)):
        for col, code in enumerate(line):
            x, y = left + (col + 0.5) * side, top + (row + 0.5) * side
            drawing.words(x, y, str(code), EMPTY if code == 1 else GREY if code == 0 else INK, "middle", size=18)
    return drawing.text()


def tiles_drawing() -> str:
    """The distinct tiles of the example, bit by bit."""
    mask, pixels = example(), 9
    found = [code for line in codes(mask) for code in line]
    gap, side = 40, BLOCK * pixels
    drawing = Drawing(len(mask.tiles) * (side + gap), side + 60, f"Tiles of {EXAMPLE}")
    for number, bits in enumerate(unpack(mask.tiles, BLOCK)):
        left, uses = gap / 2 + number * (side + gap), found.count(number + 2)
        drawing.box(left, 10, side, side, MASKED, line=None)
        for row, start, stop in runs(bits):
            drawing.box(left + start * pixels, 10 + row * pixels, (stop - start) * pixels, pixels, PARTIAL, line=None)
        for at in range(BLOCK + 1):
            drawing.line(left, 10 + at * pixels, left + side, 10 + at * pixels, EMPTY)
            drawing.line(left + at * pixels, 10, left + at * pixels, 10 + side, EMPTY)
        drawing.words(left + side / 2, side + 28, f"tile {number}, code {number + 2}", anchor="middle")
        drawing.words(left + side / 2, side + 46, f"in {uses} block{'s' * (uses != 1)}", GREY, "middle")
    return drawing.text()


def side_drawing(side: BlockLists, name: str, other: str) -> str:
    """What each line of one side of a table reads: its FULL entries, then its PARTIAL ones with their tiles."""
    full, partial, tile = (x.tolist() for x in (side.full_indices, side.partial_indices, side.partial_tiles))
    ranges = side.ranges[0].tolist()
    lists = 210 + CELL * max(stop - start for start, stop, _, _ in ranges)
    drawing = Drawing(lists + 330, 40 + (CELL + 8) * len(ranges), f"What each block {name} of {EXAMPLE} reads")
    for x, text in ((90, f"FULL: {other}s"), (lists, f"PARTIAL: {other}s and their tiles")):
        drawing.words(x, 16, text, GREY)
    for line, (f0, f1, p0, p1) in enumerate(ranges):
        y = 34 + line * (CELL + 8)
        middle = y + CELL / 2
        drawing.words(10, middle, f"{name} {line}")
        drawing.words(90, middle, f"full[{f0}:{f1}]")
        drawing.words(lists, middle, f"partial[{p0}:{p1}]")
        for at, entry in enumerate(full[f0:f1]):
            x = 190 + at * CELL
            drawing.box(x, y, CELL, CELL, FULL, line=EMPTY)
            drawing.words(x + CELL / 2, middle, str(entry), EMPTY, "middle")
        for at, (entry, which) in enumerate(zip(partial[p0:p1], tile[p0:p1], strict=True)):
            x = lists + 120 + at * CELL
            drawing.box(x, y, CELL, CELL, PARTIAL, line=EMPTY)
            drawing.words(x + CELL / 2, middle - 5, str(entry), INK, "middle")
            drawing.words(x + CELL / 2, middle + 7, f"t{which}", INK, "middle", size=10)
    return drawing.text()


def shared_drawing() -> str:
    """The rows of a causal mask, which all point into one list."""
    side = sf.lookup(sf.parse("causal()").compile(TOKENS, block=BLOCK)).rows
    ranges, common = side.ranges[0].tolist(), max(stop for _, stop, _, _ in side.ranges[0].tolist())
    left = 190
    drawing = Drawing(left + CELL * len(ranges) + 20, 50 + CELL * (len(ranges) + 1), "Rows of causal() share one list")
    drawing.words(10, 10 + CELL / 2, "full, once")
    for at, entry in enumerate(side.full_indices.tolist()[:common]):
        drawing.box(left + at * CELL, 10, CELL, CELL, FULL, line=EMPTY)
        drawing.words(left + (at + 0.5) * CELL, 10 + CELL / 2, str(entry), EMPTY, "middle")
    for row, (start, stop, _, _) in enumerate(ranges):
        y = 50 + row * CELL
        drawing.words(10, y + CELL / 2, f"row {row}: full[{start}:{stop}]")
        if stop > start:
            drawing.box(left + start * CELL, y + 7, (stop - start) * CELL, CELL - 14, FULL, line=None)
        else:
            drawing.words(left, y + CELL / 2, "none", GREY)
    return drawing.text()


def splits_drawing() -> str:
    """Blocks of each row where one row sees everything: as rows, and as programs get them."""
    mask = sf.parse(HEAVY).compile(HEAVY_TOKENS, block=BLOCK)
    rows = mask.row_counts[0].tolist()
    items = [item for item in sf.lookup(mask).rows.work_items[0].tolist() if item[0] >= 0]
    splits = [(f1 - f0 + p1 - p0, slot) for _, f0, f1, p0, p1, slot in items]
    wide, tall, shown = 7, 2, 24
    base = 40 + tall * max(rows)
    drawing = Drawing(90 + 2 * shown * wide + 160, base + 40, f"Rows of {HEAVY}, whole and split")
    for left, bars, title in (
        (40, [(blocks, -1) for blocks in rows], "rows"),
        (110 + shown * wide, splits, "work items, heaviest first"),
    ):
        drawing.words(left, 16, title)
        for at, (blocks, slot) in enumerate(bars[:shown]):
            fill = PARTIAL if slot >= 0 else FULL
            drawing.box(left + at * wide, base - tall * blocks, wide, tall * blocks, fill, line=EMPTY)
        tallest = max(blocks for blocks, _ in bars)
        drawing.words(left - 6, base - tall * tallest + 4, str(tallest), anchor="end")
        drawing.words(left, base + 16, f"{shown} of {len(bars)} shown", GREY)
    return drawing.text()


def rows_drawing() -> str:
    return side_drawing(sf.lookup(example()).rows, "row", "key block")


def columns_drawing() -> str:
    return side_drawing(sf.lookup(example()).columns, "column", "query block")


LANES, GROUP = 32, 8  # of a panel with vectors of 16 floats; keys that are worked on together


def walk_drawing() -> str:
    """A PARTIAL tile of an image's neighbourhoods as the CPU kernel meets it: cells that it computes, and skips."""
    mask, pixels, left, top = sf.parse("neighborhood((32, 32), 4)").compile(1024), 4, 90, 54
    side = mask.block[0]
    row = int(np.flatnonzero(codes(mask)[3])[0])
    bits = unpack(mask.tiles, side)[codes(mask)[3][row] - 2].T  # keys by queries
    drawn = side * pixels
    drawing = Drawing(left + drawn + 260, top + drawn + 16, "A partial block as the CPU kernel walks it")
    for panel in range(side // LANES):
        middle = left + (panel + 0.5) * LANES * pixels
        drawing.words(middle, 14, f"panel {panel}", anchor="middle")
        drawing.words(middle, 34, "32 queries", GREY, anchor="middle")
    skipped = 0
    for group in range(side // GROUP):
        y = top + group * GROUP * pixels
        if group % 4 == 0:
            drawing.words(left - 8, y + GROUP * pixels / 2, f"keys {group * GROUP}", anchor="end")
        for panel in range(side // LANES):
            cell = bits[group * GROUP : (group + 1) * GROUP, panel * LANES : (panel + 1) * LANES]
            skipped += not cell.any()
            fill = MASKED if cell.any() else EMPTY
            drawing.box(left + panel * LANES * pixels, y, LANES * pixels, GROUP * pixels, fill)
    for key, start, stop in runs(bits):
        drawing.box(left + start * pixels, top + key * pixels, (stop - start) * pixels, pixels, PARTIAL, line=None)
    cells = side * side // LANES // GROUP
    x, y = left + drawn + 20, top + 10
    for number, (fill, words) in enumerate(
        [(PARTIAL, "pairs that the mask shows"), (MASKED, "computed, then hidden"), (EMPTY, "skipped")]
    ):
        drawing.box(x, y + 30 * number, 18, 18, fill)
        drawing.words(x + 28, y + 30 * number + 9, words)
    drawing.words(x, y + 110, f"{cells - skipped} of {cells} cells of")
    drawing.words(x, y + 130, f"{LANES} queries x {GROUP} keys computed")
    return drawing.text()


LOGO, LOGO_TOKENS = "causal() & butterfly(unit=16)", 128
NAVY = "#12263a"  # behind the icon, and the header of the site: docs/site.css


def logo_drawing(full: str, paper: str | None) -> str:
    """The blocks of a causal butterfly, without words: for the header of the site, and as its icon."""
    mask = sf.parse(LOGO).compile(LOGO_TOKENS, block=BLOCK)
    cell, gap, edge = 12, 2, 0 if paper is None else 8
    size = 2 * edge + cell * mask.grid_shape[0] - gap
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}">', f"<title>{escape(LOGO)}</title>"]
    if paper is not None:
        parts.append(f'<rect width="{size}" height="{size}" rx="16" fill="{paper}"/>')
    for row, line in enumerate(codes(mask)):
        for col, code in enumerate(line):
            if code:
                fill = full if code == 1 else PARTIAL
                x, y = edge + col * cell, edge + row * cell
                parts.append(f'<rect x="{x}" y="{y}" width="{cell - gap}" height="{cell - gap}" rx="2" fill="{fill}"/>')
    return "\n".join([*parts, "</svg>", ""])


HERO, HERO_TOKENS, HERO_BLOCK = "causal() & (local(128) | butterfly(unit=128))", 4096, 128
ON_NAVY, SOFT, SEEN = "#e8eef5", "#9fb3c8", "#4aa8e0"


def hero_drawing() -> str:
    """The blocks of a mask beside what they mean, on the dark head of the site."""
    mask, cell, top = sf.parse(HERO).compile(HERO_TOKENS, block=HERO_BLOCK), 9, 34
    side = cell * mask.grid_shape[0]
    drawing = Drawing(side + 262, side + top + 4, f"Blocks of {HERO}", "none", "ui-monospace, monospace")
    drawing.words(2, 12, HERO, ON_NAVY, size=14)
    drawing.box(1, top, side, side, "#1b3450", line=None)
    for row, line in enumerate(codes(mask)):
        for col, code in enumerate(line):
            if code:
                x, y = 1 + col * cell, top + row * cell
                drawing.box(x + 0.5, y + 0.5, cell - 1, cell - 1, SEEN if code == 1 else PARTIAL, line=None)
    found = [code for line in codes(mask) for code in line]
    kept = len(found) - found.count(0)
    for number, (fill, words, note) in enumerate(
        [
            (SEEN, "full block", f"{found.count(1)}: no masking"),
            (PARTIAL, "partial block", f"{kept - found.count(1)}: masked bit by bit"),
            ("#1b3450", "empty block", f"{found.count(0)} of {len(found):,}: skipped"),
        ]
    ):
        y = top + 20 + 62 * number
        drawing.box(side + 26, y, 16, 16, fill, line=SOFT if number == 2 else None)
        drawing.words(side + 54, y + 8, words, ON_NAVY, size=15)
        drawing.words(side + 54, y + 28, note, SOFT)
    drawing.words(side + 26, top + side - 34, f"{HERO_TOKENS:,} tokens,", SOFT)
    drawing.words(side + 26, top + side - 14, f"blocks of {HERO_BLOCK} x {HERO_BLOCK}", SOFT)
    return drawing.text()


ROOMS = (
    ("programs", ("cli", "tools"), FULL),
    ("the main job", ("train", "models", "pathfinder", "lra"), FULL),
    ("for others", ("flex", "integrations", "distributed", "nn", "pictures"), FULL),
    ("the operation", ("functional", "reference", "routing"), PARTIAL),
    ("tables", ("tables",), PARTIAL),
    ("masks and kernels", ("patterns", "kernels"), PARTIAL),
)


def architecture_drawing() -> str:
    """The rooms in rows; a row imports from those below it."""
    left, wide, high, gap = 150, 104, 34, 20
    widest = max(len(rooms) for _, rooms, _ in ROOMS)
    width = left + widest * (wide + 10) + 10
    drawing = Drawing(width, 20 + len(ROOMS) * (high + gap), "Rooms of sparseflash; imports point down")
    for row, (title, rooms, fill) in enumerate(ROOMS):
        y = 10 + row * (high + gap)
        drawing.words(10, y + high / 2, title, GREY)
        step = (width - left - 10) / len(rooms)
        for at, room in enumerate(rooms):
            x = left + at * step
            drawing.box(x, y, step - 10, high, fill, line=None)
            drawing.words(x + (step - 10) / 2, y + high / 2, room, EMPTY if fill == FULL else INK, "middle")
        if row + 1 < len(ROOMS):
            middle, top = left + (width - left - 20) / 2, y + high
            drawing.line(middle, top + 3, middle, top + gap - 3)
            for side in (-4, 4):
                drawing.line(middle + side, top + gap - 8, middle, top + gap - 3)
    return drawing.text()


DRAWINGS: dict[str, Callable[[], str]] = {
    "hero.svg": hero_drawing,
    "logo.svg": lambda: logo_drawing("#ffffff", None),
    "favicon.svg": lambda: logo_drawing("#5cb8ee", NAVY),
    "mask.svg": mask_drawing,
    "tiles.svg": tiles_drawing,
    "rows.svg": rows_drawing,
    "columns.svg": columns_drawing,
    "shared.svg": shared_drawing,
    "splits.svg": splits_drawing,
    "rooms.svg": architecture_drawing,
    "walk.svg": walk_drawing,
}


def outdated() -> list[str]:
    """Names of the files that are not what the code draws."""
    wrong = [n for n, draw in DRAWINGS.items() if not (FOLDER / n).exists() or (FOLDER / n).read_text() != draw()]
    return wrong + sorted({path.name for path in FOLDER.glob("*")} - set(DRAWINGS))


def main() -> None:
    if "--check" in sys.argv[1:]:
        wrong = outdated()
        if wrong:
            sys.exit(f"not what the code draws: {', '.join(wrong)}; run make gallery")
        return
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*"):
        if path.name not in DRAWINGS:
            path.unlink()
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    main()
