"""Candidate launches, and the gates that are checked ahead of time, without a GPU."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.record import NOT_ON_A_GPU, RESULTS, Growing, Row, source
from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.launch import COMMITTED, Key, Launch

# Steps that are tried, queries x keys. A kernel walks along one of them, and holds its accumulators along the other.
STEPS = {
    "forward": ((64, 128), (32, 64, 128)),
    "keys": ((16, 32, 64), (32, 64, 128)),
    "queries": ((32, 64, 128), (16, 32, 64, 128)),
    "gluon": ((64, 128), (32, 64, 128)),
    "one_pass": ((64, 128), (64, 128)),  # dQ's product has a step of queries for its rows: below 64 it is an old one
}
CANDIDATES = ("gluon", "one_pass")  # see sparseflash.kernels.candidates
WARPS, STAGES = (4, 8), (2, 3, 4)
DTYPES = {"half": ("bf16", "bfloat16"), "single": ("fp32", "float32")}  # as Triton and as torch name them
BLOCK = 128  # of the table that candidates are compiled for
# Bytes a thread that rule nobody out: a launch that spills 88 was measured 1.39 times as fast as one that spills none.
# In one pass more: at head dim 128 no launch with 128 keys a step spills less than 272 (Triton 3.6.0: 296), of which
# the loop over FULL entries reads back 13 registers among 449 instructions; steps of 64 keys add twice as much to dQ.
MOST_SPILLED = 96
MOST_SPILLED_ONCE = 320

AnyLaunch = Launch | GluonLaunch
# What a gate says depends on the kernels, not on which launches the table holds today.
GATED_SOURCE = (*NOT_ON_A_GPU, "launch.py", "launches.toml")


def candidates(key: Key, kernel: str) -> list[AnyLaunch]:
    """Launches of a kernel that may be worth a look, those most like the committed one first, which leads."""
    architecture, _, dtype = key
    sizes = list(itertools.product(*STEPS[kernel], WARPS, STAGES))
    if kernel == "gluon":
        if (architecture, dtype) != ("sm_90", "half"):
            return []
        return [
            GluonLaunch(BM, BN, warps, stages, persistent)
            for BM, BN, warps, stages in sizes
            for persistent in (0, 8 // warps)
            if 16 * warps == BM
        ]
    committed: Launch | None = None if kernel in CANDIDATES else getattr(COMMITTED.usual[key], kernel)
    like = committed or COMMITTED.usual[key].keys
    # fp32 is not bound by what descriptors save.
    forms = (False, True) if architecture in ("sm_90", "sm_100") and dtype == "half" else (False,)
    every = [Launch(*size, tma=tma) for size in sizes for tma in forms]
    every.sort(key=lambda launch: sum(a != b for a, b in zip(launch, like, strict=True)))
    return list(dict.fromkeys([*([committed] if committed else []), *every]))


FORMS = ("plain", "tma", "persistent")
NUMBERS = ("BM", "BN", "warps", "stages")  # of every launch


def form_of(launch: AnyLaunch) -> str:
    """What a launch is beside its sizes, of FORMS."""
    if isinstance(launch, GluonLaunch):
        return "persistent" if launch.persistent else "plain"
    return "tma" if launch.tma else "plain"


def asked(key: Key, kernel: str, launch: AnyLaunch) -> dict[str, Any]:
    """What a row of either file is known by: its launch has the fields that are not as usual."""
    architecture, D, dtype = key
    usual = launch._field_defaults
    fields = {name: value for name, value in launch._asdict().items() if usual.get(name) != value}
    return {"architecture": architecture, "head_dim": D, "dtype": dtype, "kernel": kernel, "launch": fields}


def launch_of(row: Mapping[str, Any]) -> AnyLaunch | None:
    """The launch of a row of either file; None for one of a kernel that is no more."""
    kind = GluonLaunch if row["kernel"] == "gluon" else Launch
    return kind(**row["launch"]) if set(row["launch"]) <= set(kind._fields) else None


def is_of(row: Mapping[str, Any], key: Key, kernel: str) -> bool:
    """Whether a row of either file speaks of this kernel."""
    return (row["architecture"], row["head_dim"], row["dtype"], row["kernel"]) == (*key, kernel)


def gate(row: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one candidate ahead of time: what it needs, and whether that rules it out."""
    from sparseflash.kernels.triton import report

    launch, D = launch_of(row), row["head_dim"]
    assert launch is not None
    dtype = DTYPES[row["dtype"]][0]
    case = report.Case(row["architecture"], row["kernel"], D, D, dtype, (BLOCK, BLOCK), launch)
    try:
        compiled = report.compile_case(case)
    except Exception as error:  # Triton refuses some combinations, each in its own way
        return {"fits": False, "why": f"does not compile: {type(error).__name__}: {str(error)[:200]}"}
    used = report.resources(compiled)
    found = {"registers": used.registers, "spilled": used.spilled, "shared": used.shared}
    most = MOST_SPILLED_ONCE if row["kernel"] == "one_pass" else MOST_SPILLED
    if not used.fits(case.architecture, most):
        return {"fits": False, "why": "spills" if used.spilled > most else "too much shared memory", **found}
    if case.architecture == "sm_90" and row["dtype"] == "half":
        waits, products = (compiled.asm["sass"].count(name) for name in ("WARPGROUP.DEPBAR", "HGMMA"))
        found |= {"waits": waits, "products": products}
        if products <= 2 * waits:  # ptxas waits after every product
            return {"fits": False, "why": "serialised", **found}
    return {"fits": True, **found}


def gated(rows: Sequence[dict[str, Any]], results: Growing, workers: int, seconds: float) -> bool:
    """Gate the candidates that no file knows, several at once; whether all are known."""
    begun = time.monotonic()
    todo = [row for row in rows if results.find(row) is None]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for start in range(0, len(todo), 4 * workers):
            if time.monotonic() - begun > seconds:
                print(f"gates: time is up, {len(todo) - start} candidates are missing; the same command goes on")
                return False
            batch = todo[start : start + 4 * workers]
            for row, found in zip(batch, pool.map(gate, batch), strict=True):
                results.add(row, found)
                print(line(row, found), flush=True)
    return True


def line(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """A candidate in words."""
    said = "fits" if found.get("fits") else found.get("why", "")
    return f"{row['architecture']} {row['kernel']} D {row['head_dim']} {row['dtype']}: {spelled(row['launch'])}: {said}"


def known_gates(results: Path = RESULTS) -> list[Row]:
    """All gates that were taken of these kernels, on whatever machine."""
    rows: list[Row] = []
    current = source(GATED_SOURCE)
    for path in sorted(results.glob("*/*-gates.json")):
        rows += [row for row in json.loads(path.read_text())["rows"] if row["source"] == current]
    return rows


def fitting(key: Key, kernel: str, gates: Sequence[Row]) -> list[AnyLaunch]:
    """The candidates to time: the committed one, and those that passed a gate or were never gated."""
    verdicts = {launch_of(row): row["fits"] for row in gates if is_of(row, key, kernel)}
    committed = getattr(COMMITTED.usual[key], kernel, None)
    return [x for x in candidates(key, kernel) if x == committed or verdicts.get(x, True)]


def gain(row: Row) -> float:
    """Geometric mean over masks of the committed launch's time over this one's."""
    return math.exp(statistics.fmean(math.log(row["committed_ms"][name] / ms) for name, ms in row["ms"].items()))


def spelled(launch: Mapping[str, Any]) -> str:
    """The launch of a row on one line: its step, warps and stages, and what is not as usual."""
    rest = [name if value is True else f"{name} {value}" for name, value in launch.items() if name not in NUMBERS]
    numbers = f"{launch['BM']}x{launch['BN']}, {launch['warps']} warps, {launch['stages']} stages"
    return ", ".join([numbers, *rest])
