"""Put faults into the library one at a time, and ask the suite's laws whether they notice.

``TRITON_INTERPRET=1 python -m tests.faults [table] [cpu] [native] [triton]`` prints a line for each fault: kind, name,
and what noticed it, empty if nothing did; first of each kind, as "no fault", what the laws say of the source as it is.
Each fault lives in a forked process of its own. One of the compiled kernel is compiled there, in a hurry.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from sparseflash.kernels.cpu import build, levels, native
from tests.faults import laws
from tests.faults.catalogue import CPU, NATIVE, TABLE, TRITON, Fault
from tests.faults.finding import Found

ROOT = Path(__file__).parent.parent.parent
CATALOGUE = {"table": TABLE, "cpu": CPU, "native": NATIVE, "triton": TRITON}
MODULES = sorted({fault.module for kind, faults in CATALOGUE.items() if kind != "native" for fault in faults})
KERNEL = ROOT / "kernels" / "cpu"


def faulty_source(fault: Fault) -> str:
    """The module's text with the fault in it."""
    python = (ROOT / "sparseflash" / Path(*fault.module.split("."))).with_suffix(".py")
    text = (KERNEL / fault.module if fault in NATIVE else python).read_text()
    assert text.count(fault.text) == 1, f"{fault.module} has {text.count(fault.text)} times {fault.text!r}, not once"
    return text.replace(fault.text, fault.instead)


def put_in(fault: Fault, folder: Path) -> None:
    """Make the library the faulty one: in a child only."""
    if fault in NATIVE:
        for file in (*KERNEL.glob("*.h"), *KERNEL.glob("*.cpp")):
            (folder / file.name).write_text(faulty_source(fault) if file.name == fault.module else file.read_text())
        least = levels.levels_of(levels.machine())[0]
        failed = build.build([least], folder, ["-O1", "-w"], folder / "kernel.cpp")
        assert not failed, failed
        native._chosen.append(native.Library(folder / least.library.name, least.name))
        return
    name = f"sparseflash.{fault.module}"
    path = folder / f"{fault.module.rpartition('.')[2]}.py"
    path.write_text(faulty_source(fault))
    sys.meta_path.insert(0, Found(name, path))
    module = sys.modules[name]
    before = dict(vars(module))
    after = vars(importlib.reload(module))
    # Who imported a name from it holds what it meant before.
    for other in [m for n, m in sys.modules.items() if n.startswith(("sparseflash", "tests"))]:
        held = vars(other)
        held |= {n: after[n] for n, value in before.items() if n[:2] != "__" and n in held and held[n] is value}


def noticed(kind: str) -> str:
    """Which law notices that something is wrong, and by what error; empty if none does."""
    laws.use("triton" if kind == "triton" else "cpu")
    if kind == "cpu":
        native._chosen.append(native.UnusableError("faults are put into the plain one"))
    for name, law in laws.LAWS[kind]:
        try:
            law()
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"{name}: {type(error).__name__}: {first}"
    return ""


def in_a_child(kind: str, fault: Fault | None) -> str:
    """What is noticed in a process of its own; one that dies has noticed the fault too."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                if fault is not None:
                    put_in(fault, Path(folder))
                answer.write_text(noticed(kind))
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            return f"killed by signal {os.WTERMSIG(status)}"
        assert status == 0, "the child could not tell"
        return answer.read_text()


def main(kinds: Sequence[str]) -> None:
    torch.set_num_threads(1)  # before anything runs: a fork has no threads
    for module in MODULES:
        importlib.import_module(f"sparseflash.{module}")
    for kind in kinds:
        chosen: list[Fault | None] = [None, *CATALOGUE[kind]]
        for fault in chosen:
            print(json.dumps([kind, str(fault or "no fault"), in_a_child(kind, fault)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(CATALOGUE))
