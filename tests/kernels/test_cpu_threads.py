"""The compiled CPU kernel on any threads, in any order, and where memory runs out.

The number of threads does not change bits: not of results, not of gradients, not of decoding. Threads are torch's,
which may run a parallel region on fewer threads than asked, one range after another, or within another region; whatever
it does, all that waits must wait for work that has begun. Each test has a time after which it is a deadlock.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseflash.kernels.cpu import native
from tests.kernels.cpu_problems import Problem, problem
from tests.oracle import NAMES

ROOT = Path(__file__).parent.parent.parent
RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(
    ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
)

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=f"no compiled kernel here: {native.missing()}"),
    pytest.mark.tier2,
]


@lru_cache(maxsize=1)
def problems() -> tuple[Problem, ...]:
    """Some that fit in moments, with all dtypes, features, and decoding among them."""
    return tuple(p for p in map(problem, range(200, 240)) if p.finite and p.case.q.shape[3] < 100)


@lru_cache(maxsize=1)
def known() -> tuple[list[torch.Tensor], ...]:
    """Their results on one thread."""
    torch.set_num_threads(1)
    return tuple(p.results() for p in problems())


@pytest.fixture(autouse=True)
def eager_for_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No problem is too small for threads, and no row for being split in decoding."""
    monkeypatch.setattr(native, "SMALL", 0)
    monkeypatch.setattr(native, "SPLIT", 64)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What work returns, from a thread of its own; a failure if it takes longer."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append((work(), None))
        except BaseException as error:
            ended.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"no end after {seconds:g} s: a deadlock"
    result, error = ended[0]
    if error is not None:
        raise error
    return result


def same_everywhere(threads: int) -> None:
    """All problems, last first so that scratch holds other things, give the bits of one thread."""
    torch.set_num_threads(threads)
    for one, want in reversed(list(zip(problems(), known(), strict=True))):
        for name, got, expected in zip(NAMES, one.results(), want, strict=False):
            # Of numbers, not of bytes: what is compared is finite, or -inf in an lse.
            assert torch.equal(got, expected), (
                f"{name} of a problem on {threads} threads: {(got - expected).abs().max():.1g} apart"
            )


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 16])
def test_the_number_of_threads_does_not_change_bits(threads: int) -> None:
    known()
    within(300, lambda: same_everywhere(threads))


Ranges = Callable[[int, int, Callable[[int, int], None]], int]


def one_after_another(first: int, last: int, run: Callable[[int, int], None]) -> int:
    for i in range(first, last):
        run(i, i + 1)
    return 0


def last_first(first: int, last: int, run: Callable[[int, int], None]) -> int:
    for i in reversed(range(first, last)):
        run(i, i + 1)
    return 0


def all_on_one(first: int, last: int, run: Callable[[int, int], None]) -> int:
    run(first, last)
    return 0


def on_two(first: int, last: int, run: Callable[[int, int], None]) -> int:
    middle = (first + last) // 2
    other = threading.Thread(target=run, args=(first, middle))
    other.start()
    run(middle, last)
    other.join()
    return 0


def late(first: int, last: int, run: Callable[[int, int], None]) -> int:
    """Each on a thread of its own, that of range 0 long after the others."""

    def start(i: int) -> None:
        time.sleep(0.002 * (last - i))
        run(i, i + 1)

    each = [threading.Thread(target=start, args=(i,)) for i in range(first, last)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    return 0


def refusing(first: int, last: int, run: Callable[[int, int], None]) -> int:
    return 1


def failing_midway(first: int, last: int, run: Callable[[int, int], None]) -> int:
    run(first, first + 1)
    return 1


@pytest.mark.parametrize("ranges", [one_after_another, last_first, all_on_one, on_two, late, refusing, failing_midway])
def test_any_order_of_ranges(ranges: Ranges) -> None:
    """Also where the parallel region says that it failed: what is left is done on the calling thread."""
    known()
    regions = []

    @PARALLEL_FOR  # type: ignore[untyped-decorator]
    def parallel_for(first: int, last: int, grain: int, some: int, context: int) -> int:
        regions.append(last - first)
        return ranges(first, last, lambda start, stop: RANGE(some)(start, stop, context))

    library = native.library()
    assert library is not None
    library.use_threads(ctypes.cast(parallel_for, ctypes.c_void_p))
    try:
        within(300, lambda: same_everywhere(5))
    finally:
        library.use_threads(native._parallel_for())
    assert set(regions) == {5}


def test_within_a_parallel_region_of_torch() -> None:
    known()
    torch.set_num_threads(3)
    errors: list[BaseException] = []
    ran: list[int] = []

    @RANGE  # type: ignore[untyped-decorator]
    def some(first: int, last: int, context: int) -> None:
        try:
            for i in range(first, last):
                same_everywhere(3)
                ran.append(i)
        except BaseException as error:  # nothing may leave a callback
            errors.append(error)

    in_torch = ctypes.cast(native._parallel_for(), ctypes.CFUNCTYPE(
        ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, RANGE, ctypes.c_void_p
    ))  # fmt: skip

    def region() -> None:
        torch.set_num_threads(3)
        in_torch(0, 3, 1, some, None)

    within(300, region)
    assert not errors, errors
    assert sorted(ran) == [0, 1, 2]


def test_several_python_threads_at_once() -> None:
    known()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            same_everywhere(2)
        except BaseException as error:
            errors.append(error)

    def all_of_them() -> None:
        each = [threading.Thread(target=work, daemon=True) for _ in range(4)]
        for thread in each:
            thread.start()
        for thread in each:
            thread.join()

    within(400, all_of_them)
    assert not errors, errors


FORKED = """
import multiprocessing, os, sys, warnings
import torch
from sparseflash.kernels.cpu import native
from tests.kernels import test_cpu_threads as here
warnings.simplefilter("ignore", DeprecationWarning)
native.SMALL, native.SPLIT = 0, 64
here.known()
here.same_everywhere(3)  # so that torch's threads are there when we fork
def check(threads):
    here.same_everywhere(threads)
    return os.getpid()
child = os.fork()
if child == 0:
    check(3)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert os.getpid() not in pool.map(check, [1, 3, 2])
here.same_everywhere(3)
print("forked")
"""


def alone(script: str, seconds: float = 300) -> str:
    """What a script prints in a process of its own, within a time."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_workers() -> None:
    assert alone(FORKED).split() == ["forked"]


# Scratch of a thread is 134 MB here, results 10.
STARVED = """
import resource
import threading
import torch
import sparseflash as sf
from sparseflash.kernels.cpu import native
native.SMALL = 0
torch.set_num_threads(2)
table = sf.lookup(sf.patterns.causal().compile(40, block=256))
def run(D):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, D) for _ in range(3))
    if "PASS" == "forward":
        before()
        return sf.attention(q, k, v, table, backend="cpu")
    q.requires_grad_()
    out = sf.attention(q, k, v, table, backend="cpu")
    found = []
    def differentiate():  # in a thread of its own, whose scratch no forward has made
        torch.set_num_threads(1)
        before()
        try:
            found.append(torch.autograd.grad(out.sum(), q)[0])
        except MemoryError as error:
            found.append(error)
    thread = threading.Thread(target=differentiate)
    thread.start()
    thread.join()
    if isinstance(found[0], MemoryError):
        raise found[0]
    return found[0]
def limit():
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (SPARE << 20), resource.RLIM_INFINITY))
before = lambda: None
run(16)  # torch's threads and the code of a call are there
before = limit
try:
    got = run(32768)
except MemoryError as error:
    print("MemoryError:", error)
    got = None
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
before = lambda: None
again = run(32768)
if got is not None:
    assert torch.equal(got, again)
    print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS as Linux has it")
@pytest.mark.parametrize(("which", "spare"), [("forward", 200), ("backward", 500)])
def test_without_memory_for_scratch(which: str, spare: int) -> None:
    """None for any thread: an error, and the next call is as ever. For one of two: it does it all."""
    program = STARVED.replace("PASS", which)
    said = alone(program.replace("SPARE", "60")).strip()
    assert said == f"MemoryError: attention on the CPU found no memory for its scratch ({which})"
    assert alone(program.replace("SPARE", str(spare))).strip() == "done"
