"""Compile committed launches ahead of time, for GPUs that need not be here.

Gates: no spills but those that a measurement allows (with an older Triton some registers), shared memory fits, and on
sm_90 no loop whose products wait for each other.

fp16 is compiled where bf16 is: it differs only in the type of its matrix instructions and conversions, so bf16 stands
for both here. Every launch that launches.toml names is compiled, at block 128. All of them at all block sizes,
with or without features: `python -m sparseflash.kernels.triton.report`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import pytest
import torch
import triton

import sparseflash as sf
from sparseflash import patterns
from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.candidates.one_pass import one_pass_kernel
from sparseflash.kernels.launch import COMMITTED, Launch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; not for the interpreter", allow_module_level=True)

from benchmarks.gpu.gates import MOST_SPILLED, MOST_SPILLED_ONCE
from docs import make_kernels as page
from sparseflash.kernels.triton import report
from sparseflash.kernels.triton.backward import prepare_kernel
from sparseflash.kernels.triton.backward_bias import bias_kernel
from sparseflash.kernels.triton.common import list_pointers
from sparseflash.kernels.triton.merge import outputs_kernel, sums_kernel
from tests.versions import SUPPORTED

pytestmark = pytest.mark.tier2

TABLE, TMA, NARROW, FEATURED, SPLIT = COMMITTED[:5]
ALL = tuple(report.FEATURES)
# Bytes a thread that any launch may spill with another Triton than the one that the tables were chosen with.
ELSEWHERE = 0 if triton.__version__ == SUPPORTED[-1].triton else 96


def fits(case: report.Case, need: report.Resources) -> bool:
    """Whether a launch is as the tables say, or with another Triton nearly so."""
    return report.fits(case, need) or need.fits(case.architecture, ELSEWHERE)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("architecture", report.TARGETS)
def test_committed_launches_fit(architecture: str, dtype: str) -> None:
    committed = [case for case in report.cases((architecture,)) if case.dtype == dtype]
    assert len(committed) == 3 * 4, "three kernels, four head dims"
    check(committed)


@pytest.mark.parametrize(
    "odd",
    [
        report.Case(
            "sm_90", "forward", 96, 72, "bf16", (64, 32), NARROW["sm_90", 128, "half"]["forward"]._replace(tma=False)
        ),
        report.Case("sm_90", "keys", 32, 32, "bf16", (128, 32), NARROW["sm_90", 32, "half"]["keys"]),
        report.Case("sm_90", "keys", 40, 64, "fp16", (16, 256), TABLE["sm_90", 64, "half"].keys),
        report.Case("sm_90", "queries", 16, 16, "bf16", (16, 16), TABLE["sm_90", 32, "half"].queries),
        report.Case("sm_90", "forward", 80, 160, "bf16", (128, 64), TABLE["sm_90", 256, "half"].forward, ALL),
        report.Case("sm_90", "keys", 192, 24, "bf16", (64, 64), FEATURED["sm_90", 256, "half"]["keys"], ALL),
    ],
    ids=lambda c: f"{c.kernel} D {c.D} DV {c.DV} block {c.block}",
)
def test_odd_head_dims_and_small_blocks_fit(odd: report.Case) -> None:
    need = report.resources(report.compile_case(odd))
    assert fits(odd, need), report.line(odd, need)


def replaced(case: report.Case, by: dict[tuple[str, int, str], dict[str, Launch]]) -> bool:
    """Whether a table names a launch of its own for the case."""
    return case.kernel in by.get((case.architecture, case.D, "single" if case.dtype == "fp32" else "half"), {})


def check(cases: Iterable[report.Case]) -> None:
    used = {case: report.resources(report.compile_case(case)) for case in cases}
    assert used
    table = "\n".join(report.line(case, need) for case, need in used.items())
    print(table)
    assert all(fits(case, need) for case, need in used.items()), table


@pytest.mark.parametrize("architecture", report.TARGETS)
def test_launches_fit_with_every_feature_on(architecture: str) -> None:
    """All that the file names for features, and head dims 64 and 128 in half precision."""
    usual = [c for c in report.cases((architecture,), features=ALL) if c.dtype == "bf16" and c.D in (64, 128)]
    assert len(usual) == 2 * 3
    check({*usual, *(c for c in report.cases((architecture,), features=ALL) if replaced(c, FEATURED))})


@pytest.mark.parametrize("feature", report.FEATURES)
def test_launches_fit_with_one_feature_on(feature: str) -> None:
    for case in report.cases(("sm_90",), features=(feature,), tma=True):
        if case.D in (64, 128) and case.dtype == "bf16":
            need = report.resources(report.compile_case(case))
            assert fits(case, need), report.line(case, need)


@pytest.mark.parametrize("form", report.BIASES)
def test_launches_fit_with_a_bias(form: str) -> None:
    for case in report.cases(("sm_90",), features=(form,), tma=True):
        if case.D in (64, 128) and case.dtype == "bf16":
            compiled = [report.compile_case(case)]
            if case.kernel == "keys":
                compiled.append(report.compile_bias(case))
            for need in map(report.resources, compiled):
                assert need.fits("sm_90", MOST_SPILLED), report.line(case, need)


@pytest.mark.parametrize("split", [False, True], ids=["whole lines", "splits"])
def test_launches_for_descriptors_and_for_narrow_blocks_fit(split: bool) -> None:
    found = [
        case
        for tma in (True, False)
        for case in report.cases(("sm_90",), blocks=(128, 64, 32), split=split, tma=tma)
        if case.dtype == "bf16" and (replaced(case, TMA) or (replaced(case, NARROW) and case.block[0] <= 64))
    ]
    check(dict.fromkeys(found))


@pytest.mark.parametrize("architecture", report.TARGETS)
def test_launches_for_split_lines_fit(architecture: str) -> None:
    """All that the file names for them with every feature on; on sm_90 plain ones at head dims 64 and 128 too."""
    plain = [c for c in report.cases((architecture,), split=True) if c.dtype == "bf16" and c.D in (64, 128)]
    named = [c for c in report.cases((architecture,), features=ALL, split=True) if replaced(c, SPLIT)]
    check([*named, *(plain if architecture == "sm_90" else [])])


@pytest.mark.parametrize("architecture", report.TARGETS)
def test_the_kernels_that_reduce_splits_fit(architecture: str) -> None:
    for D in (72, 256):
        launch = TABLE[architecture, 256, "half"].forward
        case = report.Case(architecture, "forward", D, D, "bf16", (128, 128), launch, ("sinks",), split=True)
        for merging in report.compile_merges(case):
            assert report.resources(merging).fits(architecture, ELSEWHERE), report.resources(merging)


def test_the_small_kernel_before_the_backward_fits() -> None:
    case = next(report.cases(("sm_90",)))
    assert report.resources(report.compile_prepare(case)).fits("sm_90", ELSEWHERE)


@pytest.mark.parametrize("split", [False, True], ids=["whole lines", "splits"])
@pytest.mark.parametrize("kernel", report.KERNELS)
def test_loads_stay_in_flight(kernel: str, split: bool) -> None:
    cases = report.cases(("sm_90",), split=split)
    case = next(c for c in cases if c.kernel == kernel and c.D == 64 and c.dtype == "bf16")
    compiled = report.compile_case(case)
    waits = []
    depth = 0
    for line in compiled.asm["ttgir"].splitlines():
        depth += "scf.for" in line
        depth -= "scf.yield" in line
        if depth and (found := re.search(r"async_wait .*num = (\d+)", line)):
            waits.append(int(found[1]))
    # An outer loop may drain at its end; each of the two inner loops must not.
    assert sum(wait > 0 for wait in waits) >= 2, f"prefetch drains: {waits}"


def is_row(shown: str, row: str) -> bool:
    """Whether a row of the page says the same, but for 2 % of a count: ptxas gives other code in some runs."""
    said, found = ([int(number) for number in re.findall(r"\d+", text)] for text in (row, shown))
    if re.sub(r"\d+", "#", row) != re.sub(r"\d+", "#", shown):
        return False
    return all(abs(a - b) <= 0.02 * max(a, b) for a, b in zip(said, found, strict=True))


@pytest.mark.parametrize("form", page.FORMS)
@pytest.mark.parametrize("kernel", report.KERNELS)
def test_products_are_not_serialised_and_the_page_says_what_is_compiled(kernel: str, form: str) -> None:
    rows = page.PAGE.read_text().split(f"## {form}\n")[1].split("\n## ")[0].splitlines()
    cases = [case for case in page.cases(form) if case.kernel == kernel]
    assert len(cases) == len([row for row in rows if row.startswith(f"| {kernel} |")]) == 4, "four head dims"
    stale = []
    for case in cases:
        used, found = page.measured(case)
        shown = page.row(case, used, found)
        assert fits(case, used), shown
        at = case.at
        rows_of_products = at.BN if kernel == "keys" else at.BM
        assert len(found) == (2 if rows_of_products >= 64 else 0), f"products are not where they should be: {shown}"
        assert not any(loop.serialised for loop in found), f"ptxas serialised the products: {shown}"
        stale += [] if any(is_row(shown, row) for row in rows) else [shown]
    if page.COMPILER not in page.PAGE.read_text():
        pytest.skip(f"docs/kernels.md was written with another version than {page.COMPILER}, and not compared")
    assert not stale, "run python -m docs.make_kernels:\n" + "\n".join(stale)


def test_candidates_fit_and_the_page_says_what_is_compiled() -> None:
    rows = page.PAGE.read_text().split(f"## {page.WAITING}\n")[1].splitlines()
    shown = []
    for case in page.cases(page.WAITING):
        used, found = page.measured(case)
        shown.append(page.row(case, used, found))
        assert used.fits("sm_90", MOST_SPILLED_ONCE if case.kernel == "one_pass" else MOST_SPILLED), shown[-1]
        assert len(found) == 2
        assert not any(loop.serialised for loop in found), f"ptxas serialised the products: {shown[-1]}"
        if isinstance(case.launch, GluonLaunch):
            assert all(loop.overlapped > 0.7 * loop.exponentials for loop in found), f"nothing overlaps: {shown[-1]}"
    if page.COMPILER not in page.PAGE.read_text():
        pytest.skip(f"docs/kernels.md was written with another version than {page.COMPILER}, and not compared")
    assert shown == [row for row in rows if row.startswith(("| gluon |", "| one_pass |"))], (
        "run python -m docs.make_kernels"
    )


def test_sums_of_one_pass_are_reduced_by_the_memory_accelerator_or_in_fp32() -> None:
    for tma, instruction in ((True, "UTMAREDG"), (False, "REDG.E.ADD.F32x4")):
        launch = Launch(64, 64, 4, 3, tma=tma)
        compiled = report.compile_case(report.Case("sm_90", "one_pass", 64, 64, "bf16", (128, 128), launch))
        assert compiled.asm["sass"].count(instruction) >= 2, "one in each loop"


@pytest.mark.parametrize(
    "kernel",
    [*report.KERNELS.values(), bias_kernel, one_pass_kernel, prepare_kernel, outputs_kernel, sums_kernel],
    ids=lambda k: k.__name__,
)
def test_no_run_time_argument_is_specialised_by_value(kernel: object) -> None:
    for parameter in kernel.params:  # type: ignore[attr-defined]
        # Of a descriptor the type alone counts: dtype and tile. Groups hold pointers, see below.
        pointers = parameter.name.endswith(("_ptr", "_tiles")) or parameter.name in report.GROUPS
        if not parameter.is_constexpr and not pointers:
            assert parameter.do_not_specialize, f"{parameter.name} would compile a kernel per value"


def test_groups_of_a_launch_hold_pointers_alone() -> None:
    """Inside a NamedTuple Triton specialises every number by its value."""
    for pattern in (patterns.causal(), patterns.global_tokens(1)):
        table = sf.lookup(pattern.compile(4096, block=32))
        for side in (table.rows, table.columns):
            lists = list_pointers(side)
            assert (lists.work_items is None) == (side.slots == 0)
            assert all(isinstance(x, torch.Tensor) and x.dtype == torch.int32 for x in lists if x is not None)
