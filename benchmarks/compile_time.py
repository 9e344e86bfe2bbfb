"""How long a pattern takes to become a table, and how much memory, on one core.

python -m benchmarks.compile_time            # prints and writes results/<device>/<date>-compile_time.json
python -m benchmarks.compile_time --dry-run  # prints only
"""

from __future__ import annotations

import argparse
import statistics
import time
import tracemalloc
from typing import Any

import torch

import sparseflash as sf
from benchmarks.record import write
from sparseflash.patterns.block_mask import full_mask
from sparseflash.patterns.compiling import compile_pattern, compile_with_advice
from sparseflash.tables import _lookup

EXPRESSIONS = (
    "full()",
    "causal()",
    "local(1024)",
    "butterfly(unit=128)",
    "global_tokens(64)",
    "strided(128, unit=128)",
    "causal() & (local(1024) | butterfly(unit=128))",
    "~(local(1024) | butterfly(unit=128)) & causal()",
)
LENGTHS = (1 << 16, 1 << 20)
RUNS = 5


def build(expression: str, seq_len: int) -> tuple[float, float, sf.BlockMask, sf.LookupTable]:
    """Seconds to the mask and to the table, from nothing: every cache is emptied first."""
    for cache in (compile_with_advice, compile_pattern, full_mask, _lookup):
        cache.cache_clear()
    pattern = sf.parse(expression)
    begun = time.perf_counter()
    mask = pattern.compile(seq_len, block=128)
    compiled = time.perf_counter()
    table = sf.lookup(mask)
    return compiled - begun, time.perf_counter() - compiled, mask, table


def measure(expression: str, seq_len: int) -> dict[str, Any]:
    runs = [build(expression, seq_len)[:2] for _ in range(RUNS)]
    tracemalloc.start()
    _, _, mask, table = build(expression, seq_len)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    totals = [sum(run) for run in runs]
    return {
        "expression": expression,
        "seq_len": seq_len,
        "blocks": mask.nnz,
        "density": mask.density,
        "compile_ms": 1e3 * statistics.median(r[0] for r in runs),
        "lookup_ms": 1e3 * statistics.median(r[1] for r in runs),
        "total_ms_min": 1e3 * min(totals),
        "total_ms_max": 1e3 * max(totals),
        "peak_mb": peak / 1e6,
        "table_mb": table.nbytes / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'expression':<50} {'tokens':>9} {'blocks':>12} {'compile':>10} {'lookup':>10} {'peak':>9} {'table':>9}")
    for seq_len in LENGTHS:
        for expression in EXPRESSIONS:
            if expression.startswith("~") and seq_len > 1 << 16:
                print(f"{expression:<50} {seq_len:>9,} skipped: 33 million stored blocks, inherently O(N^2)")
                continue
            row = measure(expression, seq_len)
            rows.append(row)
            print(
                f"{expression:<50} {seq_len:>9,} {row['blocks']:>12,} {row['compile_ms']:>7.1f} ms "
                f"{row['lookup_ms']:>7.1f} ms {row['peak_mb']:>6.1f} MB {row['table_mb']:>6.1f} MB",
                flush=True,
            )
    if not arguments.dry_run:
        print("written:", write("compile_time", rows, runs=RUNS))


if __name__ == "__main__":
    main()
