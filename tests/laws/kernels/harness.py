"""Run the Triton launchers on a problem, and hold the results against the oracle.

Shape legend: B batch, Hq / Hkv heads, N queries, M keys, D / DV head dims, P patterns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch

from sparseflash.kernels.launch import Configuration, Launch
from sparseflash.kernels.layout import Score
from sparseflash.kernels.triton import backward as triton_backward
from sparseflash.kernels.triton import forward as triton_forward
from tests import oracle
from tests.laws.kernels.oracle_tables import Mask, Tables, build
from tests.oracle import Case

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# The interpreter computes bf16 products wrongly, silently: bf16 is for a GPU.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


class Results(NamedTuple):
    """What a forward and a backward pass give."""

    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


@dataclass
class Problem:
    """Masks, shapes and a dtype; `make` draws the tensors."""

    mask: Mask  # [P, N, M]
    block: tuple[int, int] = (32, 32)
    B: int = 1
    Hq: int = 2
    Hkv: int = 2
    D: int = 16
    DV: int = 16
    dtype: torch.dtype = torch.float32
    pattern_of: list[list[int]] = field(default_factory=lambda: [[0]])
    transposed: bool = False  # tensors lie in memory as [B, N, H, D]
    with_dlse: bool = True
    all_partial: bool = False
    longest: int | None = None  # blocks past which lines are split
    seed: int = 0

    def tables(self) -> Tables:
        """The lookup tables of the masks, on the device."""
        t = build(self.mask, self.block, self.pattern_of, self.all_partial, self.longest)
        rows, columns = (type(s)(*(x.to(DEVICE) for x in s)) for s in (t.rows, t.columns))
        tiles = type(t.tiles)(*(x.to(DEVICE) for x in t.tiles))
        return Tables(rows, columns, tiles, t.pattern_of.to(DEVICE), t.block)

    def make(self) -> dict[str, torch.Tensor]:
        """q, k, v, dout and dlse."""
        generator = torch.Generator().manual_seed(self.seed)
        _, N, M = self.mask.shape

        def draw(heads: int, rows: int, width: int) -> torch.Tensor:
            shape = (self.B, rows, heads, width) if self.transposed else (self.B, heads, rows, width)
            x = torch.randn(shape, generator=generator).to(DEVICE, self.dtype)
            return x.transpose(1, 2) if self.transposed else x

        return {
            "q": draw(self.Hq, N, self.D),
            "k": draw(self.Hkv, M, self.D),
            "v": draw(self.Hkv, M, self.DV),
            "dout": draw(self.Hq, N, self.DV),
            "dlse": torch.randn((self.B, self.Hq, N), generator=generator).to(DEVICE),
        }

    def visible(self) -> torch.Tensor:
        """Who sees whom, bool [B, Hq, N, M]."""
        index = torch.tensor(self.pattern_of).expand(self.B, self.Hq)
        return torch.from_numpy(self.mask)[index].to(DEVICE)

    @property
    def scale(self) -> float:
        """The usual one."""
        return float(self.D**-0.5)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element nobody wrote shows."""
    empty: Callable[..., torch.Tensor] = torch.empty

    def nan(*args: object, **kwargs: object) -> torch.Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    with mock.patch.object(torch, "empty", nan):
        yield


def run(problem: Problem, tensors: dict[str, torch.Tensor], steps: tuple[int, int] | None = None) -> Results:
    """The Triton launchers, on poisoned memory; `steps` (BM, BN) overrides those of the launch table."""
    q, k, v, dout = (tensors[n] for n in ("q", "k", "v", "dout"))
    dlse = tensors["dlse"] if problem.with_dlse else None
    rows, columns, tiles, pattern_of, block = problem.tables()
    with ExitStack() as stack:
        stack.enter_context(poisoned())
        if steps:
            chosen = Configuration(*[Launch(*steps, warps=4, stages=1)] * 3)
            for module in (triton_forward, triton_backward):
                stack.enter_context(mock.patch.object(module, "configuration", return_value=chosen))
        out, lse = triton_forward.forward(q, k, v, rows, tiles, pattern_of, block, Score(problem.scale))
        dq, dk, dv = triton_backward.backward(
            dout, dlse, q, k, v, out, lse, rows, columns, tiles, pattern_of, block, Score(problem.scale)
        )
    return Results(out, lse, dq, dk, dv)


def check(problem: Problem, got: Sequence[torch.Tensor | None], tensors: dict[str, torch.Tensor]) -> None:
    """The tolerance law, of as many results as are given and not None, in the order of `Results`."""
    q, k, v, dout, dlse = (tensors[name].cpu() for name in ("q", "k", "v", "dout", "dlse"))
    case = Case(q, k, v, dout, dlse * problem.with_dlse, problem.scale)
    results = [None if x is None else x.cpu() for x in got]
    oracle.check(case, problem.visible().cpu(), results + [None] * (len(Results._fields) - len(results)))


def random_mask(rng: np.random.Generator, N: int, M: int, kind: str, unit: int = 16) -> Mask:
    """A [N, M] token mask of a kind."""
    i, j = np.arange(N)[:, None], np.arange(M)[None, :]
    kinds: dict[str, Callable[[], npt.NDArray[np.bool_]]] = {
        "dense": lambda: np.ones((N, M), bool),
        "causal": lambda: j <= i + (M - N),
        "local": lambda: abs(i + (M - N) - j) <= 9,
        "documents": lambda: (np.arange(N) * 5 // max(N, 1))[:, None] == (np.arange(M) * 5 // max(M, 1))[None, :],
        "noise": lambda: rng.random((N, M)) < 0.3,
        "sparse": lambda: rng.random((N, M)) < 0.06,
        "nothing": lambda: np.zeros((N, M), bool),
        # Blocks of every code: empty, full, and noise.
        "codes": lambda: (
            rng.choice([0.0, 0.0, 1.0, 0.5], (N // unit + 1, M // unit + 1))[i // unit, j // unit] > rng.random((N, M))
        ),
        "empty rows": lambda: (
            (rng.random((N, M)) < 0.4) & (i % 3 != 0) & ((i // unit) % 2 == 0) & ((j // unit) % 2 == 1)
        ),
    }
    return np.broadcast_to(kinds[kind](), (N, M)).copy()


KINDS = ("dense", "causal", "local", "documents", "noise", "sparse", "nothing", "codes", "empty rows")
