"""Write docs/kernels.md, what the machine code of every committed sm_90 launch in half precision shows.

python -m docs.make_kernels          # compile them all, which needs no GPU and a minute or two, and rewrite the page
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import triton

from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.launch import Launch
from sparseflash.kernels.triton import report
from sparseflash.kernels.triton.sass import Loop

PAGE = Path(__file__).parent / "kernels.md"
COMPILER = f"Triton {triton.__version__}"
FORMS: dict[str, dict[str, Any]] = {
    "Operands that descriptors can read": {"tma": True},
    "Other operands": {},
    "Blocks of 64": {"tma": True, "blocks": (64,)},
    "Split lines": {"split": True, "tma": True},
    "Every feature on": {"features": tuple(report.FEATURES)},
}
WAITING = "Candidates that no GPU has run"
WAITING_HEAD = """None of these is committed; the launch tuner measures them (`python -m benchmarks.tune`).

*gluon*: the forward pass whose schedule is written by hand (`kernels/candidates/gluon_forward.py`): the next step's
scores are under way while exponentials are taken; *persistent*: as many programs as fit take all lines in turn, and
fetch the first rows of the next line while they write one's results. *one_pass*: dK, dV and dQ in one kernel, five
products instead of seven (`kernels/candidates/one_pass.py`). *Issue* and *matrix* are of all three gradients there,
and stand beside the sum of `keys` and `queries` above; every step also adds 4 D bytes for each of its queries to dQ,
which the L2 cache has to take: the more keys a step has, the fewer.
"""
HEAD = f"""# What ahead-of-time compilation shows of the kernels

Committed launches for sm_90 in half precision (bf16, blocks of 128 x 128 unless a heading says 64), compiled without
a GPU by {COMPILER}. The figures are read from the machine code. They say what a program needs and does, not how fast
it is; timings of launches on an H200 are in `benchmarks/ledger.md`. `python -m docs.make_kernels` writes this page,
the tests compare each row with what they compile, and `python -m sparseflash.kernels.triton.report` prints the same
for other architectures and block sizes.

- *step*: queries x keys of one iteration; *tma* if the tensor memory accelerator reads the operands of the loop.
- *regs* per thread and the bytes that it *spilled* (a few launches were measured to be faster with a few registers
  spilled than without), *shared* memory per program, and how many *programs* fit on a multiprocessor.
- In pairs, for the loop over FULL entries / the loop over PARTIAL ones: *instructions* that a thread issues in an
  iteration; the *products* (HGMMA) among them and the *waits* for groups of products (a wait for every product would
  mean a serialised loop; there is none); *exponentials*, and how many of them run while a product is in flight.
- *issue*: cycles that the four schedulers of a multiprocessor need to issue the instructions of 64 x 64 scores.
  *matrix*: cycles that its tensor cores need for them at 4,096 operations a cycle (989 TFLOP/s, 132 multiprocessors
  at 1.83 GHz: the H100 datasheet). Where *issue* is larger, instructions are the limit.

A loop without products (-) uses the older `mma.sync`: its step is too small for a warpgroup.
"""
COLUMNS = (
    *("kernel", "D", "step", "warps", "stages", "regs", "spilled", "shared", "programs"),
    *("instructions", "products", "waits", "exponentials overlapped", "issue", "matrix"),
)
PRODUCTS = {"forward": 2, "keys": 4, "queries": 3, "gluon": 2, "one_pass": 5}
CANDIDATES: list[tuple[str, int, Launch | GluonLaunch]] = [
    *(("gluon", 64, GluonLaunch(64, 128, 4, 2, programs)) for programs in (0, 2)),
    *(("gluon", 128, GluonLaunch(128, 128, 8, 2, programs)) for programs in (0, 1)),
    *(("gluon", 128, GluonLaunch(64, 64, 4, 2, programs)) for programs in (0, 2)),
    ("one_pass", 32, Launch(64, 128, 8, 3, tma=True)),
    *(("one_pass", 64, Launch(64, 64, 4, 3, tma=True)), ("one_pass", 64, Launch(64, 128, 8, 2, tma=True))),
    *(("one_pass", 128, Launch(64, 64, 8, 2, tma=True)), ("one_pass", 128, Launch(64, 128, 8, 2, tma=True))),
]


def cases(form: str) -> list[report.Case]:
    """What a section of the page shows."""
    if form == WAITING:
        return [report.Case("sm_90", kernel, D, D, "bf16", (128, 128), launch) for kernel, D, launch in CANDIDATES]
    return [case for case in report.cases(("sm_90",), **FORMS[form]) if case.dtype != "fp32"]


def row(case: report.Case, used: report.Resources, found: list[Loop]) -> str:
    """One line of a table."""
    at, form = case.at, report.form_of(case.at)

    def pair(*values: object) -> str:
        return " / ".join(map(str, values)) or "-"

    return "| {} |".format(
        " | ".join(
            str(cell)
            for cell in (
                *(case.kernel, case.D, f"{at.BM}x{at.BN}{form}", at.warps, at.stages),
                *(used.registers, used.spilled or "", f"{used.shared / 1024:.0f}K", report.programs_per_sm(case, used)),
                *(pair(*(getattr(x, name) for x in found)) for name in ("instructions", "products", "waits")),
                pair(*(f"{x.overlapped} of {x.exponentials}" for x in found)),
                pair(*(round(x.instructions * at.warps * 1024 / (at.BM * at.BN)) for x in found)),
                PRODUCTS[case.kernel] * 2 * case.D,
            )
        )
    )


def measured(case: report.Case) -> tuple[report.Resources, list[Loop]]:
    """What the page says of a case, compiled."""
    compiled = report.compile_case(case)
    return report.resources(compiled), report.loops_of(compiled)


def main() -> int:
    lines = [HEAD]
    rule = "|".join(["---"] * len(COLUMNS))
    for form in (*FORMS, WAITING):
        lines += [
            f"## {form}\n",
            *([WAITING_HEAD] if form == WAITING else []),
            f"| {' | '.join(COLUMNS)} |",
            f"|{rule}|",
        ]
        for case in cases(form):
            lines.append(row(case, *measured(case)))
            print(lines[-1], flush=True)
        lines.append("")
    new = PAGE.with_suffix(".new")
    new.write_text("\n".join(lines))
    new.replace(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
