"""Attention on a CPU beside dense SDPA, interleaved in one process, forward and forward + backward.

    python -m benchmarks.cpu                          # prints and writes results/<device>/<date>-cpu.json
    python -m benchmarks.cpu --lengths 1024 --dry-run  # a quick look

"of ideal" is (dense SDPA time x density) / our time: 1.00 means that every skipped block was time saved.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

import sparseflash as sf
from benchmarks.record import write

EXPRESSIONS = (
    "local(512)",
    "butterfly(unit=128)",
    "local(128) | butterfly(unit=128)",
    "causal() & local(1024)",
    "causal()",
    "full()",
)
HEADS, DIM = 4, 64


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(expression: str, seq_len: int, dtype: torch.dtype, runs: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, HEADS, seq_len, DIM, generator=generator).to(dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = sf.parse(expression).compile(seq_len, block=128)
    table = sf.lookup(mask)

    def ours() -> torch.Tensor:
        return sf.attention(q, k, v, table)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def without_grad(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return torch.no_grad()(call)

    def with_backward(call: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(), leaves, dout)

    calls = {
        "ours_fwd": without_grad(ours),
        "sdpa_fwd": without_grad(dense),
        "ours_fwd_bwd": with_backward(ours),
        "sdpa_fwd_bwd": with_backward(dense),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):  # the first is a warm-up
        for name, call in calls.items():
            seconds = timed(call)
            if run:
                times[name].append(seconds)
    row: dict[str, Any] = {
        "expression": expression, "seq_len": seq_len, "dtype": str(dtype).removeprefix("torch."), "heads": HEADS,
        "head_dim": DIM, "block": 128, "density": mask.density, "token_density": mask.token_density,
    }  # fmt: skip
    for name, taken in times.items():
        row[f"{name}_ms"] = 1e3 * statistics.median(taken)
        row[f"{name}_ms_spread"] = 1e3 * (max(taken) - min(taken))
    for part in ("fwd", "fwd_bwd"):
        row[f"of_ideal_{part}"] = row[f"sdpa_{part}_ms"] * mask.density / row[f"ours_{part}_ms"]
        row[f"speedup_{part}"] = row[f"sdpa_{part}_ms"] / row[f"ours_{part}_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192], help="tokens")
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each call; the median is printed")
    parser.add_argument("--threads", type=int, default=2, help="torch threads for all calls")
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(f"{'expression':<34} {'tokens':>7} {'dtype':>9} {'density':>8} {'fwd ms':>9} {'sdpa':>9} {'ideal':>6} "
          f"{'f+b ms':>9} {'sdpa':>9} {'ideal':>6}")  # fmt: skip
    for seq_len in arguments.lengths:
        for dtype in (torch.float32, torch.bfloat16):
            for expression in EXPRESSIONS:
                row = measure(expression, seq_len, dtype, arguments.runs)
                rows.append(row)
                print(
                    f"{expression:<34} {seq_len:>7,} {row['dtype']:>9} {row['density']:>8.2%} "
                    f"{row['ours_fwd_ms']:>9.1f} {row['sdpa_fwd_ms']:>9.1f} {row['of_ideal_fwd']:>6.2f} "
                    f"{row['ours_fwd_bwd_ms']:>9.1f} {row['sdpa_fwd_bwd_ms']:>9.1f} {row['of_ideal_fwd_bwd']:>6.2f}",
                    flush=True,
                )
    if not arguments.dry_run:
        print("written:", write("cpu", rows, runs=arguments.runs))


if __name__ == "__main__":
    main()
