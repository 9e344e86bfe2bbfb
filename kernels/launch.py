"""How each kernel is launched: step sizes, warps and pipeline stages by architecture, head dim and dtype.

A committed table, `launches.toml`, so that nobody's first call waits for an autotuner. The file says what was measured.

Shape legend: a step is BM queries x BN keys. It divides the table's block, whatever that is: see `Launch.within`.
"""

from __future__ import annotations

import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

Key = tuple[str, int, str]  # architecture, head dim rounded up, "half" (fp16, bf16) or "single" (fp32)
Changes = dict[Key, dict[str, "Launch"]]  # of some kernels' launches


class Launch(NamedTuple):
    """One kernel's launch."""

    BM: int  # queries a step
    BN: int  # keys a step
    warps: int
    stages: int
    tma: bool = False  # what is walked comes by the tensor memory accelerator (sm_90 and later), if it can be read so

    def within(self, block: tuple[int, int]) -> Launch:
        """The same launch with steps no larger than a block of (BQ, BK) tokens."""
        BQ, BK = block
        return self._replace(BM=min(self.BM, BQ), BN=min(self.BN, BK))


class Configuration(NamedTuple):
    """The launches of the kernels."""

    forward: Launch
    keys: Launch  # dK and dV
    queries: Launch  # dQ

    def with_bias(self) -> Configuration:
        """The launches where scores have an additive bias: half the step along the side that is walked, at least 16.

        A program then holds as many numbers more as a step has pairs, and some launches would spill.
        """
        forward, queries = (x._replace(BN=max(16, x.BN // 2)) for x in (self.forward, self.queries))
        return Configuration(forward, self.keys._replace(BM=max(16, self.keys.BM // 2)), queries)


class Launches(NamedTuple):
    """The contents of a launch file; `launches.toml` explains the names."""

    usual: dict[Key, Configuration]
    tma: Changes
    narrow: Changes
    features: Changes
    split: Changes
    spills: dict[Key, dict[str, int]]


def parsed(text: str) -> Launches:
    """The launches of a file.

    Raises:
        ValueError: something that is no launch, or a launch of nothing; the message names it.
    """
    found = Launches({}, {}, {}, {}, {}, {})
    for architecture, dtypes in tomllib.loads(text).items():
        for dtype, head_dims in dtypes.items():
            if architecture not in SHARED_MEMORY or dtype not in ("half", "single"):
                raise ValueError(
                    f"[{architecture}.{dtype}] must name one of {', '.join(SHARED_MEMORY)} and half or single"
                )
            for head_dim, rows in head_dims.items():
                where = f"{architecture}.{dtype}.{head_dim}"
                if head_dim not in ("32", "64", "128", "256"):
                    raise ValueError(f"[{where}] must name head dim 32, 64, 128 or 256")
                key = architecture, int(head_dim), dtype
                for name, row in rows.items():
                    if name not in (*Configuration._fields, *Launches._fields[1:]):
                        raise ValueError(f"[{where}] has {name!r}, which is no kernel and no situation")
                    if name in Launches._fields:
                        of_kernel = _bytes if name == "spills" else _launch
                        made = {kernel: of_kernel(f"{where}.{name}.{kernel}", kernel, x) for kernel, x in row.items()}
                        getattr(found, name)[key] = made
                if missing := [kernel for kernel in Configuration._fields if kernel not in rows]:
                    raise ValueError(f"[{where}] has no launch for {', '.join(missing)}")
                found.usual[key] = Configuration(
                    *(_launch(f"{where}.{kernel}", kernel, rows[kernel]) for kernel in Configuration._fields)
                )
    return found


def _launch(where: str, kernel: str, row: Any) -> Launch:
    _check_kernel(where, kernel)
    if not isinstance(row, dict) or not {"step", "warps", "stages"} <= set(row) <= {"step", "warps", "stages", "tma"}:
        raise ValueError(f"{where} must have step, warps and stages, and may have tma; got {row!r}")
    step, warps, stages, tma = row["step"], row["warps"], row["stages"], row.get("tma", False)
    if not (isinstance(step, list) and len(step) == 2 and all(x in (16, 32, 64, 128, 256) for x in step)):
        raise ValueError(f"{where}.step must be two powers of two from 16 to 256, queries and keys; got {step!r}")
    if warps not in (1, 2, 4, 8, 16) or type(stages) is not int or not 1 <= stages <= 8 or type(tma) is not bool:
        raise ValueError(
            f"{where} must have 1 to 16 warps, a power of two, 1 to 8 stages and a boolean tma; got {row!r}"
        )
    BM, BN = step
    return Launch(BM, BN, warps, stages, tma)


def _bytes(where: str, kernel: str, count: Any) -> int:
    _check_kernel(where, kernel)
    if type(count) is not int or count < 0:
        raise ValueError(f"{where} must be a number of bytes; got {count!r}")
    return count


def _check_kernel(where: str, kernel: str) -> None:
    if kernel not in Configuration._fields:
        raise ValueError(f"{where} must name one of {', '.join(Configuration._fields)}")


# Shared memory that one program may use, in bytes. "sm_80" also serves GPUs with only 99K: 8.6, 8.9, 12.x.
SHARED_MEMORY = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

FILE = Path(__file__).with_name("launches.toml")
COMMITTED = parsed(FILE.read_text("utf-8"))

INTERPRETER = Configuration(Launch(32, 32, 4, 1), Launch(32, 32, 4, 1), Launch(32, 32, 4, 1))


@lru_cache
def family(device: torch.device) -> str:
    """The architecture of the table whose launches suit a device; "interpreter" for one that is no GPU."""
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
    split: bool,
    block: tuple[int, int],
    tma: bool,
    biased: bool = False,
) -> Configuration:
    """The launches for a device, the larger of the two head dims, a dtype and what `committed` takes."""
    key = table_key(device, head_dim, dtype)
    if key[0] == "interpreter":
        return INTERPRETER
    return committed(key, featured=featured, split=split, block=block, tma=tma, biased=biased)


def table_key(device: torch.device, head_dim: int, dtype: torch.dtype) -> Key:
    """What the table has a device, the larger of the two head dims and a dtype under."""
    bucket = max(32, 1 << (head_dim - 1).bit_length())
    return family(device), bucket, "single" if dtype == torch.float32 else "half"


def committed(
    key: Key, *, featured: bool, split: bool, block: tuple[int, int], tma: bool, biased: bool = False
) -> Configuration:
    """The launches of a key for a call; `launches.toml` says what stands in whose place.

    Args:
        key: architecture, head dim, "half" or "single".
        featured: whether a feature is on.
        split: whether some lines are split.
        block: tokens of the table's blocks, queries x keys.
        tma: whether descriptors can read the operands; no launch uses them where they cannot.
        biased: whether one of the features is an additive bias.
    """
    changed: dict[str, Launch] = {}
    if featured:
        changed |= COMMITTED.features.get(key, {})
    else:
        changed |= COMMITTED.tma.get(key, {}) if tma else {}
        BQ, BK = block
        held = {"forward": BQ, "keys": BK, "queries": BQ}
        narrow = {kernel: launch for kernel, launch in COMMITTED.narrow.get(key, {}).items() if held[kernel] <= 64}
        changed |= {kernel: launch._replace(tma=launch.tma and tma) for kernel, launch in narrow.items()}
    changed |= COMMITTED.split.get(key, {}) if split else {}
    chosen = COMMITTED.usual[key]._replace(**changed)
    return chosen.with_bias() if biased else chosen
