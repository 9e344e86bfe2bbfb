"""The speed-up of a mask on this machine: block-sparse attention, dense SDPA and FlexAttention, timed interleaved."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparseflash.functional.attention import attention
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.tables.lookup import lookup
from sparseflash.tools.timing import time_interleaved, waiting_for

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A case to measure.

    Attributes:
        pattern: which query may see which key.
        seq_len: tokens of queries and keys.
        batch, heads, kv_heads, head_dim: shapes of q and of k and v; kv_heads None means heads.
        dtype, device: of the operands.
        backward: time the gradients too.
        block: tokens per block side.
        runs: timed runs of each contender, after one warm-up run.
        flex: FlexAttention, compiled, as a contender.
    """

    pattern: Pattern
    seq_len: int
    batch: int = 1
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    block: int | tuple[int, int] = 128
    runs: int = 5
    flex: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "heads", "kv_heads", "head_dim", "runs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")


@dataclass(frozen=True)
class Figures:
    """The figures of a contender: median and spread of its runs, the first call, and peak growth of memory."""

    median_ms: float
    spread_ms: float
    first_call_s: float
    peak_extra_mb: float | None  # None if the system does not report it


@dataclass(frozen=True)
class Comparison:
    """The result for a mask.

    Attributes:
        case: the case.
        density, token_density: stored blocks of all blocks, allowed pairs of all pairs.
        contenders: the figures of each implementation, by its name.
        left_out: reasons why others are missing, by their names.
    """

    case: Case
    density: float
    token_density: float
    contenders: dict[str, Figures]
    left_out: dict[str, str]

    @property
    def speedup(self) -> float:
        """Speed-up over dense SDPA."""
        return self.contenders["sdpa"].median_ms / self.contenders["sparseflash"].median_ms

    @property
    def ideal_speedup(self) -> float | None:
        """Speed-up if time were proportional to the stored blocks; None for an empty mask."""
        return 1 / self.density if self.density else None

    @property
    def share_of_ideal(self) -> float:
        """Speed-up x density: 1.0 if time is proportional to the stored blocks."""
        return self.speedup * self.density

    @property
    def verdict(self) -> str:
        """A sentence about the speed-up."""
        what = "forward and backward" if self.case.backward else "forward"
        stored = f"the mask stores {self.density:.1%} of the blocks"
        if self.speedup < 1:
            return f"The {what} takes {1 / self.speedup:.1f} times as long as dense attention although {stored}."
        gained = f"The {what} is {self.speedup:.1f} times as fast as dense attention; {stored}"
        if self.ideal_speedup is None:
            return f"{gained}."
        return f"{gained}, which allows {self.ideal_speedup:.1f} times: {self.share_of_ideal:.0%} of the ideal."

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = {f.name: getattr(self.case, f.name) for f in dataclasses.fields(self.case)}
        return {
            **case,
            "pattern": str(self.case.pattern),
            "dtype": str(self.case.dtype).removeprefix("torch."),
            "density": self.density,
            "token_density": self.token_density,
            "contenders": {name: dataclasses.asdict(figures) for name, figures in self.contenders.items()},
            "left_out": self.left_out,
            "speedup": self.speedup,
            "ideal_speedup": self.ideal_speedup,
            "share_of_ideal": self.share_of_ideal,
            "verdict": self.verdict,
        }


def measure(case: Case, progress: Callable[[str], object] = lambda _: None) -> Comparison:
    """Time all contenders, interleaved in one process.

    Args:
        case: the case to measure.
        progress: called with a line about each step.

    Example:
        >>> import sparseflash as sf
        >>> found = measure(Case(sf.parse("local(32)"), seq_len=512, heads=1, head_dim=16, block=32, runs=1))
        >>> sorted(found.contenders)
        ['sdpa', 'sparseflash']
    """
    progress("compiling the mask")
    mask = case.pattern.compile(case.seq_len, block=case.block)
    calls, left_out = _contenders(case, mask)
    # If FlexAttention fails to compile, the other figures are still reported.
    timings = time_interleaved(
        calls, case.runs, waiting_for(case.device), may_fail=lambda name: name == "flex", progress=progress
    )
    left_out |= timings.failed
    contenders = {}
    for name, call in calls.items():
        if name in left_out:
            continue
        with peak_mb(case.device) as peak:
            call()
        times = timings.times[name]
        contenders[name] = Figures(
            1e3 * statistics.median(times), 1e3 * (max(times) - min(times)), timings.first[name], peak()
        )
    return Comparison(case, mask.density, mask.token_density, contenders, left_out)


def _contenders(case: Case, mask: BlockMask) -> tuple[dict[str, Call], dict[str, str]]:
    generator = torch.Generator().manual_seed(0)

    def operand(heads: int) -> torch.Tensor:
        x = torch.randn(case.batch, heads, case.seq_len, case.head_dim, generator=generator)
        return x.to(case.device, case.dtype).requires_grad_(case.backward)

    kv_heads = case.kv_heads or case.heads
    q, k, v = operand(case.heads), operand(kv_heads), operand(kv_heads)
    dout = torch.randn(q.shape, generator=generator).to(case.device, case.dtype)
    table = lookup(mask, case.device)
    grouped = kv_heads != case.heads

    def whole(forward: Call) -> Call:
        if not case.backward:
            return torch.no_grad()(forward)
        return lambda: torch.autograd.grad(forward(), (q, k, v), dout)[0]

    contenders = {
        "sparseflash": whole(lambda: attention(q, k, v, table)),
        "sdpa": whole(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)),
    }
    if not case.flex:
        return contenders, {"flex": "not asked for"}
    if case.backward and torch.device(case.device).type == "cpu":
        return contenders, {"flex": "FlexAttention has no backward on a CPU"}
    return contenders | {"flex": whole(_flex(mask, q, k, v, grouped))}, {}


def _flex(mask: BlockMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    from sparseflash.integrations.flex import to_flex

    theirs = to_flex(mask, q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=theirs, enable_gqa=grouped)


@contextmanager
def peak_mb(device: str) -> Iterator[Callable[[], float | None]]:
    """Peak growth of memory while the block ran, in MB; None if the system does not report it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
        start = _resident_mb("VmRSS")
    except OSError:
        yield lambda: None
        return
    yield lambda: max(_resident_mb("VmHWM") - start, 0.0)


def _give_back() -> None:
    """Return freed memory to the system, if the C library can, because it would hide a peak."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_mb(what: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) / 1e3
