"""Everything that waits for a GPU, in four parts: check, kernels, step, peers. ``make gpu`` runs this.

    python -m benchmarks.gpu                  # all parts in order
    python -m benchmarks.gpu kernels          # one; the same line again goes on where it stopped
    python -m benchmarks.gpu check --again    # and takes failed rows again
    python -m benchmarks.gpu check kernels --at-once 12 --examples 10  # on many cores, in a few minutes

Each part ends within nine minutes, if its rows go one by one, and writes benchmarks/results/<device>/<date>-<part>.json
after every row; the page benchmarks/README.md is written anew from these files at the end. docs/gpu.md says what each
part measures.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from functools import partial

import torch

from benchmarks.record import ROOT

PARTS = ("check", "kernels", "step", "peers")
SECONDS = 500  # after which no row begins: a row may take half a minute


def run_part(part: str, seconds: float, again: bool, at_once: int = 1, examples: int = 100) -> bool:
    """Whether a part is complete, and nothing in it failed that must not."""
    if part == "check":
        from benchmarks.gpu import check

        todo = partial(check.steps, examples, 4 if at_once > 1 else 8)
        return check.run(seconds, todo=todo, again=again, at_once=at_once)
    if part == "step":
        return run_step(seconds)
    from benchmarks.gpu import kernels, peers
    from benchmarks.gpu.machine import gpu

    if part == "kernels":
        return kernels.run(gpu(), seconds, again=again, at_once=at_once)
    return peers.run(gpu(), seconds, again=again)


def run_step(seconds: float) -> bool:
    """Whole training steps, by the module that measures them."""
    if importlib.util.find_spec("benchmarks.step") is None:
        print("step: benchmarks/step.py is not in this checkout, whole training steps stay unmeasured")
        return True
    command = [sys.executable, "-m", "benchmarks.step", "--seconds", f"{seconds:.0f}"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if every part that was asked for is complete and right, or if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all of them")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a part, after which it begins no row")
    parser.add_argument("--again", action="store_true", help="measure rows again that failed")
    parser.add_argument(
        "--at-once", type=int, default=1, metavar="N",
        help="steps of check, or rows of kernels prepared side by side and timed alone: for many cores and little time",
    )  # fmt: skip
    parser.add_argument("--examples", type=int, default=100, help="of each law in check")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, got {' '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here, nothing to measure")
        return 0
    complete = [
        run_part(part, given.seconds, given.again, given.at_once, given.examples) for part in given.parts or PARTS
    ]
    from benchmarks import report

    report.main([])
    return int(not all(complete))


if __name__ == "__main__":
    sys.exit(main())
