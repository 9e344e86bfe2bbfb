"""Which tables a result file becomes on its machine's page: at most eight columns each, so that they can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Columns = Sequence[tuple[str, str, str]]  # key, title, format


@dataclass(frozen=True)
class Shape:
    """One kind of table.

    Attributes:
        columns: those that no row has a value for are left out.
        title: heading above, none where it is empty.
        label: what rows have in common: rows with the same label share a table under it.
        needs: rows without this field are left out.
        derived: a row with what its columns need besides.
    """

    columns: Columns
    title: str = ""
    label: Callable[[Row], str] | None = None
    needs: str = ""
    derived: Callable[[Row], Row] = lambda row: row


def table(columns: Columns, rows: Sequence[Row]) -> str:
    """Rows in Markdown, in the columns that any of them has something for."""
    columns = [x for x in columns if any(row.get(x[0]) is not None for row in rows)]
    sides = ["---" if form in ("{}", "`{}`") else "--:" for _, _, form in columns]
    lines = ["| " + " | ".join(title for _, title, _ in columns) + " |", "|" + "|".join(sides) + "|"]
    for row in rows:
        said = [(row.get(key), form) for key, _, form in columns]
        cells = ["" if value is None else form.format(value).replace("|", "\\|") for value, form in said]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(shapes: Iterable[Shape], rows: Sequence[Row]) -> str:
    """All of them that the rows have something for."""
    parts = []
    for shape in shapes:
        chosen = [shape.derived(row) for row in rows if not shape.needs or row.get(shape.needs) is not None]
        if not chosen:
            continue
        if shape.title:
            parts.append(f"### {shape.title}")
        if shape.label is None:
            parts.append(table(shape.columns, chosen))
            continue
        labels = [shape.label(row) for row in chosen]
        for label in dict.fromkeys(labels):
            some = [row for row, other in zip(chosen, labels, strict=True) if other == label]
            parts += [f"**{label}**", table(shape.columns, some)]
    return "\n\n".join(parts)


def _tokens(row: Row) -> str:
    return f"{row['seq_len']:,} tokens"


def _cpu_setting(row: Row) -> str:
    heads = f"{row['heads']} head{'s' * (row['heads'] != 1)}"
    return f"{_tokens(row)}, {heads}, head dim {row['head_dim']}, {row['dtype']}"


def _step_model(row: Row) -> str:
    return (
        f"{row['model'].partition(',')[0] if _tokens_named(row) else row['model']}: {row['tokens']:,} tokens, batch "
        f"{row['batch']}, {row['layers']} layers of width {row['width']}"
    )


def _tokens_named(row: Row) -> bool:
    return f", {row['tokens']:,} tokens" in str(row["model"])


def _made(row: Row) -> Row:
    total = row["compile_ms"] + row["lookup_ms"]
    return {**row, "total_ms": total, "over": row["flex_ms"] / total}


def _told(row: Row) -> Row:
    low, high = row["interval_95"]
    return {
        **row,
        "weights": str(row["checkpoint"]),
        "of": f"{row['right']:,} of {row['count']:,}",
        "interval": f"{low:.1%} to {high:.1%}",
        "views": row.get("views", 1),
    }


# Of benchmarks.all_pixels.
TASKS = {"path256": "Path-256", "pathx": "Path-X"}
MASKS = ("own", "coarse", "trained")
PATTERN = ("expression", "pattern", "`{}`")
ACCURACY = Shape(
    [
        ("data", "images", "{}"), ("weights", "weights", "`{}`"), ("views", "views", "{}"), ("of", "right", "{}"),
        ("accuracy", "accuracy", "{:.1%}"), ("interval", "95 % interval", "{}"),
        ("marker_distance_baseline", "by the distance alone", "{:.1%}"),
    ],
    derived=_told,
)  # fmt: skip
EVERY_PIXEL = Shape(
    [
        ("mask", "mask", "{}"), ("density", "blocks stored", "{:.2%}"), ("seconds_median", "s an image", "{:.2f}"),
        ("of", "right", "{}"), ("accuracy", "accuracy", "{:.1%}"), ("interval", "95 % interval", "{}"),
        ("few", "lit pixels alone", "{:.1%}"), ("agreeing", "answers that agree", "{:.1%}"),
    ],
    derived=lambda row: {
        **row,
        "of": f"{row['right']:,} of {row['count']:,}",
        "interval": "{:.1%} to {:.1%}".format(*row["interval_95"]),
        "few": row["lit_pixels_right"] / row["count"],
        "agreeing": row["agree"] / row["count"],
    },
)  # fmt: skip
SHAPES: dict[str, tuple[Shape, ...]] = {
    "compile_time": (
        Shape(
            [
                PATTERN, ("blocks", "blocks stored", "{:,}"), ("blocks_a_row", "a row", "{:,.1f}"),
                ("compile_ms", "compile, ms", "{:,.1f}"), ("lookup_ms", "lookup, ms", "{:,.1f}"),
                ("peak_mb", "peak, MB", "{:,.1f}"), ("table_mb", "table, MB", "{:,.2f}"),
            ],
            label=_tokens,
        ),
        Shape(
            [
                PATTERN, ("seq_len", "tokens", "{:,}"), ("total_ms", "compile and lookup, ms", "{:,.1f}"),
                ("peak_mb", "peak, MB", "{:,.1f}"), ("flex_ms", "create_block_mask, ms", "{:,.0f}"),
                ("flex_mb", "its growth, MB", "{:,.0f}"), ("over", "its time / ours", "{:,.0f}"),
            ],
            "Beside create_block_mask", needs="flex_ms", derived=_made,
        ),
    ),
    "grids": (
        Shape(
            [
                PATTERN, ("compile_ms", "compile, ms", "{:,.0f}"), ("blocks", "blocks stored", "{:,}"),
                ("density", "of all blocks", "{:.2%}"), ("token_density", "of all pairs", "{:.2%}"),
                ("stored_over_allowed", "stored / allowed", "{:.2f}"), ("tiles", "tiles", "{:,}"),
            ],
            label=lambda row: str(row["grid"]),
        ),
    ),
    "grid_attention": (
        Shape(
            [
                PATTERN, ("density", "density", "{:.1%}"), ("token_density", "of all pairs", "{:.1%}"),
                ("stored_over_allowed", "stored / allowed", "{:.2f}"), ("ours_fwd_ms", "forward, ms", "{:,.0f}"),
                ("sdpa_fwd_ms", "dense SDPA, ms", "{:,.0f}"), ("over_sdpa", "its time / ours", "{:.1f}"),
                ("of_ideal_fwd", "of ideal", "{:.2f}"),
            ],
            label=lambda row: str(row["grid"]),
        ),
    ),
    "cpu": (
        Shape(
            [
                PATTERN, ("density", "density", "{:.1%}"), ("ours_fwd_ms", "forward, ms", "{:,.0f}"),
                ("sdpa_fwd_ms", "dense SDPA, ms", "{:,.0f}"), ("of_ideal_fwd", "of ideal", "{:.2f}"),
                ("ours_fwd_bwd_ms", "both passes, ms", "{:,.0f}"), ("sdpa_fwd_bwd_ms", "dense SDPA, ms", "{:,.0f}"),
                ("of_ideal_fwd_bwd", "of ideal", "{:.2f}"),
            ],
            label=_cpu_setting, needs="ours_fwd_ms",
        ),
        Shape(
            [
                PATTERN, ("seq_len", "tokens", "{:,}"), ("heads", "heads", "{}"), ("head_dim", "D", "{}"),
                ("dtype", "dtype", "{}"), ("ours_fwd_ms", "forward, ms", "{:,.0f}"),
                ("flex_fwd_ms", "FlexAttention, ms", "{:,.0f}"), ("over_flex_fwd", "its time / ours", "{:.2f}"),
            ],
            "Beside compiled FlexAttention", needs="flex_fwd_ms",
        ),
        Shape(
            [
                PATTERN, ("seq_len", "tokens", "{:,}"), ("heads", "heads", "{}"), ("head_dim", "D", "{}"),
                ("dtype", "dtype", "{}"), ("extra_fwd_mb", "forward, MB", "{:,.0f}"),
                ("extra_fwd_bwd_mb", "both passes, MB", "{:,.0f}"),
            ],
            "Memory beyond operands and results", needs="extra_fwd_mb",
        ),
    ),
    "step": (
        Shape(
            [
                ("attention", "attention", "{}"), ("density", "density", "{:.1%}"), ("step_ms", "step, ms", "{:,.1f}"),
                ("spread_ms", "spread, ms", "{:,.1f}"), ("over_sdpa", "speed / sdpa", "{:.2f}"),
                ("attention_share", "attention's share", "{:.0%}"), ("extra_mb", "memory, MB", "{:,.0f}"),
                ("left_out", "left out", "{}"),
            ],
            label=_step_model,
        ),
    ),
    "path256-compare-path256": (
        Shape(
            [
                ("attention", "attention", "{}"), ("pattern", "pattern", "`{}`"),
                ("tokens_an_image", "tokens an image", "{:,}"), ("density", "density", "{:.1%}"),
                ("step_ms", "step, ms", "{:,.1f}"), ("images_per_s", "images a second", "{:,.1f}"),
                ("attention_share", "attention's share", "{:.0%}"), ("peak_gb", "peak, GB", "{:.2f}"),
            ],
            label=lambda row: f"{row['layers']} layers, batch {row['batch']}",
        ),
    ),
    "communication": (
        Shape(
            [
                PATTERN, ("density", "density", "{:.2%}"),
                *((f"weight_max_{ranks}", f"{ranks} ranks", "{:.2%}") for ranks in (2, 4, 8, 16, 32, 64)),
            ],
            label=_tokens,
        ),
        Shape(
            [
                PATTERN, ("seq_len", "tokens", "{:,}"), ("forward_mb_8", "MB", "{:,.1f}"),
                ("ring_mb_8", "ring's MB", "{:,.0f}"),
            ],
            "Megabytes at 8 ranks",
        ),
    ),
    "balance": tuple(
        Shape(
            [
                PATTERN, ("seq_len", "tokens", "{:,}"), ("blocks", "blocks", "{:,}"),
                *((f"{deal}_{ranks}", deal, "{:.2f}") for deal in ("contiguous", "zigzag", "weight")),
            ],
            f"{ranks} ranks",
        )
        for ranks in (4, 16, 64)
    ),
    "path256-evaluate": (ACCURACY,),
    "pathx-evaluate": (ACCURACY,),
    **{f"path256-all-pixels-{task}-{masks}": (EVERY_PIXEL,) for task in TASKS for masks in MASKS},
}  # fmt: skip
