"""The operators behind ``attention``: schemas, fakes, backends, the gradient.

A table travels as a list of tensors, a score in the order of :class:`Score`, its bias ahead with all that has a
gradient, so that compiled graphs take masks, seeds and offsets as run-time arguments. A graph may instead name a
pattern, whose table is looked up when it runs.

A plain call, which nothing traces, transforms or profiles, bypasses the dispatcher: flattening and rebuilding some
thirty arguments, twice, would be more than half of the host time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from sparseflash.functional import transforms
from sparseflash.kernels import bias as biases
from sparseflash.kernels import cpu
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.layout import BlockLists, Results, Score, Tiles
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.traced_constant import constant
from sparseflash.tables.named import name_of, named_table
from sparseflash.tables.packing import Contents
from sparseflash.tables.table import LookupTable

_library = torch.library.Library("sparseflash", "FRAGMENT")
_MASK = "Tensor[]? table, SymInt[] layout, str pattern"
_SCORE = "float scale, float? softcap, Tensor? slopes, SymInt q_offset, float dropout, Tensor? seed"
Tensors = Sequence[torch.Tensor]


class MaskArguments(NamedTuple):
    """A mask as operator arguments: the tensors of its table, one packed buffer, or the name of a pattern."""

    # Rows, columns, tiles, pattern_of; or the buffer, with or without its layout. For a named pattern: None, or the
    # lengths of a padded batch.
    table: Tensors | None
    layout: Sequence[int]  # the block size; for a buffer its layout, unless this is a tensor
    pattern: str = ""

    @classmethod
    def of(cls, table: LookupTable) -> MaskArguments:
        tensors = [*table.rows.tensors(), *table.columns.tensors(), *table.tiles.tensors(), table.pattern_of]
        return cls(tensors, table.block)

    @classmethod
    def packed(cls, table: LookupTable) -> MaskArguments:
        """For compiled graphs, which then depend on no property of the table. It is checked when they run."""
        return cls.of(table) if table.buffer is None else cls([table.buffer], table.layout)

    @classmethod
    def named(cls, pattern: Pattern, block: tuple[int, int], lengths: torch.Tensor | None = None) -> MaskArguments:
        """For compiled graphs, which look the table up when they run, for the lengths of their inputs."""
        return cls(None if lengths is None else [lengths], block, constant(pattern, name_of))


class _Operands(NamedTuple):
    """The tensors of a table that kernels take, by their names in :class:`LookupTable`."""

    rows: BlockLists
    columns: BlockLists
    tiles: Tiles
    pattern_of: torch.Tensor
    block: tuple[int, int]


def _operands(
    q: torch.Tensor, k: torch.Tensor, mask: MaskArguments, score: Score
) -> tuple[_Operands | LookupTable, Score]:
    tensors = mask.table or ()
    if mask.pattern:
        table = named_table(mask.pattern, (q.shape[2], k.shape[2]), mask.layout, q.device, *tensors)
    elif len(tensors) == 2:  # the buffer, and its layout as a tensor
        table = LookupTable.unpacked(tensors[0], tensors[1].tolist())
    elif len(tensors) > 1:
        bq, bk = mask.layout
        return _Operands(*Contents.of(tensors), (bq, bk)), score
    else:
        (buffer,) = tensors
        table = LookupTable.unpacked(buffer, mask.layout)
    table.check_fits(q, k)
    return table, score._replace(q_offset=table.q_offset)


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    table: _Operands | LookupTable,
    score: Score,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if backend == "cpu":
        with _as_decided():
            return cpu.forward(q, k, v, table.rows, table.tiles, table.pattern_of, table.block, score, sinks)
    from sparseflash.kernels.triton.forward import forward

    return forward(q, k, v, table.rows, table.tiles, table.pattern_of, table.block, score, sinks)


def _as_decided() -> AbstractContextManager[object]:
    """A context without CPU autocast, which would change the dtypes of the operands again."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else _NOTHING


_NOTHING: AbstractContextManager[object] = nullcontext()


def _backward(
    results: Results,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: _Operands | LookupTable,
    score: Score,
    backend: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dout, dlse, out, lse = results
    sides = table.rows, table.columns, table.tiles, table.pattern_of, table.block
    if backend == "cpu":
        with _as_decided():
            return cpu.backward(dout, dlse, q, k, v, out, lse, *sides, score)
    from sparseflash.kernels.triton.backward import backward

    return backward(dout, dlse, q, k, v, out, lse, *sides, score, deterministic)


def _bias_gradient(
    results: Results,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor,
    table: _Operands | LookupTable,
    score: Score,
    backend: str,
) -> torch.Tensor:
    sides = table.rows, table.columns, table.tiles, table.pattern_of, table.block
    if backend == "cpu":
        with _as_decided():
            return cpu.bias_gradient(results, q, k, v, bias, *sides, score)
    from sparseflash.kernels.triton.backward_bias import bias_gradient

    return bias_gradient(results, q, k, v, bias, *sides[1:], score)


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
    table: Tensors | None,
    layout: Sequence[int],
    pattern: str,
    backend: str,
    deterministic: bool,
    *score: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    operands = _operands(q, k, MaskArguments(table, layout, pattern), Score(*score)._replace(bias=bias))
    return _forward(q, k, v, sinks, *operands, backend)


def _attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor | None,
    table: Tensors | None,
    layout: Sequence[int],
    pattern: str,
    backend: str,
    deterministic: bool,
    *score: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    operands = _operands(q, k, MaskArguments(table, layout, pattern), Score(*score)._replace(bias=bias))
    return _backward((dout, dlse, out, lse), q, k, v, *operands, backend, deterministic)


def _attention_bias_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias: torch.Tensor,
    table: Tensors | None,
    layout: Sequence[int],
    pattern: str,
    backend: str,
    *score: Any,
) -> torch.Tensor:
    operands = _operands(q, k, MaskArguments(table, layout, pattern), Score(*score)._replace(bias=bias))
    return _bias_gradient((dout, dlse, out, lse), q, k, v, bias, *operands, backend)


def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


def _backward_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _bias_backward_fake(dout: torch.Tensor, *arguments: Any) -> torch.Tensor:
    bias: torch.Tensor = arguments[6]
    return bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, sinks, bias, table, ctx.layout, ctx.pattern, ctx.backend, ctx.deterministic, *score = inputs
    ctx.scale, ctx.softcap, slopes, ctx.q_offset, ctx.dropout, seed = score
    ctx.save_for_backward(q, k, v, *output, sinks, bias, slopes, seed, *(table or ()))


def _gradient(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, sinks, bias, slopes, seed, *table = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dsinks = dbias = None
    wants_bias = ctx.needs_input_grad[4]
    if wants_bias and biases.is_of_queries(bias):
        dbias, wants_bias = biases.of_queries(bias, dout, dlse, out, lse, sinks), False
    if sinks is not None:
        dout, dsinks = sink_logits.fold(dout, out, lse, sinks)
    given = dout, dlse, q, k, v, out, lse, bias, table or None, ctx.layout, ctx.pattern, ctx.backend
    score = ctx.scale, ctx.softcap, slopes, ctx.q_offset, ctx.dropout, seed
    dq, dk, dv = torch.ops.sparseflash.attention_backward(*given, ctx.deterministic, *score)
    if wants_bias:
        dbias = torch.ops.sparseflash.attention_bias_backward(*given, *score)
    return dq, dk, dv, dsinks, dbias


transforms.register(
    _library,
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, "
    f"{_MASK}, str backend, bool deterministic, {_SCORE}) -> (Tensor out, Tensor lse)",
    _attention,
    _attention_fake,
    transforms.differentiable("attention", 5, _save, _gradient),
)
transforms.register(
    _library,
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias, "
    f"{_MASK}, str backend, bool deterministic, {_SCORE}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _attention_backward,
    _backward_fake,
    transforms.derived("attention_backward", 8),
)
transforms.register(
    _library,
    "attention_bias_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor bias, {_MASK}, str backend, {_SCORE}) -> Tensor",
    _attention_bias_backward,
    _bias_backward_fake,
    transforms.derived("attention_bias_backward", 8),
)


class _Plain(torch.autograd.Function):
    """A plain call that records its gradient."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        # Skips the search for transforms in Function.apply; a plain call has none.
        return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None,
        bias: torch.Tensor | None, table: LookupTable, backend: str, deterministic: bool, score: Score,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        score = score._replace(bias=bias)
        out, lse = _forward(q, k, v, sinks, table, score, backend)
        ctx.set_materialize_grads(False)
        if sinks is None and bias is None and score.slopes is None and score.seed is None:
            ctx.save_for_backward(q, k, v, out, lse)
        else:
            ctx.save_for_backward(q, k, v, out, lse, sinks, bias, score.slopes, score.seed)
            score = score._replace(slopes=None, seed=None, bias=None)
        ctx.call = table, backend, deterministic, score
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
        q, k, v, out, lse, *features = ctx.saved_tensors
        table, backend, deterministic, score = ctx.call
        if dout is None:
            dout = torch.zeros_like(out)
        dsinks = dbias = None
        wants_bias = ctx.needs_input_grad[4]
        if features:
            sinks, bias, slopes, seed = features
            score = score._replace(slopes=slopes, seed=seed, bias=bias)
            if wants_bias and biases.is_of_queries(bias):
                dbias, wants_bias = biases.of_queries(bias, dout, dlse, out, lse, sinks), False
            if sinks is not None:
                dout, dsinks = sink_logits.fold(dout, out, lse, sinks)
        # If the gradient itself is recorded, the operator refuses the second derivative.
        if torch.is_grad_enabled() or not transforms.plain(q, dout, dlse):
            given = dout, dlse, q, k, v, out, lse, score.bias, *MaskArguments.of(table), backend
            dq, dk, dv = torch.ops.sparseflash.attention_backward(*given, deterministic, *score[:-1])
            if wants_bias:
                dbias = torch.ops.sparseflash.attention_bias_backward(*given, *score[:-1])
        else:
            results = dout, dlse, out, lse
            dq, dk, dv = _backward(results, q, k, v, table, score, backend, deterministic)
            if wants_bias:
                dbias = _bias_gradient(results, q, k, v, score.bias, table, score, backend)
        return dq, dk, dv, dsinks, dbias, None, None, None, None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    mask: MaskArguments | LookupTable,
    backend: str,
    deterministic: bool,
    score: Score,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse of attention; differentiable in q, k, v, sinks and bias. Nothing is checked here.

    If the mask is packed or named, its own ``q_offset`` replaces that of the score.
    """
    if isinstance(mask, LookupTable):
        bias = score.bias
        if transforms.plain(q, k, v, sinks, bias, score.slopes, score.seed, mask.pattern_of):
            if torch.is_grad_enabled() and (
                q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
                or (bias is not None and bias.requires_grad)
            ):  # fmt: skip
                score = score._replace(bias=None)  # a gradient goes to an argument of its own
                out, lse = _Plain.apply(q, k, v, sinks, bias, mask, backend, deterministic, score)
                return out, lse
            return _forward(q, k, v, sinks, mask, score, backend)
        mask = MaskArguments.of(mask)
    out, lse = torch.ops.sparseflash.attention(q, k, v, sinks, score.bias, *mask, backend, deterministic, *score[:-1])
    return out, lse
