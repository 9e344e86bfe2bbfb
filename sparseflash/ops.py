"""The operators behind ``attention``, registered with torch.library: schemas, fakes, backends, autograd.

A table travels as lists of tensors in the order of :class:`Side` and :class:`Tiles`, a score in the order of
:class:`Score`, so that compiled graphs take masks, seeds and offsets as run-time arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparseflash.kernels import cpu
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.layout import Score, Side, Tiles

BACKENDS = ("cpu", "triton")

_library = torch.library.Library("sparseflash", "FRAGMENT")
_TABLE = "Tensor[] rows, Tensor[] columns, Tensor[] tiles, Tensor pattern_of, int bq, int bk"
_SCORE = "float scale, float? softcap, Tensor? slopes, SymInt q_offset, float dropout, Tensor? seed"
_library.define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, {_TABLE}, str backend, {_SCORE}) "
    "-> (Tensor out, Tensor lse)"
)
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TABLE}, str backend, {_SCORE}) -> (Tensor dq, Tensor dk, Tensor dv)"
)

Tensors = Sequence[torch.Tensor]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    rows: Tensors,
    columns: Tensors,
    tiles: Tensors,
    pattern_of: torch.Tensor,
    bq: int,
    bk: int,
    backend: str,
    *score: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (q, k, v, Side(*rows), Tiles(*tiles), pattern_of, (bq, bk), Score(*score), sinks)
    if backend == "cpu":
        with torch.autocast("cpu", enabled=False):  # the operands' dtypes have been decided
            return cpu.forward(*arguments)
    from sparseflash.kernels import triton_forward

    return triton_forward.forward(*arguments)


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: Tensors,
    columns: Tensors,
    tiles: Tensors,
    pattern_of: torch.Tensor,
    bq: int,
    bk: int,
    backend: str,
    *score: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = (
        *(dout, dlse, q, k, v, out, lse),
        *(Side(*rows), Side(*columns), Tiles(*tiles), pattern_of, (bq, bk), Score(*score)),
    )
    if backend == "cpu":
        with torch.autocast("cpu", enabled=False):
            return cpu.backward(*arguments)
    from sparseflash.kernels import triton_backward

    return triton_backward.backward(*arguments)


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, rows, columns, tiles, pattern_of, *rest, slopes, ctx.q_offset, ctx.dropout, seed = inputs
    ctx.rest = rest  # block, backend, scale, softcap
    ctx.lengths = len(rows), len(columns), len(tiles)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, sinks, slopes, seed, *rows, *columns, *tiles, pattern_of)


def _autograd(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks, slopes, seed, *table, pattern_of = ctx.saved_tensors
    rows, columns = ctx.lengths[0], ctx.lengths[0] + ctx.lengths[1]
    if dout is None:
        dout = torch.zeros_like(out)
    dsinks = None
    if sinks is not None:
        dout, dsinks = sink_logits.fold(dout, out, lse, sinks)
    dq, dk, dv = torch.ops.sparseflash.attention_backward(
        *(dout, dlse, q, k, v, out, lse),
        *(table[:rows], table[rows:columns], table[columns:], pattern_of),
        *(*ctx.rest, slopes, ctx.q_offset, ctx.dropout, seed),
    )
    none = [[None] * n for n in ctx.lengths]
    return dq, dk, dv, dsinks, *none, *[None] * (1 + len(ctx.rest) + 4)


def _no_second_derivative(ctx: Any, *cotangents: Any) -> Any:
    raise NotImplementedError("sparseflash attention has no second derivative: its gradient cannot be differentiated")


def _no_vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
    raise NotImplementedError("sparseflash attention has no vmap: fold the mapped dim into batch or heads")


for _name, _function in (("attention", _attention), ("attention_backward", _attention_backward)):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _function, _key)
    torch.library.register_vmap(f"sparseflash::{_name}", _no_vmap, lib=_library)
torch.library.register_fake("sparseflash::attention", _attention_fake, lib=_library)
torch.library.register_fake("sparseflash::attention_backward", _backward_fake, lib=_library)
torch.library.register_autograd("sparseflash::attention", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("sparseflash::attention_backward", _no_second_derivative, lib=_library)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    rows: Side,
    columns: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    backend: str,
    score: Score,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of attention over a table; differentiable in q, k, v and sinks. Nothing is checked here."""
    out, lse = torch.ops.sparseflash.attention(
        q, k, v, sinks, list(rows), list(columns), list(tiles), pattern_of, *block, backend, *score
    )
    return out, lse
