"""Small changes to the library, one at a time, by cosmic-ray: which of them do the suite's tests not notice?

    python -m tests.mutation patterns/tiles.py                 # every change of one module
    python -m tests.mutation patterns sparseflash/tables --every 50

``make mutants`` calls this and installs cosmic-ray into an environment of its own. The last commit is cloned into
build/mutants and changed there, file by file; nothing of the checkout is touched. Survivors are printed as diffs: each
is a test that is missing, or a change that means nothing. What is left of a run stays there; a new one begins anew.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
COSMIC_RAY = ROOT / ".venv-mutants" / "bin"
SECONDS = 300  # a change whose tests take longer has made something endless
MEMORY = 8 << 30  # bytes; one that asks for more fails
PATTERNS = (
    *("laws/test_pattern_definitions", "test_parsing", "test_where", "laws/test_pattern_laws", "test_conversions"),
    *("test_mask_files", "test_checking", "test_robustness", "test_bad_input", "test_waste", "test_forged_masks"),
    *("test_hostile_files", "test_fuzz_findings", "test_flex", "laws/test_schedule"),
)
# The tests of what begins so, the likeliest to notice first. The first line that fits counts.
TESTS = {
    "sparseflash/pictures/": ("test_drawing", "test_viewer"),
    "patterns/": PATTERNS,
    "sparseflash/tables/": (
        *("laws/test_schedule", "test_checking", "laws/test_pattern_laws", "laws/test_heavy_lines", "test_operators"),
        *("test_bad_input", "laws/test_dynamic_tables", "test_memory", "test_routing", "distributed/test_sharding"),
    ),
    "kernels/": (
        *("laws/test_heavy_lines", "test_cpu_kernel", "laws/test_attention_laws", "test_attention_features"),
        *("laws/test_decode", "test_dropout", "test_modules"),
    ),
}


def modules(paths: list[str]) -> list[str]:
    """The modules at these paths, files or folders, that have tests above; relative to the repository.

    Raises:
        SystemExit: nothing is there, or no tests are named for it.
    """
    found = [file for path in paths for file in sorted((ROOT / path).rglob("*.py")) or [ROOT / path] if file.is_file()]
    names = [str(file.relative_to(ROOT)) for file in found if file.name != "__init__.py"]
    if lost := [name for name in names if not name.startswith(tuple(TESTS))] or ([] if names else paths):
        sys.exit(f"{lost[0]}: expected modules of {', '.join(TESTS)}")
    return names


def annotated(source: str) -> set[tuple[int, int]]:
    """(line, column) of whatever stands inside of annotations, which no test need notice."""
    nodes = list(ast.walk(ast.parse(source)))
    types = [node.annotation for node in nodes if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation]
    types += [node.returns for node in nodes if isinstance(node, ast.FunctionDef) and node.returns]
    places = set()
    for node in types:
        assert node.end_col_offset is not None
        places |= {(node.lineno, column) for column in range(node.col_offset, node.end_col_offset)}
    return places


def thin_out(session: Path, module: str, every: int) -> int:
    """Leave every n-th change of a module, in a fixed random order, and none of its annotations; how many are left."""
    skipped = annotated((ROOT / module).read_text())
    with sqlite3.connect(session) as data:
        rows = data.execute("select job_id, start_pos_row, start_pos_col from mutation_specs order by 2, 3, 1")
        jobs = [(job,) for job, *place in rows.fetchall() if tuple(place) not in skipped]
        kept = random.Random(0).sample(jobs, len(jobs))[::every]
        for table in ("mutation_specs", "work_items"):
            data.execute("create temporary table if not exists kept (job_id)")
            data.execute("delete from kept")
            data.executemany("insert into kept values (?)", kept)
            data.execute(f"delete from {table} where job_id not in (select job_id from kept)")
    return len(kept)


def cosmic_ray(*arguments: str, clone: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of cosmic-ray on the clone, whose code comes before that of the checkout."""
    environment = os.environ | {"PYTHONPATH": str(clone)}
    environment.setdefault("SPARSEFLASH_EXAMPLES", "20")
    command = [str(COSMIC_RAY / arguments[0]), *arguments[1:]]
    return subprocess.run(command, cwd=clone, env=environment, stdout=subprocess.PIPE, text=True, check=True)


def survivors(module: str, clone: Path, every: int) -> tuple[int, int]:
    """Try the changes of a module and print those that no test noticed; (how many survived, how many were tried)."""
    tests = next(names for start, names in TESTS.items() if module.startswith(start))
    files = " ".join(f"tests/{name}.py" for name in tests)
    (clone / "mutants.toml").write_text(
        f'[cosmic-ray]\nmodule-path = "{module}"\ntimeout = {SECONDS}.0\nexcluded-modules = []\n'
        f'test-command = "{sys.executable} -m pytest -x -p no:cacheprovider {files}"\n\n'
        '[cosmic-ray.distributor]\nname = "local"\n'
    )
    session = clone / "mutants.sqlite"
    session.unlink(missing_ok=True)
    cosmic_ray("cosmic-ray", "init", "mutants.toml", session.name, clone=clone)
    tried = thin_out(session, module, every)
    if tried:
        cosmic_ray("cosmic-ray", "baseline", "mutants.toml", clone=clone)
        cosmic_ray("cosmic-ray", "exec", "mutants.toml", session.name, clone=clone)
        print(cosmic_ray("cr-report", "--surviving-only", "--show-diff", session.name, clone=clone).stdout, flush=True)
    with sqlite3.connect(session) as data:
        (survived,) = data.execute("select count(*) from work_results where test_outcome = 'SURVIVED'").fetchone()
    return survived, tried


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", help=f"modules or folders, of {', '.join(TESTS)}")
    parser.add_argument("--every", type=int, default=1, help="every n-th change, in a fixed random order")
    given = parser.parse_args(arguments)
    names = modules(given.paths)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    clone = ROOT / "build" / "mutants"
    shutil.rmtree(clone, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    shutil.copytree(ROOT / "kernels/cpu/libraries", clone / "kernels/cpu/libraries", dirs_exist_ok=True)
    counts = []
    for name in names:
        counts.append(survivors(name, clone, given.every))
        print(f"{name}: {counts[-1][0]} of {counts[-1][1]} changes survive", flush=True)
    survived, tried = (sum(column) for column in zip(*counts, strict=True))
    print(f"{survived} of {tried} changes survive")
    sys.exit(survived > tried / 10)


if __name__ == "__main__":
    main()
