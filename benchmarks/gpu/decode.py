"""Decoding: one query for each of several samples, over a long cache of which its row of the mask is read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

import sparseflash as sf
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.work import Rates
from benchmarks.masks import random_mask
from sparseflash.tools.timing import Call, time_interleaved
from tests.oracle import Case, check


@dataclass(frozen=True)
class Decode:
    """One row.

    Attributes:
        capacity: tokens in the cache of each sample.
        density: share of the cache's blocks of 128 keys that the query sees.
        batch, heads, kv_heads, head_dim, dtype: of the operands.
    """

    capacity: int = 65536
    density: float = 0.05
    batch: int = 16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def asked(self) -> dict[str, Any]:
        """What the row is known by."""
        return {"kind": "decode", **asdict(self)}


def asked() -> Iterator[dict[str, Any]]:
    """The target's row, and the same over the whole cache."""
    yield Decode().asked()
    yield Decode(density=1.0).asked()


def measure(row: Decode, machine: Machine, card: Rates, runs: int = 50) -> dict[str, Any]:
    """Times, and the share of the copy bandwidth that the blocks read come to."""
    dtype, device, unit = getattr(torch, row.dtype), machine.device, 128
    mask = random_mask(row.density, unit).pattern(row.capacity).compile(row.capacity, block=(16, unit))
    table = sf.lookup(mask, device)
    seen = torch.from_numpy(_last_row(mask)).to(device)
    group = row.heads // row.kv_heads
    nbytes = 2 * row.batch * row.kv_heads * int(seen.sum()) * row.head_dim * dtype.itemsize

    def draw() -> tuple[torch.Tensor, ...]:
        q = torch.randn(row.batch, row.heads, 1, row.head_dim, device=device, dtype=dtype)
        k, v = torch.randn(2, row.batch, row.kv_heads, row.capacity, row.head_dim, device=device, dtype=dtype)
        return q, k, v

    # As many caches as keep the blocks read out of the device's own cache, and fit its memory.
    sets = [draw() for _ in range(min(machine.sets(nbytes), 4))]
    lengths = torch.full((row.batch,), row.capacity, dtype=torch.int32, device=device)
    q, k, v = sets[0]
    out = sf.decode(q, k, v, table, lengths=lengths)
    if wrong := _wrong(out, q, k, v, seen):
        return {"failed": wrong}

    def dense(one: tuple[torch.Tensor, ...]) -> Call:
        q, k, v = one
        return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=group > 1)

    def ours(one: tuple[torch.Tensor, ...]) -> Call:
        q, k, v = one
        return lambda: sf.decode(q, k, v, table, lengths=lengths)

    calls = {"ours": [ours(one) for one in sets], "sdpa": [dense(one) for one in sets]}
    found = time_interleaved(calls, runs, machine.clock, may_fail=lambda name: name == "sdpa")
    medians = {name: statistics.median(times) for name, times in found.times.items()}
    result: dict[str, Any] = {"bytes": nbytes, "sets": len(sets), "left_out": dict(found.failed)}
    for name, median in medians.items():
        result[f"{name}_ms"] = 1e3 * median
        result[f"{name}_ms_spread"] = 1e3 * (max(found.times[name]) - min(found.times[name]))
    result["share"] = nbytes / card.bytes / medians["ours"]
    if "sdpa" in medians:
        result["over_dense sdpa"] = medians["sdpa"] / medians["ours"]
    return result


def _last_row(mask: sf.BlockMask) -> NDArray[np.bool_]:
    """Which keys the last query sees, bool [tokens]; the mask stores whole blocks alone."""
    blocks = mask.to_scipy()[[mask.grid_shape[0] - 1]].indices
    return np.isin(np.arange(mask.shape[1]) // mask.block[1], blocks)


def _wrong(out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> str | None:
    """What disagrees with masked dense attention, for the last sample; the law of `tests/oracle.py`."""
    q, k, v = (x[-1:] for x in (q, k, v))
    case = Case(q, k, v, torch.zeros_like(q), torch.zeros(q.shape[:3], device=q.device), q.shape[-1] ** -0.5)
    try:
        check(case, seen[None], [out[-1:], None, None, None, None])
    except AssertionError as error:
        return str(error)
    return None
