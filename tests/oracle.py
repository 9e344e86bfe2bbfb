"""Float64 attention and the tolerance that follows from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

import sparseflash as sf
from sparseflash.functional.attention import Mask
from sparseflash.kernels.bias import summed

NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks", "dbias")

# Shapes of biases for batch, heads, queries and keys.
BIASES: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "pairs": lambda B, H, N, M: (B, H, N, M),
    "pairs by head": lambda B, H, N, M: (1, H, N, M),
    "pairs by sample": lambda B, H, N, M: (B, 1, N, M),
    "pairs shared": lambda B, H, N, M: (1, 1, N, M),
    "keys": lambda B, H, N, M: (B, H, 1, M),
    "keys by sample": lambda B, H, N, M: (B, 1, 1, M),
    "queries": lambda B, H, N, M: (1, H, N, 1),
    "a head": lambda B, H, N, M: (1, H, 1, 1),
    "near distances": lambda B, H, N, M: (H, 7),
    "distances shared": lambda B, H, N, M: (1, 41),
    "all distances": lambda B, H, N, M: (H, 2 * (N + M) + 1),
}


@dataclass(frozen=True)
class Features:
    """What an attention call may do beside scaling; all off by default."""

    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0
    bias: torch.Tensor | None = None

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        """The features with every tensor changed; slopes stay fp32."""
        slopes = None if self.alibi_slopes is None else change(self.alibi_slopes).float()
        sinks, bias = (None if x is None else change(x) for x in (self.sinks, self.bias))
        return replace(self, alibi_slopes=slopes, sinks=sinks, bias=bias)

    def arguments(self, sinks: torch.Tensor | None, bias: torch.Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of attention, with these sinks and this bias; not everybody's takes a bias."""
        own = {"softcap": self.softcap, "alibi_slopes": self.alibi_slopes, "dropout_p": self.dropout_p}
        return own | {"seed": self.seed, "sinks": sinks} | ({} if bias is None else {"bias": bias})


@dataclass(frozen=True)
class Case:
    """Operands and cotangents of one attention call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    scale: float
    features: Features = Features()
    q_offset: int | None = None  # of the mask; for the bias

    def to(self, dtype: torch.dtype) -> Case:
        return self.mapped(lambda x: x.to(dtype))

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
        """The case with every tensor changed."""
        q, k, v, dout, dlse = (change(x) for x in (self.q, self.k, self.v, self.dout, self.dlse))
        return Case(q, k, v, dout, dlse, self.scale, self.features.mapped(change), self.q_offset)

    def leaves(self) -> list[torch.Tensor]:
        """Fresh leaves of q, k, v and, if there are any, sinks and bias."""
        given = (self.q, self.k, self.v, self.features.sinks, self.features.bias)
        return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in given if x is not None]

    def arguments(self, leaves: list[torch.Tensor]) -> dict[str, Any]:
        """Keyword arguments of attention, sinks and bias from these leaves."""
        rest = iter(leaves[3:])
        sinks, bias = (None if x is None else next(rest) for x in (self.features.sinks, self.features.bias))
        return self.features.arguments(sinks, bias)

    @property
    def names(self) -> list[str]:
        """Of the results."""
        given = {"dsinks": self.features.sinks, "dbias": self.features.bias}
        return [name for name in NAMES if name not in given or given[name] is not None]


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


def random_features(
    case: Case,
    seed: int,
    softcap: float | None = None,
    alibi: Literal["", "head", "sample"] = "",
    sinks: float = 0.0,
    dropout_p: float = 0.0,
    bias: str = "",
) -> Case:
    """The case with features; slopes of both signs one a head or one a sample too, sinks of this spread, 0 for none.

    A bias has one of the shapes of `BIASES`, and is in fp32 every other time.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, heads = case.q.shape[:2]
    slopes = torch.randn((batch, heads) if alibi == "sample" else (heads,), generator=generator).bfloat16().float() / 8
    logits = (torch.randn(heads, generator=generator) * sinks).to(case.q.dtype)
    features = Features(softcap, slopes if alibi else None, logits if sinks else None, dropout_p, seed - 7)
    if bias:
        shape = BIASES[bias](batch, heads, case.q.shape[2], case.k.shape[2])
        drawn = (2 * torch.randn(shape, generator=generator)).to(case.q.dtype)
        wide = seed % 2 and case.q.dtype != torch.float64
        features = replace(features, bias=drawn.float() if wide else drawn)
    return replace(case, features=features)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest int, so that what is left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # The filling comes with this mode; what else it asks for is none of this suite's business.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have a deterministic implementation", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def ours(case: Case, mask: Mask, backend: str | None) -> list[torch.Tensor]:
    """out, lse and the gradients of q, k, v (and sinks) through the library, in memory that held NaN before.

    The Triton kernels run on a GPU if there is one.
    """
    if backend == "triton" and torch.cuda.is_available():
        on_gpu = ours(case.mapped(lambda x: x.cuda()), mask, None)
        return [x.cpu() for x in on_gpu]
    leaves = case.leaves()
    arguments = case.arguments(leaves)
    q, k, v = leaves[:3]
    with poisoned_memory():
        out, lse = sf.attention(q, k, v, mask, scale=case.scale, return_lse=True, backend=backend, **arguments)
        torch.autograd.backward((out, lse), (case.dout, case.dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]


def eager(case: Case, token_mask: torch.Tensor) -> list[torch.Tensor]:
    """The same through masked dense attention in the dtype of the case."""
    leaves = case.leaves()
    arguments = case.arguments(leaves)
    arguments |= {"scale": case.scale, "q_offset": case.q_offset}
    q, k, v = leaves[:3]
    out, lse = sf.reference.attention(q, k, v, token_mask, return_lse=True, **arguments)
    torch.autograd.backward((out, lse), (case.dout, case.dlse.to(lse.dtype)))
    return [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]


def largest_terms(case: Case, token_mask: torch.Tensor) -> list[float]:
    """Root of the summed squares of the terms behind any element of each result, the largest; in float64.

    One ulp of it is what rounding each term once costs, errors being independent, also where the terms cancel: a
    query with one key has dS = dP - delta = 0, and dense attention may get that 0 exactly. What a feature adds is
    rounded in fp32 whatever the dtype, so it counts `fine`, an fp32 ulp in ulps of the dtype, for each rounding.
    Rounding to the dtype itself costs half of the smallest number there is where that is more than an ulp: `low` ulps,
    which counts for fp16, whose numbers end at 6e-8 (gradual underflow: Higham 2002, chapter 2).
    """
    low = torch.finfo(case.q.dtype).tiny / 2
    fine = torch.finfo(torch.float32).eps / torch.finfo(case.q.dtype).eps
    c, f = case.to(torch.float64), case.to(torch.float64).features
    group = c.q.shape[1] // c.k.shape[1]
    k, v = c.k.repeat_interleave(group, 1), c.v.repeat_interleave(group, 1)
    scores = c.q @ k.mT * c.scale
    # exp turns an absolute error of a score, which grows with the score, into a relative one of its probability.
    score_terms = scores.abs() + (c.q.square() @ k.square().mT).sqrt() * c.scale
    softcap_grad, grad_terms = torch.ones(()).double(), torch.zeros(()).double()
    if f.softcap is not None:
        t = torch.tanh(scores / f.softcap)
        softcap_grad, scores = 1 - t.square(), f.softcap * t
        # Of softcap_grad = 1 - t^2: the argument's error, 3 fp32 ulps of t, and two roundings.
        grad_terms = 2 * t.abs() * (softcap_grad * score_terms / f.softcap + 3 * fine * t.abs()) + 2 * fine
        score_terms = softcap_grad * score_terms + 4 * fine * scores.abs()  # t and the product with the cap
    if f.alibi_slopes is not None:
        bias = f.alibi_slopes.double()[..., None, None] * distances(c).abs()
        scores = scores - bias
        score_terms = score_terms + fine * (2 * bias.abs() + scores.abs())  # unit, product, difference
    if f.bias is not None:
        bias = by_pair(c, f.bias)
        token_mask = token_mask & (bias != -torch.inf)
        bias = bias.masked_fill(bias == -torch.inf, 0)
        scores = scores + bias
        score_terms = score_terms + fine * (2 * bias.abs() + scores.abs())  # likewise
    scores = scores.masked_fill(~token_mask, -torch.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = scores.softmax(-1).nan_to_num(0)
    growth = 1 + score_terms.masked_fill(~token_mask, 0) + lse.abs().nan_to_num(0, 0)
    weight, weight_terms = torch.ones(()).double(), torch.zeros(()).double()
    more_terms = []
    if f.sinks is not None:
        gap = (lse - f.sinks[:, None, None]).masked_fill(lse == -torch.inf, -torch.inf)
        weight = gap.sigmoid()
        # Of sigmoid(gap), relative: (1 - weight) times the error of the gap, and three roundings.
        gap_terms = (p * growth).sum(-1, keepdim=True) + fine * gap.abs().nan_to_num(0, 0, 0)
        weight_terms = (1 - weight) * gap_terms + 3 * fine
    kept = torch.ones(()).double()
    if f.dropout_p:
        kept = sf.reference.dropout_mask(tuple(scores.shape), f.dropout_p, f.seed) / (1 - f.dropout_p)
        growth = growth + fine
    # The backward pass works with P of the keys alone and the cotangent weight * dout, rounded to the dtype.
    shrunk = c.dout * weight
    squares_of_shrunk = shrunk.square() if f.sinks is None else shrunk.square() + low**2
    out_terms = ((p * kept * weight * (growth + weight_terms)).square() @ v.square() + low**2).sqrt()
    out = p * kept * weight @ v
    dp = (shrunk @ v.mT) * kept
    rounded = 1 if f.sinks is None else 2
    dp_terms = dp.abs() * (1 + weight_terms) + rounded * (squares_of_shrunk @ v.square().mT).sqrt() * kept
    delta = (p * dp).sum(-1, keepdim=True) - c.dlse.unsqueeze(-1)
    delta_terms = delta.abs() + rounded * (squares_of_shrunk * (p * kept @ v).square()).sum(-1, keepdim=True).sqrt()
    delta_terms = delta_terms + weight_terms * (delta + c.dlse.unsqueeze(-1)).abs()
    ds = p * (dp_terms + delta_terms + (dp - delta).abs() * growth) * softcap_grad * c.scale
    ds = ds + p * (dp - delta).abs() * grad_terms * c.scale
    dv_terms = p * kept * (growth + weight_terms + rounded - 1)
    if f.sinks is not None:
        dot = (c.dout * out).sum(-1, keepdim=True)
        dot_terms = dot.abs() + (c.dout.square() * (out.square() + out_terms.square())).sum(-1, keepdim=True).sqrt()
        # Of sigmoid(-gap), relative: weight times the error of the gap, and three roundings.
        terms = (-gap).sigmoid() * (dot_terms + dot.abs() * (weight * gap_terms + 3 * fine))
        more_terms += [terms.square().sum((0, 2, 3))]
    if f.bias is not None:
        # An error of delta or of lse is one for all pairs of a row: those of a row that share an element add up.
        own = p * (dp_terms + (dp - delta).abs() * (growth - lse.abs().nan_to_num(0, 0)))
        of_row = p * (delta_terms + (dp - delta).abs() * lse.abs().nan_to_num(0, 0))
        more_terms += [squares_by_element(c, f.bias, own, of_row)]
    by_key_head = [
        (x.square().mT @ squares).unflatten(1, (-1, group)).sum(2)
        for x, squares in ((ds, c.q.square()), (dv_terms, squares_of_shrunk))
    ]
    squares = (out_terms.square(), growth.square(), ds.square() @ k.square(), *by_key_head, *more_terms)
    return [float((s.max() + low**2).sqrt()) if s.numel() else 0.0 for s in squares]


def squares_by_element(case: Case, bias: torch.Tensor, own: torch.Tensor, of_row: torch.Tensor) -> torch.Tensor:
    """The summed squares of terms [B, Hq, N, M] for each element of a bias; those `of_row` are added within a row."""
    if bias.dim() == 4:
        of_row = of_row.sum(3, keepdim=True) if bias.shape[3] == 1 else of_row
        return summed(own.square(), bias.shape) + summed(of_row.square(), bias.shape)
    B, H, N, M = own.shape
    index = elements(case, bias).expand(B, H, N, M)
    found = own.new_zeros(B, H, N, bias.shape[1])
    squares = found.scatter_add(3, index, own.square()) + found.scatter_add(3, index, of_row).square()
    return summed(squares.sum((0, 2)), bias.shape)


def elements(case: Case, bias: torch.Tensor) -> torch.Tensor:
    """Which element of its head's relative bias a pair takes, [N, M]."""
    reach = bias.shape[1] // 2
    return (-distances(case)).clamp(-reach, reach) + reach


def by_pair(case: Case, bias: torch.Tensor) -> torch.Tensor:
    """A bias in a shape that broadcasts to [B, Hq, N, M]."""
    return bias if bias.dim() == 4 else bias[:, elements(case, bias)]


def pairs_an_element(case: Case, token_mask: torch.Tensor) -> int:
    """At most how many visible pairs share an element of the bias."""
    assert case.features.bias is not None
    ones = token_mask.expand(*case.q.shape[:3], case.k.shape[2]).double()
    return int(squares_by_element(case, case.features.bias, ones, 0 * ones).max())


def distances(case: Case) -> torch.Tensor:
    """Query's position - key's position, [N, M]."""
    (N, M), offset = (case.q.shape[2], case.k.shape[2]), case.q_offset
    return torch.arange(N)[:, None] + (M - N if offset is None else offset) - torch.arange(M)


def check(case: Case, token_mask: torch.Tensor, results: list[Any]) -> None:
    """Error against float64 at most twice that of dense eager attention in the same dtype, plus one ulp.

    A result that is None is not looked at: not everybody's attention gives an lse.

    The ulp is one of the dtype for each term, and what accumulating n terms in fp32 adds: sqrt(n) fp32 ulps, the
    probabilistic bound of Higham and Mary (2019), "A new approach to probabilistic rounding error analysis".
    """
    dtype = case.q.dtype
    longest = max(*case.q.shape[2:], *case.v.shape[2:])
    exact, dense = eager(case.to(torch.float64), token_mask), eager(case, token_mask)
    for name, got, want, same_dtype, largest in zip(
        case.names, results, exact, dense, largest_terms(case, token_mask), strict=True
    ):
        if got is None:
            continue
        assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        if not want.numel():
            continue
        dead = want == -torch.inf
        assert torch.equal(got == -torch.inf, dead), f"{name}: rows that see nothing differ"
        terms = pairs_an_element(case, token_mask) if name == "dbias" else longest
        ulp = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * terms**0.5
        error, allowed = ((x.double() - want).masked_fill(dead, 0).abs().max() for x in (got, same_dtype))
        bound = 2 * float(allowed) + ulp * largest
        assert float(error) <= bound, f"{name}: error {float(error):.3g} above {bound:.3g} ({dtype})"
