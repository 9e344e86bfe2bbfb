"""Whether a contender computes what the mask says, at lengths where no dense mask fits.

Some queries are drawn. Their outputs, lse and dQ are compared with masked dense attention of these queries alone; and
since the cotangent is zero for all others, so are the whole of dK and dV. The law and its tolerance are those of
`tests/oracle.py`: at most twice the error of dense attention in the same dtype, against float64.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.gpu.contenders import Attend
from sparseflash.patterns import Pattern
from sparseflash.patterns.grid import make_grid
from sparseflash.tools.timing import reason
from tests.oracle import Case, check

PAIRS = 1 << 22  # that are asked of a pattern at once


def drawn_rows(seq_len: int, count: int, seed: int = 0) -> torch.Tensor:
    """Query positions in ascending order: the first, the last, and others at random; int64 [count or seq_len]."""
    others = np.random.default_rng(seed).permutation(np.arange(1, max(seq_len - 1, 1)))[: max(count - 2, 0)]
    return torch.from_numpy(np.unique([0, *others, seq_len - 1]))


def rows_of(pattern: Pattern, rows: torch.Tensor, seq_len: int) -> torch.Tensor:
    """The token mask of some queries, bool [rows, seq_len], from the pattern's own truth and not from its table."""
    at = pattern.at(make_grid(seq_len, 128, None))
    step = max(PAIRS // seq_len, 1)
    keys = np.arange(seq_len)
    parts = [at.allows(part.numpy()[:, None], keys) for part in rows.split(step)]
    return torch.from_numpy(np.concatenate([np.broadcast_to(part, (len(part), seq_len)) for part in parts]))


def disagreement(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    rows: torch.Tensor,
    token_mask: torch.Tensor,
    key_heads: int = 1,
) -> str | None:
    """What is wrong with a contender, or None.

    Args:
        attend: the contender.
        q: [B, Hq, N, D], as it is timed with.
        k: [B, Hkv, N, D].
        v: [B, Hkv, N, D].
        dout: [B, Hq, N, D], of which the compared queries' part is used.
        rows: the queries that are compared.
        token_mask: bool [rows, N] for these.
        key_heads: key heads of the last sample that are compared, with all their query heads: the last ones, whose
            addresses are the largest.
    """
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    rows, token_mask = rows.to(q.device), token_mask.to(q.device)
    cotangent = torch.zeros_like(dout)
    cotangent[:, :, rows] = dout[:, :, rows]
    try:
        result = attend(q, k, v)
        out, lse = result if isinstance(result, tuple) else (result, None)
        gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    except Exception as error:
        return reason(error)
    group = q.shape[1] // k.shape[1]
    key_heads = min(key_heads, k.shape[1])

    def some(x: torch.Tensor, heads: int, picked: bool) -> torch.Tensor:
        x = x.detach()[-1:, -heads:]
        return x[:, :, rows] if picked else x

    query_heads = key_heads * group
    with torch.no_grad():
        case = Case(
            some(q, query_heads, True), some(k, key_heads, False), some(v, key_heads, False),
            some(dout, query_heads, True), torch.zeros(1, query_heads, len(rows), device=q.device), q.shape[-1] ** -0.5,
        )  # fmt: skip
        results = [
            some(out, query_heads, True),
            None if lse is None else some(lse, query_heads, True),
            some(gradients[0], query_heads, True),
            *(some(gradient, key_heads, False) for gradient in gradients[1:]),
        ]
    try:
        check(case, token_mask, results)
    except AssertionError as error:
        return str(error).partition("\n")[0]
    rest = gradients[0].detach()[-1:, -query_heads:].abs().amax((0, 1, 3))
    rest[rows] = 0
    return "dq: a query without a cotangent has a gradient" if float(rest.max()) != 0 else None
