"""The kernel's operands and results between pages that may not be touched.

``python -m tests.kernels.guarded PLACE FIRST COUNT`` runs problems of ``tests.kernels.cpu_problems`` with every tensor
that the kernel gets an address of at the ``start`` or at the ``end`` of a page, beside one without access: what reads
or writes outside of a tensor, wherever that is in the compiled kernel, ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Mapping

import torch

from sparseflash.kernels.cpu import native
from tests.kernels.cpu_problems import problem, use_libraries_of_environment

RESULTS = {"out", "lse", "dq", "dk", "dv", "delta", "lse2", "turns", "dq_sum", "parts", "bias_sums"}
PAGE = mmap.PAGESIZE


class Guarded:
    """A copy of the memory that a tensor spans, with a page without access on either side."""

    def __init__(self, x: torch.Tensor, place: str) -> None:
        spanned = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        self.of, self.size = x, spanned * x.element_size()
        room = -(-max(self.size, 1) // PAGE) * PAGE
        self.memory = mmap.mmap(-1, room + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.ends = first, first + PAGE + room
        for end in self.ends:
            _protect(end, 0)
        self.address = first + PAGE if place == "start" else first + PAGE + room - self.size
        ctypes.memmove(self.address, x.data_ptr(), self.size)

    def release(self, back: bool) -> None:
        """Let go of the pages, and let the tensor have what was written."""
        if back:
            ctypes.memmove(self.of.data_ptr(), self.address, self.size)
        for end in self.ends:
            _protect(end, mmap.PROT_READ | mmap.PROT_WRITE)


def _protect(at: int, access: int) -> None:
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), access):
        raise OSError(ctypes.get_errno(), "mprotect")


def guard(place: str) -> None:
    """From now on, in this process."""
    point, run, planned = native._Call.point, native.Library.run, native._Plan.point

    def guarded_point(self: native._Call, name: str, x: torch.Tensor) -> None:
        point(self, name, x)
        guarded = Guarded(self.held[-1], place)
        vars(self.problem).setdefault("guarded", {})[name] = guarded
        setattr(self.problem, name, guarded.address)

    def guarded_run(self: native.Library, name: str, problem: native.Problem) -> None:
        run(self, name, problem)
        # What the backward is given of the forward's results is not written.
        for field, guarded in vars(problem).pop("guarded").items():
            guarded.release(back=field in RESULTS)

    def guarded_plan(self: native._Plan, fields: Mapping[str, torch.Tensor]) -> None:
        planned(self, fields)
        for name in fields:
            guarded = Guarded(self.held[name], place)
            vars(self).setdefault("guarded", []).append(guarded)
            setattr(self.problem, name, guarded.address)

    native._Call.point = guarded_point  # type: ignore[method-assign]
    native.Library.run = guarded_run  # type: ignore[assignment,method-assign]
    native._Plan.point = guarded_plan  # type: ignore[method-assign]


def main(place: str, first: str, count: str) -> None:
    """Run problems, each compared with masked dense attention."""
    use_libraries_of_environment()
    torch.set_num_threads(2)
    assert native.library() is not None, native.missing()
    guard(place)
    for seed in range(int(first), int(first) + int(count)):
        print(f"problem {seed}", file=sys.stderr, flush=True)
        one = problem(seed)
        one.check(one.results())
    print(f"{count} problems at the {place} of pages")


if __name__ == "__main__":
    main(*sys.argv[1:])
