"""What a mask gains on this machine: block-sparse attention beside dense SDPA and FlexAttention, interleaved."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sparseflash.functional import attention
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.rounds import interleaved, waiting_for
from sparseflash.tables import lookup

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        pattern: which query may see which key.
        seq_len: tokens of queries and keys.
        batch, heads, kv_heads, head_dim: shapes of q and of k and v; kv_heads None is heads.
        dtype, device: of the operands.
        backward: time the gradients too.
        block: tokens a block side.
        runs: timed runs of each contender; the first one more is a warm-up.
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
        for name in ("seq_len", "batch", "heads", "head_dim", "runs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")


@dataclass
class Contender:
    """One implementation: how to call it, and what came of it."""

    call: Call
    first_s: float = 0.0  # the first call, with whatever it compiles
    times: list[float] = field(default_factory=list)
    peak_mb: float | None = None


def measure(case: Case, progress: Callable[[str], object] = lambda _: None) -> dict[str, Any]:
    """Time every contender in turn, several times over, in one process.

    Args:
        case: what to measure.
        progress: told what is being done, a line at a time.

    Returns:
        Plain data: the mask's figures, a dict for each contender (median and spread in ms, peak extra memory in MB, the
        first call in s), those left out with the reason, ``speedup`` over dense SDPA, ``share_of_ideal``
        (speedup x density: 1.0 when every skipped block was time saved) and a ``verdict`` in words.

    Example:
        >>> import sparseflash as sf
        >>> found = measure(Case(sf.parse("local(32)"), seq_len=512, heads=1, head_dim=16, block=32, runs=1))
        >>> sorted(found["contenders"])
        ['sdpa', 'sparseflash']
    """
    progress("compiling the mask")
    mask = case.pattern.compile(case.seq_len, block=case.block)
    contenders, left_out = _contenders(case, mask)
    # Whatever FlexAttention's compiler says, the other figures are still wanted.
    timings = interleaved(
        {name: contender.call for name, contender in contenders.items()},
        case.runs,
        waiting_for(case.device),
        may_fail=lambda name: name == "flex",
        progress=progress,
    )
    left_out |= timings.failed
    contenders = {name: contender for name, contender in contenders.items() if name not in left_out}
    for name, contender in contenders.items():
        contender.first_s, contender.times = timings.first[name], timings.times[name]
        with peak_mb(case.device) as peak:
            contender.call()
        contender.peak_mb = peak()
    medians = {name: statistics.median(c.times) for name, c in contenders.items()}
    speedup = medians["sdpa"] / medians["sparseflash"]
    found: dict[str, Any] = {
        "pattern": str(case.pattern),
        **{f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name not in ("pattern", "dtype")},
        "dtype": str(case.dtype).removeprefix("torch."),
        "density": mask.density,
        "token_density": mask.token_density,
        "contenders": {
            name: {
                "median_ms": 1e3 * medians[name],
                "spread_ms": 1e3 * (max(c.times) - min(c.times)),
                "first_call_s": c.first_s,
                "peak_extra_mb": c.peak_mb,
            }
            for name, c in contenders.items()
        },
        "left_out": left_out,
        "speedup": speedup,
        "ideal_speedup": 1 / mask.density if mask.density else None,
        "share_of_ideal": speedup * mask.density,
    }
    return found | {"verdict": verdict(found)}


def verdict(found: dict[str, Any]) -> str:
    """A plain sentence that says what the mask gained."""
    what = "forward and backward" if found["backward"] else "forward"
    stored = f"the mask stores {found['density']:.1%} of the blocks"
    gain, share = found["speedup"], found["share_of_ideal"]
    if gain < 1:
        return f"The {what} takes {1 / gain:.1f} times as long as dense attention although {stored}."
    ideal = f"which allows {found['ideal_speedup']:.1f} times: {share:.0%} of the ideal"
    return f"The {what} is {gain:.1f} times as fast as dense attention; {stored}, {ideal}."


def _contenders(case: Case, mask: BlockMask) -> tuple[dict[str, Contender], dict[str, str]]:
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
        "sparseflash": Contender(whole(lambda: attention(q, k, v, table))),
        "sdpa": Contender(whole(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped))),
    }
    if not case.flex:
        return contenders, {"flex": "not asked for"}
    if case.backward and torch.device(case.device).type == "cpu":
        return contenders, {"flex": "FlexAttention has no backward on a CPU"}
    return contenders | {"flex": Contender(whole(_flex(mask, q, k, v, grouped)))}, {}


def _flex(mask: BlockMask, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grouped: bool) -> Call:
    from torch.nn.attention.flex_attention import flex_attention

    from sparseflash.integrations.flex import to_flex

    theirs = to_flex(mask, q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=theirs, enable_gqa=grouped)


@contextmanager
def peak_mb(device: str) -> Iterator[Callable[[], float | None]]:
    """How far memory grew at most while the block ran, in MB; None where the system does not tell."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: (torch.cuda.max_memory_allocated(device) - before) / 1e6
        return
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory counts from here
        start = _resident_mb("VmRSS")
    except OSError:
        yield lambda: None
        return
    yield lambda: max(_resident_mb("VmHWM") - start, 0.0)


def _give_back() -> None:
    """What the process has freed goes back to the system, where its C library can do that: it would hide a peak."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_mb(what: str) -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return int(line.split()[1]) / 1e3
