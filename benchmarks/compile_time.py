"""Time and memory to compile each pattern to a table, on one core, compared with FlexAttention.

python -m benchmarks.compile_time            # prints and writes results/<device>/<date>-compile_time.json
python -m benchmarks.compile_time --dry-run  # prints only
python -m benchmarks.compile_time --longest 1048576 --no-flex
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch.nn.attention.flex_attention import create_block_mask

import sparseflash as sf
from benchmarks.masks import MASKS, Mod, side
from benchmarks.record import write
from sparseflash.patterns import Pattern
from sparseflash.patterns.advice import WastefulPattern
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.compiling import compile_with_advice
from sparseflash.patterns.image import tiles_on_axes
from sparseflash.patterns.interval import allowed_columns
from sparseflash.patterns.set_operations import full_mask
from sparseflash.tables.lookup import cached_lookup

LENGTHS = (1 << 13, 1 << 16, 1 << 20, 1 << 24)
RUNS = 5
# create_block_mask makes the dense mask: 8,192 tokens take gigabytes, and at 32,768 it was killed on 24 GB.
FLEX_LONGEST = 1 << 13


def build(
    pattern: Pattern, seq_len: int, device: torch.device | str = "cpu"
) -> tuple[float, float, sf.BlockMask, sf.LookupTable]:
    """Seconds to compile the mask and to build the table, with all caches emptied first."""
    for cache in (compile_with_advice, compile_pattern, full_mask, allowed_columns, tiles_on_axes, cached_lookup):
        cache.cache_clear()
    begun = time.perf_counter()
    mask = pattern.compile(seq_len, block=128)
    compiled = time.perf_counter()
    table = sf.lookup(mask, device)
    return compiled - begun, time.perf_counter() - compiled, mask, table


def measure(name: str, seq_len: int) -> dict[str, Any]:
    """Medians over the runs, and the peak of what Python and numpy allocate in one more."""
    pattern = MASKS[name].pattern(seq_len)
    build(pattern, seq_len)  # what is kept beside masks, like the order of an image's pixels, is made once
    runs = [build(pattern, seq_len)[:2] for _ in range(RUNS)]
    tracemalloc.start()
    _, _, mask, table = build(pattern, seq_len)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    totals = [sum(run) for run in runs]
    return {
        "expression": name,
        "seq_len": seq_len,
        "blocks": mask.nnz,
        "blocks_a_row": mask.nnz / mask.grid_shape[0],
        "density": mask.density,
        "compile_ms": 1e3 * statistics.median(r[0] for r in runs),
        "lookup_ms": 1e3 * statistics.median(r[1] for r in runs),
        "total_ms": 1e3 * statistics.median(totals),
        "total_ms_min": 1e3 * min(totals),
        "total_ms_max": 1e3 * max(totals),
        "peak_mb": peak / 1e6,
        "table_mb": table.nbytes / 1e6,
    }


def measure_flex(mod: Mod, seq_len: int) -> dict[str, Any]:
    """One run of create_block_mask: seconds, and megabytes by which the process grew at its peak."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begun = time.perf_counter()
    create_block_mask(mod, None, None, seq_len, seq_len, device="cpu")
    return {"flex_ms": 1e3 * (time.perf_counter() - begun), "flex_mb": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out longer sequences")
    parser.add_argument("--no-flex", action="store_true", help="leave out create_block_mask")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Freeing one large array makes glibc keep freed memory for the next arrays, as in any program that has loaded a
    # model; before that it returns every one to the system, and a third of the time goes into page faults.
    np.empty(32_000_000, np.uint8)
    warnings.simplefilter("ignore", WastefulPattern)
    cases = [(n, name) for n in LENGTHS if n <= arguments.longest for name in MASKS]
    rows = []
    with Progress() as progress:
        print = progress.console.print
        task = progress.add_task("measuring", total=len(cases))
        for seq_len, name in cases:
            progress.update(task, description=f"{name} at {seq_len:,}")
            mask = MASKS[name]
            if seq_len > mask.longest:
                print(
                    f"{name:<68} {seq_len:>10,}  left out: more than 100 million blocks", markup=False, soft_wrap=True
                )
            else:
                tokens = side(seq_len) ** 2 if "(s, s)" in name else seq_len
                row = measure(name, tokens)
                if mask.mod is not None and tokens <= FLEX_LONGEST and not arguments.no_flex:
                    row |= measure_flex(mask.mod(tokens), tokens)
                rows.append(row)
                flex = (
                    f"   create_block_mask {row['flex_ms']:,.0f} ms {row['flex_mb']:,.0f} MB"
                    if "flex_ms" in row
                    else ""
                )
                print(
                    f"{name:<68} {tokens:>10,} {row['blocks_a_row']:>8.1f} a row {row['compile_ms']:>8.1f} + "
                    f"{row['lookup_ms']:>7.1f} ms {row['peak_mb']:>7.1f} MB{flex}",
                    markup=False,
                    soft_wrap=True,
                )
            progress.advance(task)
    if not arguments.dry_run:
        print("written:", str(write("compile_time", rows, runs=RUNS)))


if __name__ == "__main__":
    main()
