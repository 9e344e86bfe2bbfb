"""Candidate launches, and the gates that they pass or not ahead of time: no GPU is needed for either."""

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
from sparseflash.kernels import launch as table
from sparseflash.kernels.launch import Launch

# Steps that are tried, queries x keys. A kernel walks along one of them, and holds its accumulators along the other.
STEPS = {
    "forward": ((64, 128), (32, 64, 128)),
    "keys": ((16, 32, 64), (32, 64, 128)),
    "queries": ((32, 64, 128), (16, 32, 64, 128)),
    "once": ((64, 128), (64, 128)),  # dQ's product has a step of queries for its rows: below 64 it is an old one
}
WARPS, STAGES = (4, 8), (2, 3, 4)
DTYPES = {"half": ("bf16", "bfloat16"), "single": ("fp32", "float32")}  # as Triton and as torch name them
BLOCK = 128  # of the table that candidates are compiled for
# Bytes a thread that rule nobody out: a launch that spills 88 was measured 1.39 times as fast as one that spills none.
# In one pass more: at head dim 128 no launch with 128 keys a step spills less than 272 (Triton 3.6.0: 296), of which
# the loop over FULL entries reads back 13 registers among 449 instructions; steps of 64 keys add twice as much to dQ.
MOST_SPILLED = 96
MOST_SPILLED_ONCE = 320

TableKey = tuple[str, int, str]  # architecture, head dim, "half" or "single"
# What a gate says depends on the kernels, not on which launches the table holds today.
GATED_SOURCE = (*NOT_ON_A_GPU, "launch.py")


def committed_launch(key: TableKey, kernel: str) -> Launch | None:
    """What the table has for a kernel where nothing else is said; None for a backward in one pass if none is taken."""
    launch: Launch | None = getattr(table.TABLE[key]._replace(once=table.ONCE.get(key)), kernel)
    return launch


def candidates(key: TableKey, kernel: str) -> list[Launch]:
    """Launches of a kernel that may be worth a look, those most like the committed one first, which leads."""
    committed = committed_launch(key, kernel)
    like = committed or table.TABLE[key].keys
    every = [
        like._replace(BM=BM, BN=BN, warps=warps, stages=stages, **form)
        for BM, BN, warps, stages in itertools.product(*STEPS[kernel], WARPS, STAGES)
        for form in _forms(key, kernel)
        if not form["gluon"] or (16 * warps == BM and form["persistent"] in (0, 8 // warps))
    ]
    every.sort(key=lambda launch: sum(a != b for a, b in zip(launch, like, strict=True)))
    return list(dict.fromkeys([*([committed] if committed else []), *every]))


def _forms(key: TableKey, kernel: str) -> list[dict[str, Any]]:
    """What a launch decides beside sizes."""
    architecture, _, dtype = key
    plain = {"ahead": False, "tma": False, "gluon": False, "persistent": 0}
    # The forward pass does without descriptors where products are ahead; fp32 is not bound by what they save.
    ahead = [plain | {"ahead": True}] if kernel == "forward" else []
    tma = [plain | {"tma": True}] if architecture in ("sm_90", "sm_100") and dtype == "half" else []
    gluon = [plain | {"tma": True, "gluon": True, "persistent": programs} for programs in (0, 1, 2)]
    if architecture != "sm_90" or dtype != "half" or kernel != "forward":
        gluon = []
    return [plain, *ahead, *tma, *gluon]


FORMS = ("plain", "ahead", "tma", "gluon", "persistent")


def form_of(launch: Launch) -> str:
    """What a launch is beside its sizes, of FORMS."""
    return next((name for name in reversed(FORMS[1:]) if getattr(launch, name)), "plain")


def asked(key: TableKey, kernel: str, launch: Launch) -> dict[str, Any]:
    """What a row of either file is known by."""
    architecture, D, dtype = key
    return {"architecture": architecture, "head_dim": D, "dtype": dtype, "kernel": kernel, "launch": list(launch)}


def is_of(row: Mapping[str, Any], key: TableKey, kernel: str) -> bool:
    """Whether a row of either file speaks of this kernel."""
    return (row["architecture"], row["head_dim"], row["dtype"], row["kernel"]) == (*key, kernel)


def gate(row: Mapping[str, Any]) -> dict[str, Any]:
    """Compile one candidate ahead of time: what it needs, and whether that rules it out."""
    from sparseflash.kernels import triton_report as report

    launch, D = Launch(*row["launch"]), row["head_dim"]
    dtype = DTYPES[row["dtype"]][0]
    case = report.Case(row["architecture"], row["kernel"], D, D, dtype, (BLOCK, BLOCK), launch)
    try:
        compiled = report.compile_case(case)
    except Exception as error:  # Triton refuses some combinations, each in its own way
        return {"fits": False, "why": f"does not compile: {type(error).__name__}: {str(error)[:200]}"}
    used = report.resources(compiled)
    found = {"registers": used.registers, "spilled": used.spilled, "shared": used.shared}
    most = MOST_SPILLED_ONCE if row["kernel"] == "once" else MOST_SPILLED
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
    launch = ", ".join(f"{k} {v}" for k, v in Launch(*row["launch"])._asdict().items())
    said = "fits" if found.get("fits") else found.get("why", "")
    return f"{row['architecture']} {row['kernel']} D {row['head_dim']} {row['dtype']}: {launch}: {said}"


def known_gates(results: Path = RESULTS) -> list[Row]:
    """All gates that were taken of these kernels, on whatever machine."""
    rows: list[Row] = []
    current = source(GATED_SOURCE)
    for path in sorted(results.glob("*/*-gates.json")):
        rows += [row for row in json.loads(path.read_text())["rows"] if row["source"] == current]
    return rows


def fitting(key: TableKey, kernel: str, gates: Sequence[Row]) -> list[Launch]:
    """The candidates to time: the committed one, and those that passed a gate or were never gated."""
    verdicts = {tuple(row["launch"]): row["fits"] for row in gates if is_of(row, key, kernel)}
    committed = committed_launch(key, kernel)
    return [x for x in candidates(key, kernel) if x == committed or verdicts.get(tuple(x), True)]


def gain(row: Row) -> float:
    """Geometric mean over masks of the committed launch's time over this one's."""
    return math.exp(statistics.fmean(math.log(row["committed_ms"][name] / ms) for name, ms in row["ms"].items()))


def spelled(launch: Launch) -> str:
    """A launch as the table writes it."""
    sizes = [str(value) for name, value in launch._asdict().items() if name not in Launch._field_defaults]
    defaults = Launch._field_defaults
    flags = [f"{name}={value}" for name, value in launch._asdict().items() if defaults.get(name, value) != value]
    return f"Launch({', '.join([*sizes, *flags])})"
