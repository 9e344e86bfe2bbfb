"""Accuracy over all pixels against the share of blocks that a mask stores, from the newest committed results.

python -m benchmarks.coarse_plot    # docs/path256/coarse.png and its dark twin
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.plots import DARK
from benchmarks.record import RESULTS, ROOT

PICTURE = ROOT / "docs" / "path256" / "coarse.png"


def newest(part: str) -> list[dict[str, Any]]:
    """Rows of the newest result file of a part, of any machine; none if there is none."""
    files = sorted(RESULTS.glob(f"*/*-{part}.json"), key=lambda file: file.name)
    return json.loads(files[-1].read_text())["rows"] if files else []


def _draw(path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    before, after = (newest(f"path256-all-pixels-pathx-{masks}") for masks in ("coarse", "trained"))
    for number, row in enumerate(before):
        low, high = row["interval_95"]
        accuracy = row["accuracy"]
        style: dict[str, Any] = {"color": f"C{number}", "capsize": 3}
        label = f"{row['mask']}, {row['seconds_median']:.1f} s an image"
        axes.errorbar(row["density"], accuracy, [[accuracy - low], [high - accuracy]], fmt="o", label=label, **style)
        for trained in after:
            if trained["mask"] == row["mask"]:
                low, high = trained["interval_95"]
                accuracy = trained["accuracy"]
                axes.errorbar(row["density"] * 1.03, accuracy, [[accuracy - low], [high - accuracy]], fmt="^", **style)
    if before:
        axes.axhline(before[0]["marker_distance_baseline"], linestyle=":", color="grey", label="distance alone")
    axes.set(xlabel="blocks stored", ylabel="accuracy on Path-X, every pixel a token", xlim=(0, None))
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="circles: as they are; triangles: after training", title_fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    from matplotlib import rc_context
    from matplotlib.style import library

    paper = {"figure.facecolor": DARK.paper, "axes.facecolor": DARK.paper, "savefig.facecolor": DARK.paper}
    _draw(PICTURE)
    with rc_context({**library["dark_background"], **paper}):
        _draw(PICTURE.with_name("coarse-dark.png"))


if __name__ == "__main__":
    main()
