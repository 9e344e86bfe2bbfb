"""Part "peers": time and memory to create a mask, ours and FlexAttention's, from 8,192 tokens to a million.

Ours is compiled on the host and copied to the device as a table; `create_block_mask` looks at every pair on the device,
all at once or, compiled, in one program. Time is the wall's, until the device is done; of ours every run starts from
nothing, with no cache. Memory is what the device held at most beyond what it held before.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask

import sparseflash as sf
from benchmarks.compile_time import build
from benchmarks.gpu.machine import Machine
from benchmarks.masks import GPU_MASKS
from benchmarks.record import Growing
from sparseflash.patterns.advice import WastefulPattern
from sparseflash.tools.bench import peak_mb
from sparseflash.tools.timing import reason, waiting_for

LENGTHS = tuple(1 << n for n in (13, 15, 17, 16, 14, 18, 19, 20))
MASKS = ("causal()", "local(1024) | butterfly(unit=128)", "documents(random, 64 to 8192)")
WAYS = ("ours", "create_block_mask", "create_block_mask, compiled")
RUNS = 3
# Pairs past which a way is not tried: evaluated all at once they take some bytes each.
MOST_PAIRS = {"ours": 1 << 60, "create_block_mask": 1 << 34, "create_block_mask, compiled": 1 << 40}


def asked(lengths: tuple[int, ...] = LENGTHS) -> Iterator[dict[str, Any]]:
    """What the rows are known by: all ways of a mask at a length, then the next."""
    for tokens in lengths:
        for mask in MASKS:
            yield from ({"mask": mask, "seq_len": tokens, "way": way} for way in WAYS)


def measure(mask: str, seq_len: int, way: str, machine: Machine, runs: int = RUNS) -> dict[str, Any]:
    """Median and spread in ms, and the memory of one more run in MB; the first run, which may compile, apart."""
    if seq_len**2 > MOST_PAIRS[way]:
        return {"left_out": f"{seq_len**2:.1e} pairs at once would not fit the device's memory"}
    device = machine.device
    clock = waiting_for(device)
    call = _ours(mask, seq_len, device) if way == "ours" else _flex(mask, seq_len, device, "compiled" in way)
    try:
        first = clock(call)
        times = [clock(call) for _ in range(runs)]
        machine.empty_cache()
        with peak_mb(str(device)) as peak:
            call()
        grown = peak()
    except torch.OutOfMemoryError as error:
        return {"left_out": reason(error)}
    return {
        "ms": 1e3 * statistics.median(times), "ms_spread": 1e3 * (max(times) - min(times)), "first_s": first,
        "runs": runs, **({} if grown is None else {"peak_mb": grown}),
    }  # fmt: skip


def _ours(mask: str, seq_len: int, device: torch.device) -> Callable[[], object]:
    pattern = GPU_MASKS[mask].pattern(seq_len)

    def call() -> sf.LookupTable:
        return build(pattern, seq_len, device)[3]

    return call


def _flex(mask: str, seq_len: int, device: torch.device, compiled: bool) -> Callable[[], object]:
    make = GPU_MASKS[mask].mod
    assert make is not None
    with torch.device(device):
        mod = make(seq_len)
    return lambda: create_block_mask(mod, None, None, seq_len, seq_len, device=device, _compile=compiled)


def run(
    machine: Machine,
    seconds: float,
    path: Path | None = None,
    lengths: tuple[int, ...] = LENGTHS,
    say: Callable[[str], object] = print,
    again: bool = False,
) -> bool:
    """Measure the rows that are missing; whether all are there."""
    warnings.simplefilter("ignore", WastefulPattern)
    results = Growing("peers", path)

    def one(asked: Mapping[str, Any], left: float) -> Mapping[str, Any]:
        found = measure(**asked, machine=machine)
        say(f"  {found['ms']:,.1f} ms" if "ms" in found else f"  left out: {found['left_out']}")
        return found

    return results.go_on(
        asked(lengths), one, seconds, say, again=lambda row: again and "failed" in row, alive=machine.alive
    )
