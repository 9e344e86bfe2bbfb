"""Attention over patterns of images and videos on a CPU, beside dense SDPA: one head of 128, at the shapes of models.

    python -m benchmarks.grid_attention                 # prints and writes results/<device>/<date>-grid_attention.json
    python -m benchmarks.grid_attention --only Wan --dtype float32 --dry-run

Times are processor time of one thread, forward only, and medians of rounds in which every contender takes its turn:
other programs on the machine slow them less than the clock on the wall. Dense SDPA runs for 2,048 queries in the middle
of the sequence, over all keys, and its time is multiplied by tokens / 2,048, as queries do not depend on each other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F

import sparseflash as sf
from benchmarks.grids import IMAGES, VIDEOS
from benchmarks.record import write
from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.advice import WastefulPattern
from sparseflash.tools.timing import Call, time_interleaved

RUNS = 3
BLOCK, HEAD_DIM, QUERIES = 128, 128, 2048
DTYPES = ("float32", "bfloat16")


def cases() -> Iterator[tuple[str, tuple[int, ...], list[Pattern]]]:
    """Names, shapes and patterns."""
    for name, (shape, window) in VIDEOS.items():
        own = P.neighborhood(shape, kernel_size=window)
        ordered = P.neighborhood(shape, None, "tile", kernel_size=window, tile=(2, 8, 8))
        yield name, shape, [own, ordered, own.coarser(BLOCK), P.sliding_tile(shape, (2, 8, 8), 3)]
    for name, (image, side) in IMAGES.items():
        own = P.neighborhood(image, kernel_size=side)
        yield name, image, [own, P.neighborhood(image, None, "hilbert", kernel_size=side), own.coarser(BLOCK)]


def processor(call: Call) -> float:
    """Seconds of processor time."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


@torch.no_grad()
def measure(
    name: str, shape: tuple[int, ...], patterns: list[Pattern], dtype: str, runs: int = RUNS
) -> list[dict[str, Any]]:
    """A row a pattern."""
    tokens = prod(shape)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, HEAD_DIM, generator=generator).to(getattr(torch, dtype)) for _ in range(3))
    masks = {pattern: pattern.compile(tokens, block=BLOCK) for pattern in patterns}
    calls: dict[Pattern | None, Call] = {
        pattern: partial(sf.attention, q, k, v, sf.lookup(mask)) for pattern, mask in masks.items()
    }
    queries = min(QUERIES, tokens)
    begin = (tokens - queries) // 2
    calls[None] = partial(F.scaled_dot_product_attention, q[:, :, begin : begin + queries], k, v)
    taken = time_interleaved(calls, runs, processor).times
    times = {who: 1e3 * statistics.median(seconds) for who, seconds in taken.items()}
    dense = times[None] * tokens / queries
    return [
        {
            "grid": f"{name}: {' x '.join(map(str, shape))}, {tokens:,} tokens, {dtype}",
            "expression": str(pattern),
            "seq_len": tokens,
            "dtype": dtype,
            "density": mask.density,
            "token_density": mask.token_density,
            "stored_over_allowed": mask.density / mask.token_density,
            "ours_fwd_ms": times[pattern],
            "sdpa_fwd_ms": dense,
            "sdpa_queries": queries,
            "over_sdpa": dense / times[pattern],
            "of_ideal_fwd": dense / times[pattern] * mask.density,
        }
        for pattern, mask in masks.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="shapes whose name begins so, such as Wan")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", WastefulPattern)
    rows, load = [], [os.getloadavg()[0]]
    for name, shape, patterns in cases():
        for dtype in arguments.dtype:
            if not name.startswith(arguments.only):
                continue
            for row in measure(name, shape, patterns, dtype):
                rows.append(row)
                print(
                    f"{row['grid']}: {row['density']:.1%} stored, {row['ours_fwd_ms']:,.0f} ms, dense "
                    f"{row['sdpa_fwd_ms']:,.0f} ms, of ideal {row['of_ideal_fwd']:.2f}  {row['expression']}",
                    flush=True,
                )
            load.append(os.getloadavg()[0])
    if not arguments.dry_run:
        load_average = {"from": min(load), "to": max(load)}
        print("written:", str(write("grid_attention", rows, median_of=RUNS, load_average=load_average)))


if __name__ == "__main__":
    main()
