"""Attention on a CPU compared with dense SDPA and compiled FlexAttention, interleaved in one process.

    python -m benchmarks.cpu                  # all settings that today's result file lacks, into that file
    python -m benchmarks.cpu --seconds 170    # begins no setting after that long; run it again for the rest
    python -m benchmarks.cpu --only 0 --runs 2 --dry-run

"of ideal" is (dense SDPA time x density) / our time: 1.00 means that every skipped block was time saved. FlexAttention
gets the same blocks and a mask_mod as its user would write one; it has no backward on a CPU. Past 20,000 tokens dense
SDPA takes so long that it runs with one head, and "memory" rows with eight heads are measured apart.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import flex_attention

import sparseflash as sf
from benchmarks.masks import CPU_MASKS, Mask
from benchmarks.record import result_path, write
from sparseflash.integrations.flex import to_flex
from sparseflash.tools.bench import peak_mb
from sparseflash.tools.timing import Call, time_interleaved

Key = tuple[str, str, str]  # whose call, of which mask, "fwd" or "fwd_bwd"


@dataclass(frozen=True)
class Setting:
    """Shapes and dtype of one round of measurements, over all masks."""

    seq_len: int
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"


SETTINGS = (
    Setting(4096),
    Setting(4096, dtype="bfloat16"),
    Setting(4096, head_dim=32),
    Setting(4096, head_dim=128),
    Setting(16384),
    Setting(16384, dtype="bfloat16"),
    Setting(65536, heads=1),
    Setting(65536, heads=1, dtype="bfloat16"),
)
DENSE_TO = 20_000  # tokens up to which masks of half the blocks and more are measured
MEMORY = Setting(65536, heads=8), Setting(65536, heads=8, dtype="bfloat16")


def operands(setting: Setting) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = 1, setting.heads, setting.seq_len, setting.head_dim
    drawn = [torch.randn(shape, generator=generator).to(getattr(torch, setting.dtype)) for _ in range(4)]
    return [*(x.requires_grad_() for x in drawn[:3]), drawn[3]]


def flex(mask: Mask, tokens: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call | None:
    """FlexAttention over the mask's blocks, with the mask_mod that its user would write."""
    if mask.mod is None:
        return None
    ours = to_flex(mask.pattern(tokens).compile(tokens))
    theirs = FlexMask.from_kv_blocks(
        ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices,
        BLOCK_SIZE=ours.BLOCK_SIZE, mask_mod=mask.mod(tokens), seq_lengths=ours.seq_lengths,
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    q, k, v = (x.detach() for x in (q, k, v))  # it refuses operands with gradients, even without a backward
    return lambda: compiled(q, k, v, block_mask=theirs)


def measure(
    setting: Setting,
    masks: dict[str, Mask],
    runs: int,
    with_flex: bool = True,
    progress: Callable[[str], object] = print,
) -> list[dict[str, Any]]:
    """A row a mask. One round times every call once; the first round is a warm-up."""
    q, k, v, dout = operands(setting)
    compiled = {name: mask.pattern(setting.seq_len).compile(setting.seq_len, block=128) for name, mask in masks.items()}
    calls: dict[Key, Call] = {}

    def both(who: str, name: str, call: Call) -> None:
        calls[who, name, "fwd"] = torch.no_grad()(call)
        calls[who, name, "fwd_bwd"] = lambda: torch.autograd.grad(call(), (q, k, v), dout)

    both("sdpa", "", lambda: F.scaled_dot_product_attention(q, k, v))
    for name, mask in compiled.items():
        both("ours", name, partial(sf.attention, q, k, v, sf.lookup(mask)))
        if with_flex and (call := flex(masks[name], setting.seq_len, q, k, v)) is not None:
            calls["flex", name, "fwd"] = torch.no_grad()(call)
    # Whatever FlexAttention's compiler says, the other figures are still wanted.
    found = time_interleaved(calls, runs, may_fail=lambda key: key[0] == "flex", progress=progress)
    failed = {mask: why for (_, mask, _), why in found.failed.items()}
    return [
        {
            "expression": name, **dataclasses.asdict(setting), "block": 128, "density": mask.density,
            "token_density": mask.token_density, "runs": runs, **figures(name, mask.density, found.times),
            **({"flex_failed": failed[name]} if name in failed else {}),
        }
        for name, mask in compiled.items()
    ]  # fmt: skip


def figures(name: str, density: float, times: dict[Key, list[float]]) -> dict[str, float]:
    """Medians, spreads and ratios of one mask."""
    found = {}
    for who, mask in (("ours", name), ("sdpa", ""), ("flex", name)):
        for part in ("fwd", "fwd_bwd"):
            if taken := times.get((who, mask, part)):
                found[f"{who}_{part}_ms"] = 1e3 * statistics.median(taken)
                found[f"{who}_{part}_ms_spread"] = 1e3 * (max(taken) - min(taken))
    for part in ("fwd", "fwd_bwd"):
        found[f"of_ideal_{part}"] = found[f"sdpa_{part}_ms"] * density / found[f"ours_{part}_ms"]
    if "flex_fwd_ms" in found:
        found["over_flex_fwd"] = found["flex_fwd_ms"] / found["ours_fwd_ms"]
    return found


def measure_memory(setting: Setting, masks: dict[str, Mask]) -> list[dict[str, Any]]:
    """Peak growth of resident memory beyond results, in MB, of our forward and of forward + backward."""
    q, k, v, dout = operands(setting)
    rows = []
    for name, mask in masks.items():
        table = sf.lookup(mask.pattern(setting.seq_len).compile(setting.seq_len, block=128))
        row: dict[str, Any] = {"expression": name, **dataclasses.asdict(setting), "memory": True}
        result = (q.nbytes + q.numel() // q.shape[3] * 4) / 1e6  # out and lse
        for part in ("fwd", "fwd_bwd"):
            backward = part == "fwd_bwd"
            with torch.set_grad_enabled(backward), peak_mb("cpu") as peak:
                out = sf.attention(q, k, v, table)
                if backward:
                    torch.autograd.grad(out, (q, k, v), dout)
            grown = peak()
            del out  # not to be freed while the next part is measured
            if grown is not None:
                row[f"extra_{part}_mb"] = grown - result - backward * 3 * q.nbytes / 1e6
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each call; fewer past 20,000 tokens")
    parser.add_argument("--threads", type=int, default=2, help="torch threads for all calls")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that long")
    parser.add_argument("--only", type=int, nargs="+", help="which settings, counted from 0; memory comes last")
    parser.add_argument("--no-flex", action="store_true", help="without FlexAttention and its compile times")
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    # A mask_mod each: past the default of 8, FlexAttention would run uncompiled, a hundred times slower.
    torch._dynamo.config.recompile_limit = 1000
    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()
    path = result_path("cpu")
    rows = json.loads(path.read_text())["rows"] if path.exists() and not arguments.dry_run else []
    settings = [(x, False) for x in SETTINGS] + [(x, True) for x in MEMORY]
    for number, (setting, memory) in enumerate(settings):
        key = dataclasses.asdict(setting)
        done = any(all(row[k] == v for k, v in key.items()) and row.get("memory", False) == memory for row in rows)
        if done or (arguments.only is not None and number not in arguments.only):
            continue
        if time.perf_counter() - begun > arguments.seconds:
            print("time is up: run again for the rest")
            break
        long = setting.seq_len > DENSE_TO
        masks = {name: mask for name, mask in CPU_MASKS.items() if not (long and name in ("causal()", "full()"))}
        if memory:
            fresh = measure_memory(setting, masks)
        else:
            runs = (
                min(arguments.runs, 2) if long else min(arguments.runs, 3) if setting.seq_len > 8192 else arguments.runs
            )
            fresh = measure(
                setting, masks, runs, not arguments.no_flex, lambda what: print(f"\r{what:<79}", end="", flush=True)
            )
        for row in fresh:
            print(
                "\r" + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()), flush=True
            )
        rows += fresh
        if not arguments.dry_run:
            print("written:", write("cpu", rows, runs=arguments.runs))


if __name__ == "__main__":
    main()
