"""Draw the pictures of the front page: a mask beside the time of attention through it, and three badges.

The times are those of one committed result file; light and dark are the same drawing in other colours. The badges say
what pyproject.toml says.

python -m docs.make_front          # rewrite docs/front/
python -m docs.make_front --check  # exit 1 when the files are not what the code draws
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import sparseflash as sf
from docs.svg import Drawing

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/front"
RESULTS = ROOT / "benchmarks/results/amd-epyc/2026-11-30-cpu.json"
MASK, TOKENS, BLOCK = "local(128) | butterfly(unit=128)", 4096, 128
HEAD_DIM, DTYPE = 64, "float32"
LENGTHS = (4096, 16384, 65536)
SMALLEST, LARGEST = 1.0, 100_000.0  # milliseconds on the vertical axis
WIDTH, HEIGHT, TOP, BOTTOM = 960, 346, 56, 270


class Theme(NamedTuple):
    """Colours of a drawing."""

    paper: str
    ink: str
    faint: str
    full: str
    partial: str
    ours: str
    sdpa: str
    flex: str


THEMES = {
    "light": Theme("#ffffff", "#1f2328", "#d0d7de", "#2f5fb3", "#e08214", "#2f5fb3", "#57606a", "#b35900"),
    "dark": Theme("#0d1117", "#e6edf3", "#30363d", "#6ea8fe", "#f0a04b", "#6ea8fe", "#9da7b3", "#f0a04b"),
}


class Series(NamedTuple):
    """A line of a chart: who, in which colour, and milliseconds per head by length."""

    name: str
    colour: str
    points: dict[int, float]


def rows() -> dict[int, dict[str, Any]]:
    """The measured row of each length."""
    measured = json.loads(RESULTS.read_text())["rows"]
    return {
        row["seq_len"]: row
        for row in measured
        if (row.get("expression"), row["head_dim"], row["dtype"]) == (MASK, HEAD_DIM, DTYPE) and "ours_fwd_ms" in row
    }


def series(what: str, theme: Theme) -> list[Series]:
    """Lines of the chart of ``"fwd"`` or ``"fwd_bwd"``; a contender without measurements has none."""
    found = []
    for key, name, colour in (
        ("sdpa", "dense SDPA", theme.sdpa),
        ("flex", "FlexAttention", theme.flex),
        ("ours", "sparseflash", theme.ours),
    ):
        field = f"{key}_{what}_ms"
        points = {n: row[field] / row["heads"] for n, row in sorted(rows().items()) if field in row}
        if points:
            found.append(Series(name, colour, points))
    return found


def seconds(ms: float) -> str:
    """Two figures of a time, in milliseconds or seconds.

    Example:
        >>> seconds(4.916), seconds(130.8), seconds(38892)
        ('4.9 ms', '130 ms', '39 s')
    """
    value, unit = (ms, "ms") if ms < 1000 else (ms / 1000, "s")
    return f"{value:.1f} {unit}" if value < 10 else f"{float(f'{value:.2g}'):.0f} {unit}"


def draw_mask(drawing: Drawing, theme: Theme, left: int) -> None:
    """Blocks of the mask."""
    mask = sf.parse(MASK).compile(TOKENS, block=BLOCK)
    n, side = TOKENS // BLOCK, (BOTTOM - TOP) / (TOKENS // BLOCK)
    codes = mask.runs.code_at(np.arange(n)[:, None] * n + np.arange(n)).tolist()
    for row, line in enumerate(codes):
        for col, code in enumerate(line):
            if code:
                fill = theme.full if code == 1 else theme.partial
                drawing.box(left + col * side, TOP + row * side, side, side, fill, line=None)
    edge = n * side
    drawing.parts.append(
        f'<rect x="{left}" y="{TOP}" width="{edge:g}" height="{edge:g}" fill="none" stroke="{theme.ink}"/>'
    )
    drawing.words(left, 22, MASK, theme.ink)
    drawing.words(left, 42, f"{mask.density:.0%} of the blocks at {TOKENS:,} tokens", theme.ink, size=12)
    drawing.words(left, BOTTOM + 20, "rows: queries, columns: keys", theme.ink, size=12)


def draw_chart(drawing: Drawing, theme: Theme, left: int, title: str, lines: list[Series], note: str) -> None:
    """Milliseconds a head against the length, both on logarithmic axes."""
    width = 180

    def x(n: int) -> float:
        return left + 20 + (width - 40) * math.log(n / LENGTHS[0]) / math.log(LENGTHS[-1] / LENGTHS[0])

    def y(ms: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * math.log(ms / SMALLEST) / math.log(LARGEST / SMALLEST)

    drawing.words(left, 22, title, theme.ink)
    drawing.words(left, 42, note, theme.ink, size=12)
    for exponent in range(6):
        at = y(10.0**exponent)
        drawing.line(left, at, left + width, at, theme.faint)
        drawing.words(left - 6, at, seconds(10.0**exponent).replace(".0", ""), theme.ink, "end", size=11)
    for n in LENGTHS:
        drawing.words(x(n), BOTTOM + 20, f"{n:,}", theme.ink, "middle", size=11)
    drawing.words(left + width / 2, BOTTOM + 40, "tokens", theme.ink, "middle", size=11)
    for line in lines:
        points = [(x(n), y(ms)) for n, ms in line.points.items()]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        drawing.parts.append(f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="2"/>')
        for px, py in points:
            drawing.parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{line.colour}"/>')
        name = f"{line.name} {seconds(line.points[LENGTHS[-1]])}"
        lift = 3 if line.name == "FlexAttention" else -3  # the two lowest lines end close together
        drawing.words(left + width - 8, points[-1][1] - lift, name, line.colour, size=12)


def drawn(theme: Theme) -> str:
    """The picture."""
    result = json.loads(RESULTS.read_text())
    forward, both = series("fwd", theme), series("fwd_bwd", theme)
    about = f"Attention through {MASK}: the mask, and the time of one head against the length"
    drawing = Drawing(WIDTH, HEIGHT, about, theme.paper, "system-ui, sans-serif")
    draw_mask(drawing, theme, 16)
    draw_chart(drawing, theme, 290, "forward, one head", forward, "both axes logarithmic")
    draw_chart(drawing, theme, 650, "forward and backward", both, "FlexAttention: no backward on CPUs")
    drawing.words(
        16, HEIGHT - 10,
        f"{result['device']}, {result['threads']} threads, fp32, head dim {HEAD_DIM}, torch {result['torch']}, "
        f"{result['date'][:10]}",
        theme.ink, size=11,
    )  # fmt: skip
    return drawing.text()


def badge(label: str, value: str) -> str:
    """Two words side by side, in the colours of the light theme."""
    theme = THEMES["light"]
    left, right = (round(7 * len(word) + 14) for word in (label, value))
    drawing = Drawing(left + right, 20, f"{label}: {value}", theme.sdpa, "Verdana, sans-serif")
    drawing.box(left, 0, right, 20, theme.ours, line=None)
    drawing.words(left / 2, 10, label, theme.paper, "middle", size=11)
    drawing.words(left + right / 2, 10, value, theme.paper, "middle", size=11)
    return drawing.text()


def badges() -> dict[str, str]:
    """The badges, from the package's own metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    typed = "yes" if "Typing :: Typed" in project["classifiers"] else "no"
    said = {"python": project["requires-python"], "licence": project["license"], "typed": typed}
    return {f"badge-{label}.svg": badge(label, value) for label, value in said.items()}


def drawings() -> dict[str, str]:
    """The files of docs/front."""
    return {f"attention-{name}.svg": drawn(theme) for name, theme in THEMES.items()} | badges()


def outdated() -> list[str]:
    """Names of the files that are not what the code draws."""
    texts = drawings()
    wrong = [n for n, text in texts.items() if not (FOLDER / n).exists() or (FOLDER / n).read_text() != text]
    return wrong + sorted({path.name for path in FOLDER.glob("*")} - set(texts))


def main() -> None:
    if "--check" in sys.argv[1:]:
        if wrong := outdated():
            sys.exit(f"not what the code draws: {', '.join(wrong)}; run make gallery")
        return
    FOLDER.mkdir(exist_ok=True)
    for name, text in drawings().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    main()
