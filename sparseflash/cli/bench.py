"""``sparseflash bench``: measure and print the speed-up of a mask."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from sparseflash.cli.show import own_pattern, tokens_of
from sparseflash.tools.bench import Case, Comparison, measure
from sparseflash.train.devices import resolve_device

NAMES = {"sparseflash": "sparseflash", "sdpa": "dense SDPA", "flex": "FlexAttention, compiled"}


def run(
    expression: str,
    seq_len: int | None,
    dtype: str,
    device: str | None,
    imports: Sequence[str],
    as_json: bool,
    **sizes: Any,
) -> None:
    """Measure with a spinner on stderr, then print."""
    precision = getattr(torch, dtype, None)
    if not isinstance(precision, torch.dtype) or not precision.is_floating_point:
        raise ValueError(f"--dtype must be float16, bfloat16, float32 or float64; got {dtype!r}")
    pattern = own_pattern(expression, imports)
    case = Case(pattern, tokens_of(pattern, seq_len), dtype=precision, device=str(resolve_device(device)), **sizes)
    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)
        found = measure(case, lambda line: bar.update(task, description=line))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        show(found, Console(highlight=False))


def show(found: Comparison, console: Console) -> None:
    """Print a table of the contenders and the conclusion."""
    case = found.case
    console.print(
        f"{case.pattern}\n{case.seq_len:,} tokens, {case.batch} x {case.heads} heads of {case.head_dim}, "
        f"{str(case.dtype).removeprefix('torch.')} on {case.device}, density {found.density:.2%} of blocks",
        markup=False,
        soft_wrap=True,
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("", "median", "spread", "peak extra memory", "first call"):
        table.add_column(title, justify="left" if not title else "right")
    for name, figures in found.contenders.items():
        peak = figures.peak_extra_mb
        table.add_row(
            NAMES[name],
            f"{figures.median_ms:,.1f} ms",
            f"{figures.spread_ms:,.1f} ms",
            "" if peak is None else f"{peak:,.0f} MB",
            f"{figures.first_call_s:,.2f} s",
        )
    console.print(table)
    for name, reason in found.left_out.items():
        console.print(f"{NAMES[name]} left out: {reason}", markup=False, soft_wrap=True)
    console.print(found.verdict, markup=False, soft_wrap=True)
