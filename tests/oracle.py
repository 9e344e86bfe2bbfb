"""Float64 attention and the tolerance that follows from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import sparseflash as sf

NAMES = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """Operands and cotangents of one attention call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> Case:
        return self.mapped(lambda x: x.to(dtype))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The case with every tensor changed."""
        q, k, v, dout, dlse = (change(x) for x in (self.q, self.k, self.v, self.dout, self.dlse))
        return Case(q, k, v, dout, dlse, self.scale)


def random_case(
    seed: int, batch: int, heads: int, group: int, q_len: int, kv_len: int, dim: int, v_dim: int, dtype: torch.dtype
) -> Case:
    """Normal operands in [B, N, H, D] memory seen as [B, H, N, D], values representable in dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, h: int, d: int) -> torch.Tensor:
        return torch.randn(batch, n, h, d, generator=generator).to(dtype).transpose(1, 2)

    q_heads = heads * group
    q, k, v, dout = (draw(*s) for s in ((q_len, q_heads, dim), (kv_len, heads, dim), (kv_len, heads, v_dim),
                                        (q_len, q_heads, v_dim)))  # fmt: skip
    dlse = torch.randn(batch, q_heads, q_len, generator=generator)
    return Case(q, k, v, dout, dlse, float(torch.rand((), generator=generator)) + 0.05)


def ours(case: Case, mask: sf.patterns.BlockMask | sf.Pattern | None, backend: str | None) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v through the library; the Triton kernels run on a GPU if there is one."""
    if backend == "triton" and torch.cuda.is_available():
        on_gpu = ours(case.mapped(lambda x: x.cuda()), mask, None)
        return [x.cpu() for x in on_gpu]
    q, k, v = (x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = sf.attention(q, k, v, mask, scale=case.scale, return_lse=True, backend=backend)
    torch.autograd.backward((out, lse), (case.dout, case.dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def eager(case: Case, token_mask: torch.Tensor) -> list[torch.Tensor]:
    """The same through masked dense attention in the dtype of the case."""
    q, k, v = (x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = sf.reference.attention(q, k, v, token_mask, scale=case.scale, return_lse=True)
    torch.autograd.backward((out, lse), (case.dout, case.dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def largest_terms(case: Case, token_mask: torch.Tensor) -> list[float]:
    """Root of the summed squares of the terms behind any element of out, lse, dq, dk and dv, the largest; in float64.

    One ulp of it is what rounding each term once costs, errors being independent, also where the terms cancel: a
    query with one key has dS = dP - delta = 0, and dense attention may get that 0 exactly.
    """
    c = case.to(torch.float64)
    group = c.q.shape[1] // c.k.shape[1]
    k, v = c.k.repeat_interleave(group, 1), c.v.repeat_interleave(group, 1)
    scores = (c.q @ k.mT * c.scale).masked_fill(~token_mask, -torch.inf)
    # exp turns an absolute error of a score, which grows with the score, into a relative one of its probability.
    score_terms = scores.abs() + (c.q.square() @ k.square().mT).sqrt() * c.scale
    growth = 1 + score_terms.masked_fill(~token_mask, 0) + scores.logsumexp(-1, keepdim=True).abs().nan_to_num(0, 0)
    p = scores.softmax(-1).nan_to_num(0)
    dp = c.dout @ v.mT
    dp_terms = dp.abs() + (c.dout.square() @ v.square().mT).sqrt()
    delta = (p * dp).sum(-1, keepdim=True) - c.dlse.unsqueeze(-1)
    delta_terms = delta.abs() + (c.dout * (p @ v)).square().sum(-1, keepdim=True).sqrt()
    ds = p * (dp_terms + delta_terms + (dp - delta).abs() * growth) * c.scale
    p = p * growth
    by_key_head = [(x.square().mT @ y.square()).unflatten(1, (-1, group)).sum(2) for x, y in ((ds, c.q), (p, c.dout))]
    squares = (p.square() @ v.square(), growth.square(), ds.square() @ k.square(), *by_key_head)
    return [float(s.max().sqrt()) for s in squares]


def check(case: Case, token_mask: torch.Tensor, results: list[torch.Tensor]) -> None:
    """Error against float64 at most twice that of dense eager attention in the same dtype, plus one ulp.

    The ulp is one of the dtype for each term, and what accumulating n terms in fp32 adds: sqrt(n) fp32 ulps, the
    probabilistic bound of Higham and Mary (2019), "A new approach to probabilistic rounding error analysis".
    """
    dtype = case.q.dtype
    longest = max(*case.q.shape[2:], *case.v.shape[2:])
    ulp = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * longest**0.5
    exact, dense = eager(case.to(torch.float64), token_mask), eager(case, token_mask)
    for name, got, want, same_dtype, largest in zip(
        NAMES, results, exact, dense, largest_terms(case, token_mask), strict=True
    ):
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        dead = want == -torch.inf
        assert torch.equal(got == -torch.inf, dead), f"{name}: rows that see nothing differ"
        error, allowed = ((x.double() - want).masked_fill(dead, 0).abs().max() for x in (got, same_dtype))
        bound = 2 * float(allowed) + ulp * largest
        assert float(error) <= bound, f"{name}: error {float(error):.3g} above {bound:.3g} ({dtype})"
