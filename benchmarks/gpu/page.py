"""The sections of benchmarks/README.md that speak of GPUs, from result files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import bars, check, curves, targets
from benchmarks.gpu.gates import gain, spelled
from benchmarks.gpu.work import PASSES, io_elements
from sparseflash.kernels.launch import Launch

Row = dict[str, Any]
Columns = Sequence[tuple[str, str, str]]  # key, title, format

PEERS = ("cudnn", "flash", "sdpa", "flex", "best flex", "fa4")
SETTING: Columns = [
    ("mask", "mask", "`{}`"), ("seq_len", "tokens", "{:,}"), ("head_dim", "D", "{}"), ("block", "block", "{}"),
    ("group", "queries a key head", "{}"), ("density", "density", "{:.1%}"),
]  # fmt: skip


def _pass_columns(which: str) -> Columns:
    return [
        *SETTING, (f"ours_{which}_ms", "ms", "{:.3f}"), (f"ours_{which}_ms_spread", "spread", "{:.3f}"),
        (f"noise_{which}", "noise", "{:.1%}"), (f"tflops_{which}", "TFLOP/s", "{:.0f}"),
        (f"share_{which}", "of floor", "{:.2f}"), (f"bound_{which}", "floor set by", "{}"),
        (f"peak_{which}_mb", "peak beyond operands, MB", "{:,.1f}"),
        *((f"over_{who}_{which}", f"{who} / ours", "{:.2f}") for who in PEERS),
    ]  # fmt: skip


DECODE: Columns = [
    ("capacity", "cache", "{:,}"), ("density", "density", "{:.0%}"), ("batch", "samples", "{}"),
    ("heads", "heads", "{}"), ("kv_heads", "key heads", "{}"), ("head_dim", "D", "{}"), ("ours_ms", "ms", "{:.4f}"),
    ("ours_ms_spread", "spread", "{:.4f}"), ("share", "of copy bandwidth", "{:.2f}"),
    ("over_dense sdpa", "SDPA over the whole cache / ours", "{:.2f}"),
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

Table = Callable[[Columns, Sequence[Row]], str]


def section(result: dict[str, Any], path: Path, table: Table) -> str:
    """What a result file of a part says."""
    by_part = {"check": _check, "kernels": _kernels, "peers": _peers, "tune": _tune}
    return by_part[result["part"]](result["rows"], path, table)


PARTS = {
    "check": "GPU: are the kernels right",
    "kernels": "GPU: attention beside its peers and the card's limits",
    "peers": "GPU: making a mask, beside create_block_mask",
    "tune": "GPU: launches beside the one that was committed then (milliseconds, and how many times as fast; for keys "
    "and queries of the whole backward pass; heads x head dim = 2,048)",
}


def _check(rows: list[Row], path: Path, table: Table) -> str:
    return table(CHECKS, [{**row, "verdict": check.verdict(row)} for row in rows])


def _peers(rows: list[Row], path: Path, table: Table) -> str:
    order = list(dict.fromkeys(row["mask"] for row in rows))
    return table(MAKING, sorted(rows, key=lambda row: (order.index(row["mask"]), row["seq_len"])))


def _tune(rows: list[Row], path: Path, table: Table) -> str:
    masks = list(dict.fromkeys(mask for row in rows for mask in row.get("ms", ())))
    columns: Columns = [
        ("kernel", "kernel", "{}"), ("head_dim", "D", "{}"), ("launched", "launch", "`{}`"),
        *((mask, f"`{mask}`".replace("|", "\\|"), "{}") for mask in masks), ("failed", "failed", "{}"),
    ]  # fmt: skip

    def shown(row: Row) -> Row:
        times = {mask: f"{ms:.2f} ({row['committed_ms'][mask] / ms:.2f}x)" for mask, ms in row.get("ms", {}).items()}
        return {**row, **times, "launched": spelled(Launch(*row["launch"])).removeprefix("Launch")}

    order = sorted(rows, key=lambda row: (row["kernel"], row["head_dim"], -gain(row) if "ms" in row else 0))
    return table(columns, [shown(row) for row in order])


def _kernels(rows: list[Row], path: Path, table: Table) -> str:
    parts = [f"### Targets\n\n{targets.table(rows)}"]
    if notes := _notes(rows):
        parts.append("### Failed or left out\n\n" + "\n".join(f"- {note}" for note in notes))
    parts += [_rates(row) for row in rows if row["kind"] == "rates" and "failed" not in row]
    timed = [row for row in rows if row["kind"] == "attention" and "failed" not in row]
    if bars.usual(rows):
        picture = f"results/{path.parent.name}/{picture_of(path, 'rates').name}"
        parts.append(f"![useful TFLOP/s at 16,384 tokens, head dim 128, blocks of 128]({picture})")
    if timed:
        for which, title in zip(PASSES, ("Forward", "Backward"), strict=True):
            parts.append(f"### {title}\n\n{table(_pass_columns(which), timed)}")
    decoded = [row for row in rows if row["kind"] == "decode" and "failed" not in row]
    if decoded:
        parts.append(f"### Decoding, one query a sample\n\n{table(DECODE, decoded)}")
    if moved := [row for row in rows if row["kind"] == "traffic" and "bytes_fwd" in row]:
        parts.append(f"### Bytes between memory and chip\n\n{table(TRAFFIC, [_traffic(r, rows) for r in moved])}")
    if found := curves.curves(rows):
        picture = f"results/{path.parent.name}/{picture_of(path, 'curves').name}"
        parts.append(f"### Cost curves\n\n{curves.table(found)}\n\n![time and bytes of one head]({picture})")
    return "\n\n".join(parts)


def _rates(row: Row) -> str:
    return (
        f"Rates of this card, best of many runs: {row['matrix'] / 1e12:.0f} TFLOP/s (8192 x 8192 x 8192 product in "
        f"bf16), {row['exponentials'] / 1e12:.2f} x 10^12 exp2 a second, {row['bytes'] / 1e12:.2f} TB/s copied (read "
        "plus written). The floor is the longest of useful matrix work, exponentials and operands at these rates."
    )


def _traffic(row: Row, rows: list[Row]) -> Row:
    heads, density = curves._heads(row, rows), curves._density(row, rows)
    model = io_elements(row["seq_len"], row["head_dim"], density, curves.ON_CHIP) * curves.ITEMSIZE * heads
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
            notes.append(f"**failed, no figures**: {name}: {row['failed']}")
        why = row.get("left_out", {})
        for who, reason in why.items() if isinstance(why, dict) else [(row["kind"], why)]:
            left.setdefault(f"{who}: {reason}", []).append(name)
    return notes + [f"{reason} ({len(where)} rows, first {where[0]})" for reason, where in left.items()]


def picture_of(path: Path, what: str) -> Path:
    """Where a picture of a result file is drawn."""
    return path.with_name(f"{path.stem}-{what}.png")


def draw(result: dict[str, Any], path: Path) -> None:
    """The pictures of a result file that has any."""
    if result["part"] != "kernels":
        return
    if found := curves.curves(result["rows"]):
        curves.draw(found, picture_of(path, "curves"))
    if rows := bars.usual(result["rows"]):
        bars.draw(rows, picture_of(path, "rates"))
