"""How cost grows with density and with length: fitted exponents beside the paper's IO model, and their picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.settings import COMMON
from benchmarks.gpu.work import exponent, io_elements
from sparseflash.kernels.launch import SHARED_MEMORY

Row = dict[str, Any]
ITEMSIZE = 2
# Elements that fit the chip's fast memory, for the model: shared memory of one multiprocessor in half precision.
ON_CHIP = SHARED_MEMORY["sm_90"] // ITEMSIZE


# What grows, and the kind of row that holds it: time, memory beyond operands, bytes between memory and chip.
GROWING = (
    ("attention", ("ours_fwd_ms", "ours_bwd_ms")),
    ("attention", ("peak_fwd_mb", "peak_bwd_mb")),
    ("traffic", ("bytes_fwd", "bytes_bwd")),
)


@dataclass(frozen=True)
class Curve:
    """Points of one curve, in ascending order of x.

    Attributes:
        name: in words.
        against: what x is.
        x: densities or lengths.
        measured: what grows, by name, for one head: times in ms, MB, or bytes; and the IO model's bytes.
    """

    name: str
    against: str
    x: list[float]
    measured: dict[str, list[float]]

    def exponents(self) -> dict[str, float | None]:
        """The e of y = c x^e, for everything that was measured."""
        return {name: exponent(self.x, values) for name, values in self.measured.items()}


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Those of at least three points."""
    usual = [
        row
        for row in rows
        if row.get("kind") in ("attention", "traffic")
        and (row["head_dim"], row["block"], row["group"], row["every_form"]) == (128, 128, 1, False)
    ]
    by_density = [row for row in usual if row["mask"].startswith("random") and row["seq_len"] == 16384]
    by_length = [row for row in usual if row["mask"] == COMMON]
    found = []
    for name, against, some in (
        ("random blocks, 16,384 tokens", "density", by_density),
        (COMMON, "seq_len", by_length),
    ):
        for kind, values in GROWING:
            points = [row for row in some if row["kind"] == kind and all(row.get(key, 0) > 0 for key in values)]
            points.sort(key=lambda row: row[against] if against in row else _density(row, rows))
            if len(points) > 2:
                found.append(_curve(name, against, points, rows, values))
    return found


def _curve(name: str, against: str, points: list[Row], rows: Sequence[Row], values: tuple[str, ...]) -> Curve:
    x = [row[against] if against in row else _density(row, rows) for row in points]
    measured = {key: [row[key] / _heads(row, rows) for row in points] for key in values}
    model = [io_elements(row["seq_len"], row["head_dim"], _density(row, rows), ON_CHIP) * ITEMSIZE for row in points]
    return Curve(name, against, x, measured | {"IO model": model})


def _timed(row: Row, rows: Sequence[Row]) -> Row:
    """The row of times that a row of traffic belongs to."""
    same = ("mask", "seq_len", "head_dim", "block", "group", "dtype", "every_form")
    return next(
        (r for r in rows if r.get("kind") == "attention" and "shape" in r and all(r[k] == row[k] for k in same)), row
    )


def _density(row: Row, rows: Sequence[Row]) -> float:
    found: float = _timed(row, rows).get("density", float("nan"))
    return found


def _heads(row: Row, rows: Sequence[Row]) -> float:
    batch, heads, _ = _timed(row, rows).get("shape", (1, 1, 1))
    return float(batch * heads)


def table(found: Sequence[Curve]) -> str:
    """Exponents in Markdown."""
    lines = ["| mask | against | points | what | exponent | IO model's exponent |", "|---" * 6 + "|"]
    for curve in found:
        exponents = curve.exponents()
        model = exponents.pop("IO model")
        if "peak_fwd_mb" in exponents:  # the model speaks of what moves, not of what is held
            model = None
        for what, value in exponents.items():
            shown = ["" if e is None else f"{e:.2f}" for e in (value, model)]
            name = curve.name.replace("|", "\\|")
            lines.append(f"| `{name}` | {curve.against} | {len(curve.x)} | {what} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def draw(found: Sequence[Curve], path: Path) -> None:
    """A panel for each curve, on logarithmic axes, with the model scaled to meet the first point."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, curve in zip(panels, found, strict=False):
        model = curve.measured["IO model"]
        measured = {what: values for what, values in curve.measured.items() if what != "IO model"}
        for what, values in measured.items():
            axes.loglog(curve.x, values, "o-", label=what)
        if "peak_fwd_mb" not in measured:  # the model speaks of what moves, not of what is held
            first = next(iter(measured.values()))
            scaled = [y * first[0] / model[0] for y in model]
            axes.loglog(curve.x, scaled, "--", color="tab:gray", label="IO model, scaled")
        axes.set_title(curve.name, fontsize=9)
        axes.set_xlabel(curve.against)
        axes.set_xticks(curve.x, [f"{x:.2g}" if x < 1 else f"{x:,.0f}" for x in curve.x], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("one head")
        axes.legend(fontsize=8)
    for axes in panels[len(found) :]:
        axes.set_visible(False)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    temporary.replace(path)
