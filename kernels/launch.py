"""How each kernel is launched: step sizes, warps and pipeline stages by architecture, head dim and dtype.

A committed table, so that nobody's first call waits for an autotuner. For sm_90 in bf16, with blocks of 128 and 64 and
no feature on, launches were measured beside each other on an H200, but for dK/dV and dQ at head dim 256:
benchmarks/results/nvidia-h200/2026-11-27-tune.json. All others were chosen from what ahead-of-time compilation shows
(no spills, shared memory fits, prefetch depth; see `triton_report`), and their speed is unmeasured.

Shape legend: a step is BM queries x BN keys. It divides the table's block, whatever that is: see `Launch.within`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """One kernel's launch."""

    BM: int  # queries a step
    BN: int  # keys a step
    warps: int
    stages: int
    ahead: bool = False  # forward only: products of the next step's keys are issued before the softmax of this one
    tma: bool = False  # what is walked comes by the tensor memory accelerator (sm_90 and later), if it can be read so
    gluon: bool = False  # forward on sm_90 only, with tma: the kernel of gluon_forward where that suits the call
    persistent: int = 0  # with gluon: so many programs a multiprocessor take all lines in turn; 0: a program each

    def within(self, block: tuple[int, int]) -> Launch:
        """The same launch with steps no larger than a block of (BQ, BK) tokens."""
        BQ, BK = block
        return self._replace(BM=min(self.BM, BQ), BN=min(self.BN, BK))


class Configuration(NamedTuple):
    """The launches of the kernels."""

    forward: Launch
    keys: Launch  # dK and dV
    queries: Launch  # dQ
    once: Launch | None = None  # dK, dV and dQ in one pass: see ONCE; None: in two


# (architecture, head dim, dtype): head dim is rounded up; "half" is fp16 and bf16, "single" is fp32.
TABLE: dict[tuple[str, int, str], Configuration] = {
    ("sm_80", 32, "half"): Configuration(Launch(64, 64, 4, 3), Launch(32, 64, 4, 3), Launch(64, 64, 4, 3)),
    ("sm_80", 64, "half"): Configuration(Launch(64, 64, 4, 3), Launch(32, 64, 4, 3), Launch(64, 64, 4, 3)),
    ("sm_80", 128, "half"): Configuration(Launch(64, 64, 4, 2), Launch(32, 128, 8, 2), Launch(64, 64, 8, 2)),
    ("sm_80", 256, "half"): Configuration(Launch(64, 32, 8, 2), Launch(16, 64, 8, 2), Launch(32, 32, 4, 2)),
    ("sm_90", 32, "half"): Configuration(Launch(64, 128, 4, 3), Launch(128, 64, 4, 3), Launch(64, 128, 4, 3)),
    ("sm_90", 64, "half"): Configuration(Launch(128, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 128, 4, 3)),
    ("sm_90", 128, "half"): Configuration(Launch(128, 64, 8, 3), Launch(32, 128, 8, 3), Launch(128, 64, 8, 3)),
    ("sm_90", 256, "half"): Configuration(Launch(128, 32, 8, 3), Launch(16, 64, 8, 2), Launch(128, 32, 8, 2)),
    ("sm_100", 32, "half"): Configuration(Launch(64, 128, 4, 3), Launch(64, 128, 8, 3), Launch(64, 128, 4, 3)),
    ("sm_100", 64, "half"): Configuration(Launch(128, 128, 8, 3), Launch(64, 64, 4, 3), Launch(128, 64, 8, 3)),
    ("sm_100", 128, "half"): Configuration(Launch(128, 64, 8, 3), Launch(32, 32, 8, 2), Launch(128, 64, 8, 3)),
    ("sm_100", 256, "half"): Configuration(Launch(128, 32, 8, 3), Launch(16, 32, 8, 2), Launch(64, 32, 8, 2)),
    ("gfx942", 32, "half"): Configuration(Launch(128, 64, 4, 2), Launch(32, 64, 4, 2), Launch(64, 64, 4, 2)),
    ("gfx942", 64, "half"): Configuration(Launch(128, 64, 4, 2), Launch(32, 64, 4, 1), Launch(64, 32, 4, 1)),
    ("gfx942", 128, "half"): Configuration(Launch(64, 64, 4, 1), Launch(32, 32, 4, 1), Launch(64, 64, 4, 1)),
    ("gfx942", 256, "half"): Configuration(Launch(64, 32, 4, 1), Launch(16, 64, 8, 1), Launch(32, 32, 4, 1)),
}
# fp32 products are exact ("ieee"), hence fused multiply-adds outside the matrix units on NVIDIA: small steps.
for _architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
    TABLE |= {
        (_architecture, 32, "single"): Configuration(Launch(32, 32, 4, 2), Launch(32, 32, 4, 2), Launch(32, 32, 4, 2)),
        (_architecture, 64, "single"): Configuration(Launch(16, 32, 4, 1), Launch(16, 32, 4, 1), Launch(32, 32, 4, 2)),
        (_architecture, 128, "single"): Configuration(Launch(16, 16, 4, 1), Launch(32, 32, 8, 1), Launch(16, 16, 4, 1)),
        (_architecture, 256, "single"): Configuration(Launch(16, 16, 4, 1), Launch(16, 32, 8, 1), Launch(16, 16, 4, 1)),
    }
TABLE |= {
    ("sm_80", 256, "single"): Configuration(Launch(16, 16, 16, 1), Launch(16, 32, 8, 1), Launch(16, 16, 16, 1)),
    ("gfx942", 128, "single"): Configuration(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 32, 4, 1)),
    ("gfx942", 256, "single"): Configuration(Launch(16, 16, 4, 1), Launch(16, 16, 4, 1), Launch(16, 16, 4, 1)),
}

# Where descriptors can read what a kernel walks, and no feature is on: fewer registers for addresses leave room for
# larger steps, and warps wait for their data alone.
TMA: dict[tuple[str, int, str], dict[str, Launch]] = {
    ("sm_90", 64, "half"): {"keys": Launch(64, 64, 4, 3, tma=True), "queries": Launch(64, 128, 4, 3, tma=True)},
    ("sm_90", 128, "half"): {
        "forward": Launch(128, 128, 8, 3, tma=True),
        "keys": Launch(64, 64, 4, 2, tma=True),
        "queries": Launch(128, 64, 8, 3, tma=True),
    },
    ("sm_90", 256, "half"): {"forward": Launch(128, 64, 8, 2, tma=True)},
}

# For blocks of 64 tokens or fewer along the side that a program holds, with no feature on. Measured with blocks of 64:
# at head dim 128 four warps were up to 2.4 times as fast as eight; at 64 descriptors pay where 128 tokens do without.
NARROW: dict[tuple[str, int, str], dict[str, Launch]] = {
    ("sm_90", 32, "half"): {"keys": Launch(64, 64, 4, 3)},
    ("sm_90", 64, "half"): {"forward": Launch(64, 64, 4, 3, tma=True)},
    ("sm_90", 128, "half"): {
        "forward": Launch(64, 64, 4, 3, tma=True),
        "queries": Launch(64, 64, 4, 2, tma=True),
    },
}

# With a softcap, a bias or dropout a program holds more at once, and these launches would spill, with Triton 3.6.0 or
# 3.7.1. The rule that found their replacements: half the step along the side that is walked (keys for `forward` and
# `queries`, queries for `keys`); where that spills, more warps; then half the step along the other side. Launches that
# fit with all features on stay as they are. For `forward` in fp32 at head dim 256 on sm_100 nothing fits with 3.6.0.
FEATURED: dict[tuple[str, int, str], dict[str, Launch]] = {
    ("sm_80", 64, "half"): {
        "forward": Launch(64, 32, 4, 3),
        "keys": Launch(32, 64, 8, 3),
        "queries": Launch(64, 32, 4, 3),
    },
    ("sm_80", 128, "half"): {"keys": Launch(16, 128, 8, 2)},
    ("sm_80", 256, "half"): {"keys": Launch(16, 32, 8, 2)},
    ("sm_80", 32, "single"): {"forward": Launch(32, 16, 4, 2), "keys": Launch(16, 32, 4, 2)},
    ("sm_80", 64, "single"): {
        "forward": Launch(16, 32, 8, 1),
        "keys": Launch(16, 32, 8, 1),
        "queries": Launch(32, 16, 4, 2),
    },
    ("sm_80", 128, "single"): {"keys": Launch(16, 32, 8, 1)},
    ("sm_90", 32, "half"): {"keys": Launch(32, 128, 8, 3)},
    ("sm_90", 64, "half"): {
        "forward": Launch(128, 64, 8, 3),
        "keys": Launch(32, 128, 8, 3),
        "queries": Launch(128, 64, 8, 3),
    },
    ("sm_90", 128, "half"): {"keys": Launch(16, 128, 8, 3)},
    ("sm_90", 256, "half"): {"keys": Launch(16, 32, 8, 2)},
    ("sm_90", 64, "single"): {"forward": Launch(16, 32, 8, 1), "keys": Launch(16, 32, 8, 1)},
    ("sm_100", 32, "half"): {
        "forward": Launch(64, 64, 4, 3),
        "keys": Launch(32, 128, 8, 3),
        "queries": Launch(64, 64, 4, 3),
    },
    ("sm_100", 64, "half"): {"forward": Launch(128, 64, 8, 3), "keys": Launch(16, 64, 4, 3)},
    ("sm_100", 128, "half"): {"queries": Launch(128, 32, 8, 3)},
    ("sm_100", 256, "half"): {"queries": Launch(32, 32, 8, 2)},
    ("gfx942", 32, "half"): {
        "forward": Launch(128, 32, 4, 2),
        "keys": Launch(16, 64, 4, 2),
        "queries": Launch(64, 32, 4, 2),
    },
    ("gfx942", 64, "half"): {"forward": Launch(128, 32, 4, 2), "keys": Launch(16, 64, 4, 1)},
    ("gfx942", 128, "half"): {"keys": Launch(16, 32, 4, 1), "queries": Launch(64, 32, 4, 1)},
    ("gfx942", 256, "half"): {"keys": Launch(16, 32, 8, 1)},
    ("gfx942", 32, "single"): {"keys": Launch(16, 32, 4, 2), "queries": Launch(32, 16, 4, 2)},
    ("gfx942", 64, "single"): {"queries": Launch(32, 16, 4, 2)},
}

# For tables some of whose lines come in pieces: a program holds a little more than with whole lines, and these launches
# of TABLE or FEATURED would spill. Each of these fits with all features on and with none, with Triton 3.7.1. For `keys`
# in fp32 at head dim 256 on gfx942 with all features nothing smaller is left: 3 scalar registers spill.
PIECES: dict[tuple[str, int, str], dict[str, Launch]] = {
    ("sm_80", 128, "half"): {"keys": Launch(32, 64, 8, 2)},
    ("sm_80", 256, "half"): {"keys": Launch(16, 32, 8, 2)},
    ("sm_80", 128, "single"): {"keys": Launch(16, 32, 8, 1)},
    ("sm_80", 64, "single"): {"keys": Launch(16, 16, 8, 1)},
    ("sm_90", 64, "single"): {"forward": Launch(16, 16, 4, 1)},
    ("sm_100", 256, "half"): {"queries": Launch(64, 16, 8, 2)},
    ("sm_100", 64, "single"): {"forward": Launch(16, 32, 8, 1), "queries": Launch(32, 16, 4, 2)},
    ("gfx942", 32, "half"): {"keys": Launch(16, 64, 4, 1), "queries": Launch(64, 32, 4, 2)},
    ("gfx942", 128, "half"): {"queries": Launch(64, 32, 4, 1)},
}

# A backward of one pass instead of two, where a row stands here: of calls without features through whole lines, read by
# descriptors if the launch asks for them. It needs five products instead of seven, but adds dQ up in whatever order
# programs come, so that a rerun gives other bits; calls that ask for a deterministic gradient take two passes. Empty
# until a measurement fills it: `python -m benchmarks.tune measure --kernel once`, on a GPU.
ONCE: dict[tuple[str, int, str], Launch] = {}

# Bytes a thread that the launches of a kernel may spill with no feature on, by Triton 3.6.0 or 3.7.1: a few registers,
# which were measured to cost less than the larger step brings (of whole lines; cut ones were not timed apart).
SPILLS: dict[tuple[str, int, str], dict[str, int]] = {
    ("sm_90", 32, "half"): {"keys": 80},
    ("sm_90", 64, "half"): {"keys": 24},
    ("sm_90", 128, "half"): {"forward": 16, "keys": 96},
    ("sm_90", 256, "half"): {"forward": 96},
}

INTERPRETER = Configuration(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))

# Shared memory that one program may use, in bytes. "sm_80" also serves GPUs with only 99K: 8.6, 8.9, 12.x.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}


@lru_cache
def family(device: torch.device) -> str:
    """The architecture of TABLE whose launches suit a device; "interpreter" for one that is no GPU."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def configuration(
    device: torch.device,
    head_dim: int,
    dtype: torch.dtype,
    *,
    featured: bool,
    cut: bool,
    block: tuple[int, int],
    tma: bool,
) -> Configuration:
    """The launches for a device, the larger of the two head dims, a dtype and what `committed` takes."""
    architecture = family(device)
    if architecture == "interpreter":
        return INTERPRETER
    bucket = max(32, 1 << (head_dim - 1).bit_length())
    key = architecture, bucket, "single" if dtype == torch.float32 else "half"
    return committed(key, featured=featured, cut=cut, block=block, tma=tma)


def committed(
    key: tuple[str, int, str], *, featured: bool, cut: bool, block: tuple[int, int], tma: bool
) -> Configuration:
    """A row of TABLE with what the other tables put in its place.

    Args:
        key: architecture, head dim, "half" or "single".
        featured: see FEATURED.
        cut: see PIECES.
        block: tokens of the table's blocks, queries x keys.
        tma: whether descriptors can read the operands; no launch uses them where they cannot.
    """
    changed: dict[str, Launch] = {}
    once = ONCE.get(key)
    if featured:
        changed |= FEATURED.get(key, {})
    else:
        changed |= TMA.get(key, {}) if tma else {}
        BQ, BK = block
        held = {"forward": BQ, "keys": BK, "queries": BQ}
        narrow = {kernel: launch for kernel, launch in NARROW.get(key, {}).items() if held[kernel] <= 64}
        changed |= {
            kernel: launch._replace(tma=launch.tma and tma, gluon=launch.gluon and tma)
            for kernel, launch in narrow.items()
        }
        if once is not None and (tma or not once.tma) and not cut:
            changed["once"] = once
    changed |= PIECES.get(key, {}) if cut else {}
    return TABLE[key]._replace(**changed)
