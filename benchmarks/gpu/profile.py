"""Bytes that our kernels move between memory and chip, as `ncu` counts them, and where their time goes.

A process of its own runs one forward and one backward pass under the profiler, which slows it down: no time is taken
from it.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.gpu.machine import Machine, gpu
from benchmarks.gpu.settings import COMMON, Setting, random_name
from benchmarks.masks import DENSITIES, GPU_MASKS
from benchmarks.record import ROOT

BYTES = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written"}
# Shares of what each unit could do while a kernel runs, in percent.
SHARES = {
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "tensor",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": "exponentials",
    "sm__issue_active.avg.pct_of_peak_sustained_active": "issue",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "gpu__time_duration.sum": "time",
}
PASS_OF = {"forward_kernel": "fwd", "outputs_kernel": "fwd"}  # every other kernel of ours belongs to the backward pass


def settings() -> Iterator[Setting]:
    """Against density at one length, and against length under one mask."""
    yield from (Setting(random_name(density, 128)) for density in DENSITIES)
    yield from (Setting(COMMON, length) for length in (1 << 12, 1 << 14, 1 << 16))
    yield Setting("full()")


def asked() -> Iterator[dict[str, Any]]:
    """What the rows are known by."""
    yield from ({**setting.asked(), "kind": "traffic"} for setting in settings())


def measure(setting: Setting, seconds: float) -> dict[str, Any]:
    """Bytes and shares of both passes; or why there are none."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"left_out": "ncu is not on the PATH: bytes stay unmeasured"}
    given = {name: value for name, value in setting.asked().items() if name != "kind"}
    for metrics in ({**BYTES, **SHARES}, BYTES):  # names of metrics differ between cards: the bytes' are the oldest
        command = [
            tool, "--clock-control", "none", "--profile-from-start", "off", "--csv", "--print-units", "base",
            "--metrics", ",".join(metrics), sys.executable, "-m", "benchmarks.gpu.profile", json.dumps(given),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=max(seconds, 60))
        except subprocess.TimeoutExpired:
            return {"left_out": f"ncu took more than {max(seconds, 60):.0f} s"}
        if found := read(done.stdout):
            return found
    return {"left_out": f"ncu said: {(done.stdout + done.stderr).strip()[-300:]}"}


def read(text: str) -> dict[str, Any]:
    """Figures of both passes from what `ncu --csv` printed, {} if it holds none.

    The table has a line for each kernel and metric, with the columns "ID", "Kernel Name", "Metric Name" and "Metric
    Value" among others; lines of the profiled program stand before it.
    """
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if begin is None:
        return {}
    kernels: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(lines[begin:]):
        kernel = re.sub(r"\W.*", "", line["Kernel Name"])
        if not kernel.endswith("_kernel"):
            continue
        kernels.setdefault(line["ID"], {"kernel": kernel})[line["Metric Name"]] = float(
            line["Metric Value"].replace(",", "")
        )
    found: dict[str, Any] = {}
    for one in kernels.values():
        which = PASS_OF.get(one["kernel"], "bwd")
        moved = sum(one.get(name, 0.0) for name in BYTES)
        found[f"bytes_{which}"] = found.get(f"bytes_{which}", 0.0) + moved
    _shares(kernels.values(), found)
    return found


def _shares(kernels: Any, found: dict[str, Any]) -> None:
    """Shares by kernel; of one that runs more than once, the longest."""
    longest: dict[str, Mapping[str, Any]] = {}
    for one in kernels:
        time = one.get("gpu__time_duration.sum", 0.0)
        if one["kernel"] not in longest or time > longest[one["kernel"]].get("gpu__time_duration.sum", 0.0):
            longest[one["kernel"]] = one
    for kernel, one in longest.items():
        shares = {short: one[name] for name, short in SHARES.items() if name in one and short != "time"}
        if shares:
            found.setdefault("shares", {})[kernel] = shares


def once(setting: Setting, machine: Machine) -> None:
    """A forward and a backward pass that a profiler watches, after one that it does not."""
    from benchmarks.gpu.contenders import ours
    from benchmarks.gpu.operands import operands

    q, k, v, dout = operands(setting, machine)[0]
    mask = GPU_MASKS[setting.mask].pattern(setting.seq_len).compile(setting.seq_len, block=setting.block)
    attend = ours(mask, machine.device)
    watched = torch.cuda.cudart() if machine.device.type == "cuda" else None
    for warm in (False, True):
        if warm and watched is not None:
            torch.cuda.synchronize()
            watched.cudaProfilerStart()
        torch.autograd.grad(attend(q, k, v)[0], (q, k, v), dout)
    if watched is not None:
        torch.cuda.synchronize()
        watched.cudaProfilerStop()


if __name__ == "__main__":
    once(Setting(**json.loads(sys.argv[1])), gpu())
