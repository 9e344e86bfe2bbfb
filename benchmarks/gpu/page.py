"""The sections of a machine's page that speak of a GPU, from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu import check, plots, targets
from benchmarks.gpu.gates import gain, spelled
from benchmarks.gpu.work import PASSES, io_elements
from benchmarks.tables import Columns, Row, table

PARTS = ("check", "kernels", "peers", "tune")
PEERS = {
    "cudnn": "cuDNN", "flash": "FlashAttention", "sdpa": "SDPA", "flex": "FlexAttention",
    "best flex": "best FlexAttention", "fa4": "FlashAttention-4",
}  # fmt: skip
SETTING: Columns = [("mask", "mask", "`{}`"), ("setting", "setting", "{}")]


def _pass_columns(which: str) -> Columns:
    return [
        *SETTING, ("density", "density", "{:.1%}"), ("time", "ms (spread)", "{}"),
        (f"noise_{which}", "noise", "{:.1%}"), (f"tflops_{which}", "TFLOP/s", "{:.0f}"),
        ("floor", "of floor (set by)", "{}"), (f"peak_{which}_mb", "memory, MB", "{:,.1f}"),
    ]  # fmt: skip


def _peer_columns(which: str) -> Columns:
    return [*SETTING, *((f"over_{who}_{which}", name, "{:.2f}") for who, name in PEERS.items())]


DECODE: Columns = [
    ("capacity", "cache", "{:,}"), ("density", "density", "{:.0%}"), ("batch", "samples", "{}"),
    ("all_heads", "heads (of keys)", "{}"), ("head_dim", "D", "{}"), ("time", "ms (spread)", "{}"),
    ("share", "of copy bandwidth", "{:.2f}"), ("over_dense sdpa", "SDPA over the whole cache / ours", "{:.2f}"),
]  # fmt: skip
TRAFFIC: Columns = [
    ("mask", "mask", "`{}`"), ("seq_len", "tokens", "{:,}"), ("mb_fwd", "forward, MB", "{:,.0f}"),
    ("mb_bwd", "backward, MB", "{:,.0f}"), ("over_model", "forward over the IO model", "{:.2f}"),
    ("units", "busy, % (longest kernels)", "{}"),
]  # fmt: skip
MAKING: Columns = [
    ("mask", "mask", "`{}`"), ("seq_len", "tokens", "{:,}"), ("way", "by", "{}"), ("ms", "ms", "{:,.1f}"),
    ("ms_spread", "spread", "{:,.1f}"), ("first_s", "first call, s", "{:.2f}"),
    ("peak_mb", "peak on the GPU, MB", "{:,.1f}"), ("left_out", "left out", "{}"),
]  # fmt: skip
CHECKS: Columns = [("step", "what", "{}"), ("verdict", "verdict", "{}")]


def section(result: dict[str, Any], path: Path) -> str:
    """What a result file of a part says."""
    by_part = {"check": _check, "kernels": _kernels, "peers": _peers, "tune": _tune}
    return by_part[result["part"]](result["rows"], path)


def _check(rows: list[Row], path: Path) -> str:
    return table(CHECKS, [{**row, "verdict": check.verdict(row)} for row in rows])


def _peers(rows: list[Row], path: Path) -> str:
    order = list(dict.fromkeys(row["mask"] for row in rows))
    return table(MAKING, sorted(rows, key=lambda row: (order.index(row["mask"]), row["seq_len"])))


def _tune(rows: list[Row], path: Path) -> str:
    masks = list(dict.fromkeys(mask for row in rows for mask in row.get("ms", ())))
    columns: Columns = [
        ("kernel", "kernel", "{}"), ("head_dim", "D", "{}"), ("launched", "launch", "`{}`"),
        *((mask, f"`{mask}`".replace("|", "\\|"), "{}") for mask in masks), ("failed", "failed", "{}"),
    ]  # fmt: skip

    def shown(row: Row) -> Row:
        times = {mask: f"{ms:.2f} ({row['committed_ms'][mask] / ms:.2f}x)" for mask, ms in row.get("ms", {}).items()}
        return {**row, **times, "launched": spelled(row["launch"])}

    order = sorted(rows, key=lambda row: (row["kernel"], row["head_dim"], -gain(row) if "ms" in row else 0))
    return table(columns, [shown(row) for row in order])


def _kernels(rows: list[Row], path: Path) -> str:
    parts = [f"### Goals\n\n{targets.table(rows)}"]
    parts += [_rates(row) for row in rows if row["kind"] == "rates" and "failed" not in row]
    timed = [row for row in rows if row["kind"] == "attention" and "failed" not in row]
    for which, title in zip(PASSES, ("Forward", "Backward"), strict=True):
        shown = [_passed(row, which) for row in timed]
        if shown:
            parts.append(f"### {title}\n\n{table(_pass_columns(which), shown)}")
        if peers := [row for row in shown if any(f"over_{who}_{which}" in row for who in PEERS)]:
            parts.append(
                f"{title}, the time of others over ours (above 1, ours is faster):\n\n"
                f"{table(_peer_columns(which), peers)}"
            )
    decoded = [_decoded(row) for row in rows if row["kind"] == "decode" and "failed" not in row]
    if decoded:
        parts.append(f"### Decoding, one query a sample\n\n{table(DECODE, decoded)}")
    if moved := [row for row in rows if row["kind"] == "traffic" and "bytes_fwd" in row]:
        parts.append(f"### Bytes between memory and chip\n\n{table(TRAFFIC, [_traffic(r, rows) for r in moved])}")
    if found := plots.curves(rows):
        picture = f"results/{path.parent.name}/{picture_of(path, 'curves').name}"
        parts.append(f"### Cost curves\n\n{plots.table(found)}\n\n![time and bytes of one head]({picture})")
    if notes := _notes(rows):
        parts.append("### Without figures\n\n" + "\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def _passed(row: Row, which: str) -> Row:
    """A row with what the tables of a pass show besides."""
    setting = f"{row['seq_len']:,} tokens, D {row['head_dim']}"
    if row["block"] != 128:
        setting += f", block {row['block']}"
    if row["group"] != 1:
        setting += f", {row['group']} queries a key head"
    spread = row[f"ours_{which}_ms_spread"]
    return {
        **row,
        "setting": setting,
        "time": f"{row[f'ours_{which}_ms']:.3f}\N{NO-BREAK SPACE}({spread:.3f})",
        "floor": f"{row[f'share_{which}']:.2f}\N{NO-BREAK SPACE}({row[f'bound_{which}']})",
    }


def _decoded(row: Row) -> Row:
    if "ours_ms" not in row:
        return row
    return {
        **row,
        "all_heads": f"{row['heads']} ({row['kv_heads']})",
        "time": f"{row['ours_ms']:.4f}\N{NO-BREAK SPACE}({row['ours_ms_spread']:.4f})",
    }


def _rates(row: Row) -> str:
    return (
        f"Rates of this card, best of many runs: {row['matrix'] / 1e12:.0f} TFLOP/s (8192 x 8192 x 8192 product in "
        f"bf16), {row['exponentials'] / 1e12:.2f} x 10^12 exp2 a second, {row['bytes'] / 1e12:.2f} TB/s copied (read "
        "plus written). The floor is the longest of useful matrix work, exponentials and operands at these rates."
    )


def _traffic(row: Row, rows: list[Row]) -> Row:
    heads, density = plots._heads(row, rows), plots._density(row, rows)
    model = io_elements(row["seq_len"], row["head_dim"], density, plots.ON_CHIP) * plots.ITEMSIZE * heads
    units = "; ".join(
        f"{kernel.removesuffix('_kernel')}: {', '.join(f'{name} {value:.0f}' for name, value in shares.items())}"
        for kernel, shares in row.get("shares", {}).items()
    )
    found = {**row, "mb_fwd": row["bytes_fwd"] / 1e6, "mb_bwd": row.get("bytes_bwd", 0) / 1e6}
    found |= {"over_model": row["bytes_fwd"] / model} if model == model else {}
    return {**found, "units": units} if units else found


def _notes(rows: list[Row]) -> list[str]:
    """What failed, and each reason to leave somebody out once."""
    notes, left = [], dict[str, list[str]]()
    for row in rows:
        name = ", ".join(str(row[k]) for k in ("kind", "mask", "seq_len", "head_dim", "block", "group") if k in row)
        if "failed" in row:
            notes.append(f"{name}: stopped with {row['failed']}")
        why = row.get("left_out", {})
        for who, reason in why.items() if isinstance(why, dict) else [(row["kind"], why)]:
            left.setdefault(f"{who}: {reason}", []).append(name)
    return notes + [f"{reason} ({len(where)} rows, first {where[0]})" for reason, where in left.items()]


def picture_of(path: Path, what: str) -> Path:
    """Where a picture of a result file is drawn."""
    return path.with_name(f"{path.stem}-{what}.png")


def draw(result: dict[str, Any], path: Path) -> None:
    """The cost curves of a result file that has any."""
    if result["part"] != "kernels":
        return
    if found := plots.curves(result["rows"]):
        plots.draw(found, picture_of(path, "curves"))
