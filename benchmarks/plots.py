"""The plots of the result pages: one per page, as SVG for light and for dark pages."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from docs.svg import Drawing

Row = dict[str, Any]
Runs = Mapping[str, dict[str, Any]]  # the newest result of each part
WIDTH = 540
FONT = "system-ui, sans-serif"


class Theme(NamedTuple):
    """Colours of a drawing; those of series differ in lightness too."""

    paper: str
    ink: str
    faint: str
    line: str
    series: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#57606a", "#d0d7de", ("#0072b2", "#e69f00", "#7d8790", "#b5457a"))
DARK = Theme("#1e2329", "#e6edf3", "#9da7b3", "#3a424c", ("#4aa8e0", "#f0b040", "#8b949e", "#e07fae"))


class Plot(NamedTuple):
    """What a plot says, for those who cannot see it, and how it is drawn."""

    about: str
    drawn: Callable[[Theme], str]

    def draw(self, dark: bool) -> str:
        return self.drawn(DARK if dark else LIGHT)


class Bars(NamedTuple):
    """Bars that share a label: (series, length, words at its end)."""

    label: str
    bars: list[tuple[int, float, str]]


def bar_plot(title: str, notes: Sequence[str], series: Sequence[str], groups: Sequence[Bars]) -> Plot:
    """Bars from one left edge, a label above each group: narrow enough for a telephone."""
    top, step, gap, left = 34 + 20 * len(_lines(notes)) + 30, 19, 34, 8
    height = top + sum(gap + step * len(group.bars) for group in groups) + 6
    longest = max(length for group in groups for _, length, _ in group.bars)
    room = WIDTH - 2 * left - 9 * max(len(words) for group in groups for _, _, words in group.bars)

    def drawn(theme: Theme) -> str:
        drawing = Drawing(WIDTH, height, title, theme.paper, FONT)
        _head(drawing, theme, title, notes)
        _legend(drawing, theme, series, top - 18)
        y = top
        for group in groups:
            drawing.words(left, y + gap - 14, group.label, theme.ink, size=14)
            y += gap
            for which, length, words in group.bars:
                wide = max(2.0, room * length / longest)
                drawing.box(left, y + 2, wide, step - 4, theme.series[which], line=None)
                drawing.words(left + wide + 6, y + step / 2, words, theme.ink, size=14)
                y += step
        return drawing.text()

    return Plot(f"{title}. {' '.join(notes)}", drawn)


def _lines(notes: Sequence[str]) -> list[str]:
    return [line for note in notes for line in textwrap.wrap(note, 72)]


def _head(drawing: Drawing, theme: Theme, title: str, notes: Sequence[str]) -> None:
    drawing.words(8, 18, title, theme.ink, size=18)
    for number, line in enumerate(_lines(notes)):
        drawing.words(8, 44 + 20 * number, line, theme.faint, size=14)


def _legend(drawing: Drawing, theme: Theme, series: Sequence[str], y: float) -> None:
    x = 8.0
    for number, name in enumerate(series):
        if x + 18 + 7.6 * len(name) > WIDTH:
            x, y = 8.0, y + 20
        drawing.box(x, y, 12, 12, theme.series[number], line=None)
        drawing.words(x + 18, y + 6, name, theme.ink, size=14)
        x += 34 + 7.6 * len(name)


def of_machine(short: str, runs: Runs) -> Plot | None:
    """The plot of a machine's page: what was measured of attention, or of making masks."""
    for part, plot in (("kernels", rates), ("cpu", speeds)):
        if part in runs and (found := plot(short, runs[part])):
            return found
    return None


PEERS = (("", "sparseflash"), ("flex", "FlexAttention"), ("cudnn", "cuDNN"))
USUAL = {"seq_len": 16384, "head_dim": 128, "block": 128, "group": 1, "every_form": False}


def usual(result: dict[str, Any]) -> list[Row]:
    """Rows of the setting that a plot shows, one for each mask, those with most blocks first."""
    rows = [row for row in result["rows"] if row.get("kind") == "attention" and "tflops_fwd" in row]
    return sorted((row for row in rows if USUAL.items() <= row.items()), key=lambda row: -float(row["density"]))


def rates(short: str, result: dict[str, Any]) -> Plot | None:
    """Useful TFLOP/s of the forward pass, beside others."""
    rows = usual(result)
    if not rows:
        return None
    groups = []
    for row in rows:
        rate, bars = row["tflops_fwd"], []
        for number, (who, _) in enumerate(PEERS):
            over = row.get(f"over_{who}_fwd") if who else 1.0
            if over is not None:
                bars.append((number, rate / over, f"{rate / over:.0f}"))
        groups.append(Bars(f"{row['mask']}: {row['density']:.0%} of blocks", bars))
    notes = ["Forward, useful TFLOP/s in bf16; 16,384 tokens, head dim 128."]
    for who, name in PEERS[1:]:
        ratios = [row[f"over_{who}_fwd"] for row in rows if f"over_{who}_fwd" in row]
        if ratios:
            notes.append(f"{_span(ratios)} times as fast as {name}.")
    best = max(row["tflops_fwd"] for row in rows)
    return bar_plot(f"{short}: up to {best:.0f} TFLOP/s", notes, [name for _, name in PEERS], groups)


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def speeds(short: str, result: dict[str, Any]) -> Plot | None:
    """How many times as fast as dense SDPA each mask is, in the longest setting that was measured."""
    rows = [row for row in result["rows"] if row.get("ours_fwd_bwd_ms") and row.get("sdpa_fwd_bwd_ms")]
    if not rows:
        return None
    settings = [(row["seq_len"], row["heads"], row["head_dim"], row["dtype"]) for row in rows]
    tokens, heads, head_dim, dtype = longest = max(settings)
    shown = [row for row, setting in zip(rows, settings, strict=True) if setting == longest]
    shown.sort(key=lambda row: -float(row["density"]))
    groups = []
    for row in shown:
        times = [row[f"sdpa_{which}_ms"] / row[f"ours_{which}_ms"] for which in ("fwd", "fwd_bwd")]
        bars = [(number, value, f"{value:.{int(value < 10)}f}x") for number, value in enumerate(times)]
        groups.append(Bars(f"{row['expression']}: {row['density']:.1%} of blocks", bars))
    both = sorted(group.bars[1][1] for group in groups)
    title = f"{short}: {both[0]:.2g} to {both[-1]:.3g} times as fast as dense SDPA"
    each = f"{heads} head{'s' * (heads != 1)} of {head_dim}"
    notes = [f"{tokens:,} tokens, {each}, {dtype}, {result['threads']} threads, {result['date'][:10]}."]
    return bar_plot(title, notes, ["forward", "forward and backward"], groups)


def _newest(machines: Mapping[str, Runs], part: str) -> tuple[str, dict[str, Any]] | None:
    """The machine with the newest run of a part, and that run."""
    some = [(short, runs[part]) for short, runs in machines.items() if part in runs]
    return max(some, key=lambda one: str(one[1]["date"])) if some else None


def _points(machines: Mapping[str, Runs]) -> Iterator[tuple[str, float, float]]:
    """Machine and dtype, density of a mask, and how many times as fast as dense attention its forward pass is."""
    if found := _newest(machines, "kernels"):
        short, rows = found[0], usual(found[1])
        for dense in (row for row in rows if row["mask"] == "full()" and "over_cudnn_fwd" in row):
            ms = dense["ours_fwd_ms"] * dense["over_cudnn_fwd"]
            yield from ((f"{short}, bf16", row["density"], ms / row["ours_fwd_ms"]) for row in rows)
    if found := _newest(machines, "cpu"):
        both = (row for row in found[1]["rows"] if row.get("sdpa_fwd_ms") and row.get("ours_fwd_ms"))
        for row in both:
            dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(row["dtype"], row["dtype"])
            yield f"{found[0]}, {dtype}", row["density"], row["sdpa_fwd_ms"] / row["ours_fwd_ms"]


def overview(machines: Mapping[str, Runs]) -> Plot | None:
    """Speed against the share of blocks that a mask keeps, both on logarithmic axes, of the newest runs."""
    points = list(_points(machines))
    if not points:
        return None
    names = list(dict.fromkeys(name for name, _, _ in points))
    title = "Attention takes time for the blocks that a mask keeps"
    notes = [
        "Forward, times as fast as dense attention by SDPA (CPU) or cuDNN (GPU).",
        "On the line, time falls exactly with the blocks.",
    ]
    left, right, top, bottom = 60, WIDTH - 20, 116, 400
    tops, slowest, fastest = [1.0, 0.3, 0.1, 0.03, 0.01], 0.3, 300.0

    def x(density: float) -> float:
        return left + (right - left) * math.log(1 / density) / math.log(1 / tops[-1])

    def y(speed: float) -> float:
        return bottom - (bottom - top) * math.log(speed / slowest) / math.log(fastest / slowest)

    def drawn(theme: Theme) -> str:
        drawing = Drawing(WIDTH, bottom + 54, title, theme.paper, FONT)
        _head(drawing, theme, title, notes)
        _legend(drawing, theme, names, 80)
        for density in tops:
            drawing.line(x(density), top, x(density), bottom, theme.line)
            drawing.words(x(density), bottom + 14, f"{density:.0%}", theme.ink, "middle", size=13)
        for speed in (0.3, 1, 3, 10, 30, 100, 300):
            drawing.line(left, y(speed), right, y(speed), theme.line)
            drawing.words(left - 8, y(speed), f"{speed}x", theme.ink, "end", size=13)
        drawing.words((left + right) / 2, bottom + 38, "share of blocks that the mask keeps", theme.faint, "middle", 14)
        drawing.line(x(1), y(1), x(tops[-1]), y(1 / tops[-1]), theme.ink)
        for name, density, speed in points:
            fill = theme.series[names.index(name) % len(theme.series)]
            drawing.parts.append(
                f'<circle cx="{x(density):.1f}" cy="{y(speed):.1f}" r="4.5" fill="{fill}" fill-opacity="0.8"/>'
            )
        return drawing.text()

    return Plot(f"{title}. {' '.join(notes)}", drawn)
