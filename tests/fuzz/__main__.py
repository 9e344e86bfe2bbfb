"""Run the suite's laws for as long as is asked, on new and wider cases: ``make fuzz MINUTES=n [TARGET=a,b]``.

Each target is a process of its own, one after the other, so that what kills one is a finding too. Findings, each a file
with the smallest case and a line that runs it again, and hypothesis's database of cases lie in the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from tests.fuzz.targets import TARGETS, Target, chosen

ROOT = Path(__file__).parent.parent.parent
Status = dict[str, Any]


def status_of(folder: Path) -> Status:
    """What a campaign last wrote of itself."""
    try:
        found: Status = json.loads((folder / "status.json").read_text())
    except FileNotFoundError:
        return {"law": "", "seconds": 0.0, "cases": {}, "findings": []}
    return found


def run(name: str, target: Target, minutes: float, folder: Path, again: str, progress: Progress) -> Status:
    """One target for so many minutes; its last status, findings and death included."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "status.json").unlink(missing_ok=True)
    environment = os.environ | target.environment | {
        "SPARSEFLASH_FUZZ": name,
        "SPARSEFLASH_FUZZ_FOLDER": str(folder),
        "SPARSEFLASH_FUZZ_SECONDS": str(60 * minutes),
        "SPARSEFLASH_FUZZ_EXAMPLES": str(target.examples),
    }  # fmt: skip
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.fuzz.campaign"]
    command += [again] if again else [*target.files, *(("-k", target.only) if target.only else ())]
    bar = progress.add_task(name, total=60 * minutes, told="")
    with (folder / "pytest.log").open("w") as log:
        child = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while child.poll() is None:
                time.sleep(0.2)
                status = status_of(folder)
                told = f"{sum(status['cases'].values()):,} cases, {len(status['findings'])} findings"
                progress.update(bar, completed=status["seconds"], told=told)
        finally:
            child.terminate()
            child.wait()
    status = status_of(folder)
    if child.returncode not in (0, 1):
        died = f"{status['law'] or 'before the first law'}: exit status {child.returncode}, see {folder / 'pytest.log'}"
        status["findings"].append(died)
    return status


def main() -> int:
    """0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="of processor time, for each target")
    parser.add_argument("--target", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}, or test files")
    parser.add_argument("--folder", type=Path, default=ROOT / "fuzz-findings", help="for findings and cases")
    parser.add_argument("--again", default="", help="one law, as a finding names it; its smallest cases come first")
    options = parser.parse_args()
    try:
        targets = {name: chosen(name) for name in options.target.split(",")}
    except ValueError as error:
        parser.error(str(error))
    console = Console(stderr=True)
    columns = TextColumn("{task.description:>16}"), BarColumn(), TextColumn("{task.fields[told]}")
    found, statuses, folder = False, {}, options.folder.resolve()
    with Progress(*columns, console=console) as progress:
        for name, target in targets.items():
            statuses[name] = run(name, target, options.minutes, folder / Path(name).stem, options.again, progress)
    for name, status in statuses.items():
        minutes, cases = status["seconds"] / 60, sum(status["cases"].values())
        print(f"{name}: {len(status['cases'])} laws, {cases:,} cases in {minutes:.1f} minutes of processor time, "
              f"{len(status['findings'])} findings")  # fmt: skip
        for finding in status["findings"]:
            print(f"  {finding}")
        found |= bool(status["findings"])
    if found:
        print(f"the smallest cases are in {options.folder}")
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
