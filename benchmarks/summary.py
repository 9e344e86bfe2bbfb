"""The summary table of benchmarks/README.md: one line per question, from the newest run that measured it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from benchmarks.plots import usual
from benchmarks.tables import Columns

Row = dict[str, Any]
COLUMNS: Columns = [
    ("what", "what", "{}"),
    ("found", "result", "{}"),
    ("where", "machine", "{}"),
    ("date", "date", "{}"),
]
LONG_MASK = "causal() & (local(1024) | butterfly(unit=128) | global_tokens(64))"


def _kernel(mask: str, which: str) -> Callable[[dict[str, Any]], str | None]:
    def found(result: dict[str, Any]) -> str | None:
        for row in usual(result):
            if row["mask"] == mask:
                beside = [
                    f"{row[f'over_{who}_{which}']:.2f} times {name}'s speed"
                    for who, name in (("flex", "FlexAttention"), ("cudnn", "cuDNN"))
                    if f"over_{who}_{which}" in row
                ]
                return ", ".join([f"{row[f'tflops_{which}']:.0f} TFLOP/s", *beside])
        return None

    return found


def _step(result: dict[str, Any]) -> str | None:
    rows = [r for r in result["rows"] if r["attention"] == "ours sparse" and r.get("over_sdpa") and r["tokens"] > 8192]
    if not rows:
        return None
    row = max(rows, key=lambda row: int(row["tokens"]))
    return f"{row['step_ms']:.0f} ms, {row['over_sdpa']:.1f} times as fast as dense SDPA"


def _cpu(tokens: int, dtype: str) -> Callable[[dict[str, Any]], str | None]:
    def found(result: dict[str, Any]) -> str | None:
        rows = [
            row
            for row in result["rows"]
            if (row["seq_len"], row["dtype"]) == (tokens, dtype) and row.get("sdpa_fwd_bwd_ms")
        ]
        sparse = [row for row in rows if row["density"] < 0.1]
        over = sorted(row["sdpa_fwd_bwd_ms"] / row["ours_fwd_bwd_ms"] for row in sparse)
        kept = sorted(row["density"] for row in sparse)
        if not sparse:
            return None
        return (
            f"{over[0]:.0f} to {over[-1]:.0f} times as fast as dense SDPA ({kept[0]:.0%} to {kept[-1]:.0%} of blocks)"
        )

    return found


def _compiled(result: dict[str, Any]) -> str | None:
    for row in result["rows"]:
        if row["expression"] == LONG_MASK and row["seq_len"] == 1 << 20:
            return f"{row['compile_ms'] + row['lookup_ms']:.0f} ms, {row['peak_mb']:.0f} MB"
    return None


def _accuracy(result: dict[str, Any]) -> str | None:
    row = result["rows"][0]
    low, high = row["interval_95"]
    views = f"; mean of {row['views']} views" if row.get("views", 1) > 1 else ""
    return f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%}) of {row['count']:,}{views}"


QUESTIONS: list[tuple[str, str, Callable[[dict[str, Any]], str | None]]] = [
    ("Dense forward, 16,384 tokens, head dim 128, bf16", "kernels", _kernel("full()", "fwd")),
    ("Dense backward, the same", "kernels", _kernel("full()", "bwd")),
    ("Forward through 10 % of blocks at random", "kernels", _kernel("random(0.1, unit=128)", "fwd")),
    ("Backward through them", "kernels", _kernel("random(0.1, unit=128)", "bwd")),
    ("A training step of Path-256, 65,536 tokens", "step", _step),
    ("Both passes on a CPU, 65,536 tokens, fp32", "cpu", _cpu(65536, "float32")),
    ("Both passes on a CPU, 16,384 tokens, bf16", "cpu", _cpu(16384, "bfloat16")),
    ("Mask and table for a million tokens, one core", "compile_time", _compiled),
    ("Accuracy on Path-256, images drawn here, lit pixels as tokens", "path256-evaluate", _accuracy),
    ("Accuracy on Path-X, images drawn here, lit pixels as tokens", "pathx-evaluate", _accuracy),
    ("Accuracy on Path-256, images drawn here, every pixel a token", "path256-all-pixels-path256-own", _accuracy),
    ("Accuracy on Path-X, images drawn here, every pixel a token", "path256-all-pixels-pathx-own", _accuracy),
]


def _answers(machines: Sequence[tuple[str, str, Mapping[str, dict[str, Any]]]]) -> Iterator[Row]:
    for what, part, find in QUESTIONS:
        answered = [
            (runs[part]["date"], short, page, answer)
            for short, page, runs in machines
            if part in runs and (answer := find(runs[part]))
        ]
        if answered:
            date, short, page, answer = max(answered)
            day = datetime.fromisoformat(date[:10])
            shown = f"{day.day} {day:%b %Y}".replace(" ", "\N{NO-BREAK SPACE}")
            yield {"what": what, "found": answer, "where": f"[{short}]({page})", "date": shown}


def rows(machines: Sequence[tuple[str, str, Mapping[str, dict[str, Any]]]]) -> list[Row]:
    """The lines of the table, from (short name, page, newest run of each part) of every machine."""
    return list(_answers(machines))
