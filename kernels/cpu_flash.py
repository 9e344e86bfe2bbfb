"""Pieces by torch's flash operator, where that is the faster way than matrix products one by one.

It is so for tall windows, and forward on a processor with matrix units (AMX) for every piece in bf16: the operator
takes less than half of its time in fp32 there, and keeps scores in fp32 between its products, which a product alone
would round. It has no public name, so a torch without it goes the other way.

Shape legend: see cpu_operands.
"""

from __future__ import annotations

import torch

from sparseflash.kernels.cpu_plan import Piece

FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward")
# Products of bf16 in hardware. A torch that cannot tell goes without.
AMX = hasattr(torch.cpu, "get_capabilities") and bool(torch.cpu.get_capabilities().get("amx_bf16"))


def suits(dtype: torch.dtype) -> bool:
    """Whether all pieces of operands of this dtype are to go to the operator, and not tall windows alone."""
    return FLASH and AMX and dtype == torch.bfloat16


def attend(
    piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n, queries, D] and lse [n, queries] of a piece, of q [n, queries, D] and k, v [n, L, D].

    Added to scores is `hidden`, 0 or -inf [R or 1, queries, L].
    """
    rows = 1 if piece.window else len(piece.rows)
    q, k, v = (x.unflatten(0, (-1, rows)) for x in (q, k, v))
    mask = None if hidden is None else hidden.unsqueeze(0)
    # A query that sees nothing: whatever it is its output is 0 and its lse -inf, which the operator calls 0.
    blind = (mask == -torch.inf).all(-1) if piece.blind and mask is not None else None
    if blind is not None:
        q = q.masked_fill(blind.unsqueeze(-1), 0)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    if blind is not None:
        lse = lse.masked_fill(blind, -torch.inf)
    return out.flatten(0, 1), lse.flatten(0, 1)


def attend_without(
    piece: Piece, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as plain products, for scores that may be infinite or NaN: added to those, -inf hides nothing."""
    rows = 1 if piece.window else len(piece.rows)
    q, k, v = (x.float().unflatten(0, (-1, rows)) for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill_(hidden == -torch.inf, -torch.inf)
    lse = scores.logsumexp(-1)
    p = scores.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_()
    return (p @ v).flatten(0, 1), lse.flatten(0, 1)


def differentiate(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV of a tall window, shaped like q [n, queries, D] and k, v [n, L, D]."""
    halves = 2 if len(q) == 1 else 1  # it shares out batches and heads among threads, not queries
    left = [x.unflatten(1, (halves, -1)).transpose(0, 1) for x in (dout, q, out, lse)]
    right = [x.expand(halves, -1, -1, -1) for x in (k, v)]
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *left[:2], *right, left[2], left[3].contiguous(), 0.0, False, scale=scale
    )
    return dq.transpose(0, 1).flatten(1, 2), dk.sum(0), dv.sum(0)
