"""Run the Triton launchers and a float64 reference on the same problem, and compare them by the tolerance law.

Shape legend: B batch, Hq / Hkv heads, N queries, M keys, D / DV head dims, P patterns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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
from tests.kernels.oracle_tables import Mask, Tables, build

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
    longest: int | None = None  # blocks past which lines are cut into pieces
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


def dense(problem: Problem, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> Results:
    """Masked dense attention and its gradients by autograd, all in `dtype`."""
    q, k, v = (tensors[n].detach().to(dtype).requires_grad_() for n in ("q", "k", "v"))
    group = problem.Hq // problem.Hkv
    K, V = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = problem.visible()
    alive = visible.any(-1, keepdim=True)
    s = (q @ K.transpose(-1, -2) * problem.scale).masked_fill(~visible, float("-inf")).masked_fill(~alive, 0.0)
    out = (s.softmax(-1) * alive.to(dtype)) @ V
    lse = s.logsumexp(-1)
    loss = (out * tensors["dout"].to(dtype)).sum()
    if problem.with_dlse:
        loss = loss + (lse * tensors["dlse"].to(dtype) * alive[..., 0]).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return Results(out.detach(), lse.detach().masked_fill(~alive[..., 0], float("-inf")), dq, dk, dv)


def largest_terms(problem: Problem, tensors: dict[str, torch.Tensor], exact: Results) -> Results:
    """For each result the largest sum of absolute terms: what one ulp is counted of.

    Gradients can cancel exactly (a query that sees one key has dq = 0), and eager attention may then be exact by luck;
    one ulp of 0 would forbid any rounding at all. Gradients are recomputed from lse, which is rounded to fp32 whatever
    the dtype: one ulp of lse in the exponent is |lse| fp32 ulps of each probability.
    """
    q, k, v, dout, dlse = (tensors[n].double() for n in ("q", "k", "v", "dout", "dlse"))
    group = problem.Hq // problem.Hkv
    K, V = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    s = q @ K.transpose(-1, -2) * problem.scale - exact.lse.masked_fill(exact.lse.isinf(), float("inf"))[..., None]
    P = s.masked_fill(~problem.visible(), float("-inf")).exp()
    lse = exact.lse.masked_fill(exact.lse.isinf(), 0.0)
    P = P * (1 + lse.abs() * torch.finfo(torch.float32).eps / torch.finfo(problem.dtype).eps)[..., None]
    delta = (dout * exact.out).sum(-1) - (dlse * problem.with_dlse)
    dS = P * ((dout @ V.transpose(-1, -2)).abs() + delta.abs()[..., None])

    def per_key_head(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(problem.B, problem.Hkv, group, *x.shape[2:]).sum(2)

    dk = per_key_head(dS.transpose(-1, -2) @ q.abs() * problem.scale)
    dv = per_key_head(P.transpose(-1, -2) @ dout.abs())
    return Results(exact.out, lse, dS @ K.abs() * problem.scale, dk, dv)


def check(problem: Problem, got: Results, tensors: dict[str, torch.Tensor]) -> None:
    """Error against float64 at most twice that of dense eager attention in the same dtype, plus one ulp."""
    exact = dense(problem, tensors, torch.float64)
    eager = dense(problem, tensors, problem.dtype)
    terms = largest_terms(problem, tensors, exact)
    for name, x, right, peer, term in zip(Results._fields, got, exact, eager, terms, strict=True):
        assert x.shape == right.shape
        if right.numel() == 0:
            continue
        dead = right.isinf()
        assert torch.equal(x.isinf(), dead), f"{name}: -inf in the wrong places"
        assert x.isfinite().logical_or(dead).all(), f"{name}: not finite"
        right, x, peer = (t.masked_fill(dead, 0.0).double() for t in (right, x, peer))
        ulp = torch.finfo(problem.dtype).eps * term.abs().max()
        allowed = 2 * (peer - right).abs().max() + ulp
        error = (x - right).abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


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
        # Blocks of every letter: empty, full, and noise.
        "letters": lambda: (
            rng.choice([0.0, 0.0, 1.0, 0.5], (N // unit + 1, M // unit + 1))[i // unit, j // unit] > rng.random((N, M))
        ),
        "empty rows": lambda: (
            (rng.random((N, M)) < 0.4) & (i % 3 != 0) & ((i // unit) % 2 == 0) & ((j // unit) % 2 == 1)
        ),
    }
    return np.broadcast_to(kinds[kind](), (N, M)).copy()


KINDS = ("dense", "causal", "local", "documents", "noise", "sparse", "nothing", "letters", "empty rows")
