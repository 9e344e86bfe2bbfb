"""Change the source of a part of the library in small ways, and count the changes that the suite notices.

``python -m tests.mutants patterns [--every n] [--only NAME ...]`` (or ``tables``, ``cpu``) takes every n-th mutant of a
shuffled list, of all modules or of those named, runs the tests that meet its line
(:mod:`tests.mutants.coverage_map`), the quickest first, in a forked process, and prints those that survive. Nothing on
disk is changed. Survivors that were judged to be no faults (:mod:`tests.mutants.allowed`) do not count.
Before that the tests must pass without a change, which also shows what lines they meet.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import track

from tests.faults.finding import Found
from tests.mutants.allowed import JUDGED
from tests.mutants.coverage_map import Met, Only, Reach
from tests.mutants.operators import count, mutant

ROOT = Path(__file__).parent.parent.parent
SECONDS = 300  # of processor time: a mutant that takes longer does not end
MEMORY = 8 << 30  # bytes: one that asks for more fails

PATTERNS = [
    *("test_pattern_definitions", "test_parsing", "test_where", "test_pattern_laws", "test_conversions"),
    *("test_mask_files", "test_checking", "test_robustness", "test_bad_input", "test_waste", "test_text_at_random"),
    *("test_forged_masks", "test_hostile_files", "test_fuzz_findings", "test_memory", "test_oracle", "test_schedule"),
    *("test_beside_and_packed", "test_cache_law", "test_flex", "test_gallery", "test_heavy_lines"),
    "train/test_ordering",
]
DRAWN = {
    "drawing": ["test_drawing"],
    "pixels": ["test_drawing", "test_viewer"],
    "seen": ["test_seen", "test_viewer_in_a_browser"],
    "notebook": ["test_drawing", "test_viewer"],
    "viewer": ["test_viewer", "test_viewer_in_a_browser"],
    "atomic_write": ["test_mask_files", "test_drawing"],
}
PARTS: dict[str, tuple[list[str], list[str]]] = {
    "patterns": (["patterns/*.py", "sparseflash/pictures/*.py"], PATTERNS),
    "tables": (
        [f"sparseflash/tables/{name}.py" for name in ("device", "lookup", "table", "splitting", "packing")],
        [
            *("test_schedule", "test_checking", "test_pattern_laws", "test_heavy_lines", "test_operators"),
            *("test_bad_input", "test_dynamic_tables", "test_cuda_graphs", "test_memory", "test_fuzz_findings"),
            *("test_routing", "test_modules", "test_oracle", "test_cache_law", "distributed/test_sharding"),
        ],
    ),
    "cpu": (
        ["kernels/cpu/*.py", "kernels/layout.py", "kernels/sinks.py", "kernels/dropout.py"],
        [
            *("test_heavy_lines", "test_cpu_kernel", "test_attention_laws", "test_attention_features"),
            *("test_decode", "test_dropout", "test_oracle", "test_fuzz_findings", "test_modules"),
        ],
    ),
}
LEFT_OUT = "not triton_kernels and not costs and not compile and (not graph or cuda_graphs)"  # slow, or the clock
# Loaded before the first fork, so that a child has only ours to import.
THIRD = (
    "torch",
    "torch._dynamo.testing",
    "hypothesis.extra.numpy",
    "scipy.sparse",
    "numpy.testing",
    "safetensors.numpy",
    "matplotlib.backends.backend_agg",
    "PIL.Image",
)


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(["sparseflash", *(part for part in parts if part != "sparseflash")])


def files_of(part: str, only: Collection[str] = ()) -> list[Path]:
    """The part's files, or of them those with these stems.

    Raises:
        ValueError: a stem that no file of the part has.
    """
    files = [file for pattern in PARTS[part][0] for file in sorted(ROOT.glob(pattern)) if file.name != "__init__.py"]
    stems = [file.stem for file in files]
    if unknown := [name for name in only if name not in stems]:
        raise ValueError(f"no module {unknown[0]!r} in {part}: expected some of {', '.join(stems)}")
    return [file for file in files if not only or file.stem in only]


def tests_of(part: str, file: Path) -> list[str]:
    """The module's own examples first, then files of tests."""
    examples = f"{ROOT}/tests/test_public_face.py::test_examples_in_docstrings_run[{module_of(file)}]"
    names = DRAWN.get(file.stem, PARTS[part][1]) if part == "patterns" else PARTS[part][1]
    return [examples, *(str(ROOT / "tests" / f"{name}.py") for name in names)]


def survives(part: str, file: Path, text: str, tests: Sequence[str]) -> str:
    """What became of the mutant: ``killed``, ``survived`` or ``without end``."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / file.name
        place.write_text(text)

        def run() -> int:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            sys.meta_path.insert(0, Found(module_of(file), place))
            aside = io.StringIO()
            with redirect_stdout(aside), redirect_stderr(aside):
                return pytest.main(["-x", *options(folder), *rooms(part, file, tests)], [Only(tests)])

        status = forked(run)
    if os.WIFSIGNALED(status):
        return "without end" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed"
    if os.WEXITSTATUS(status) in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(f"pytest found no tests for {file}")
    return "survived" if os.WEXITSTATUS(status) == 0 else "killed"


def reach(part: str, files: Sequence[Path]) -> Reach:
    """Run all tests of some files without a change, and see what they meet.

    Raises:
        SystemExit: a test fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "met.json"

        def run() -> int:
            met = Met(files)
            with redirect_stdout(sys.stderr):
                code = pytest.main(
                    [*options(folder), *dict.fromkeys(x for y in files for x in tests_of(part, y))], [met]
                )
            met.write(found)
            return code

        if forked(run):
            raise SystemExit("the tests do not even pass without a change")
        return Reach(found)


def rooms(part: str, file: Path, tests: Sequence[str]) -> list[str]:
    """Where to look for these tests."""
    places = {str(ROOT / test.split("::")[0]) for test in tests}
    return [place for place in tests_of(part, file) if place in places or "::" in place]


def options(folder: str) -> list[str]:
    return ["-q", "-p", "no:cacheprovider", "--assert", "plain", "--basetemp", f"{folder}/temp", "-k", LEFT_OUT]


def forked(run: Callable[[], int]) -> int:
    """The status of a process that does this and ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = int(run())
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def main() -> int:
    """0 if at least 90 % of the mutants are noticed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutant")
    parser.add_argument("--first", type=int, default=0, help="beginning with this one")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="of these modules, such as pixels")
    asked = parser.parse_args()
    try:
        files = files_of(asked.part, asked.only)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("SPARSEFLASH_EXAMPLES", "20")
    for name in THIRD:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    everything = [(file, number) for file in files for number in range(count(file.read_text()))]
    random.Random(0).shuffle(everything)
    some = everything[asked.first :: asked.every]
    met = reach(asked.part, files)
    found: dict[str, int] = {"killed": 0, "survived": 0, "without end": 0, "judged": 0}
    for file, number in track(some, console=Console(stderr=True), description=asked.part):
        line, what, text = mutant(file.read_text(), number)
        tests = met.tests(file, line)
        fate = survives(asked.part, file, text, tests) if tests else "survived"
        name = str(file.relative_to(ROOT))
        why = JUDGED.get((name, file.read_text().splitlines()[line - 1].strip(), what))
        if fate == "survived" and why is not None:
            fate = "judged"
        found[fate] += 1
        if fate != "killed":
            unmet = "" if tests else " (no test meets it)"
            print(f"{fate}: {name}:{line}: {what}{f' ({why})' if fate == 'judged' else unmet}", flush=True)
    counted = len(some) - found["judged"]
    noticed = counted - found["survived"]
    print(f"{asked.part}: {noticed} of {counted} mutants noticed ({100 * noticed / max(1, counted):.1f} %), "
          f"{found['judged']} more judged to be no faults, of {len(everything)} there are")  # fmt: skip
    return int(noticed < 0.9 * counted)


if __name__ == "__main__":
    sys.exit(main())
