"""A picture of useful TFLOP/s by mask: ours, the peers, and the floor, in the usual setting."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.work import PASSES

Row = dict[str, Any]
PEERS = ("cudnn", "flash", "sdpa", "flex", "fa4")
USUAL = {"seq_len": 16384, "head_dim": 128, "block": 128, "group": 1, "every_form": False}


def usual(rows: Sequence[Row]) -> list[Row]:
    """The rows that the picture shows, one for each mask."""
    timed = [row for row in rows if row.get("kind") == "attention" and "tflops_fwd" in row]
    return [row for row in timed if USUAL.items() <= row.items()]


def draw(rows: Sequence[Row], path: Path) -> None:
    """Bars for both passes, of rows that `usual` gave."""
    from matplotlib.figure import Figure

    shown = [who for who in PEERS if any(f"over_{who}_fwd" in row for row in rows)]
    height = 0.8 / (1 + len(shown))
    figure = Figure(figsize=(12, 1.5 + 0.45 * len(rows)), layout="constrained")
    for axes, which in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        places = range(len(rows))
        axes.barh(places, [row[f"tflops_{which}"] for row in rows], height, label="ours", color="black")
        for number, who in enumerate(shown, start=1):
            key = f"over_{who}_{which}"
            there = [
                (place, row[f"tflops_{which}"] / row[key])
                for place, row in zip(places, rows, strict=True)
                if key in row
            ]
            axes.barh([place + number * height for place, _ in there], [rate for _, rate in there], height, label=who)
        for place, row in zip(places, rows, strict=True):
            floor = row[f"tflops_{which}"] / row[f"share_{which}"]
            label = "floor" if place == 0 else None
            axes.plot([floor, floor], [place - height / 2, place + 0.8], color="tab:red", label=label)
        axes.set_title({"fwd": "forward", "bwd": "backward"}[which])
        axes.set_xlabel("useful TFLOP/s")
    axes.set_yticks(places, [row["mask"] for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    temporary = path.with_suffix(".part")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    temporary.replace(path)
