"""Attention of a model's layer as one operator: it reads the batch's description, looks up the table, and attends.

Tables are built on the host from the contents of a batch, which a graph cannot depend on; inside an operator they are
opaque to the compiler. Eager, compiled and checkpointed models share one path, and new lengths need no recompilation.

Shape legend: B samples, Hq query heads, N new queries, M keys (the capacity of a cache), D, Dv head dims.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseflash.functional import transforms
from sparseflash.functional.attention import attention
from sparseflash.functional.decode import BLOCK as DECODE_BLOCK
from sparseflash.functional.decode import MOST_QUERIES, decode
from sparseflash.functional.operators import MaskArguments
from sparseflash.integrations.transformers.drawing import mask_of
from sparseflash.integrations.transformers.masks import Description, read
from sparseflash.integrations.transformers.sequences import Piece, within
from sparseflash.kernels import bias as biases
from sparseflash.kernels import sinks as sink_logits
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.cache_budget import MASKS, TABLES
from sparseflash.patterns.causal import causal
from sparseflash.patterns.fixed import fixed
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.local import local
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern, holds
from sparseflash.patterns.set_operations import stacked
from sparseflash.patterns.stacked import PerSample
from sparseflash.tables.lookup import lookup
from sparseflash.tables.table import LookupTable

# Masks for a growing cache are compiled for powers of two, from this number of tokens on.
SMALLEST_ROOM = 256
EVERYTHING = "full()"
BETWEEN_SAMPLES = "\x1e"  # separates the patterns of samples in a text; never in a user's text

_library = torch.library.Library("sparseflash", "FRAGMENT")
_SETTING = "Tensor mask, str pattern, int block, float scale, float? softcap, float dropout, Tensor? seed"
# Building a table reads host memory, which the replay of a CUDA graph would not repeat.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def model_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    pattern: str,
    block: int,
    scale: float,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Attention [B, Hq, N, Dv] over a pattern within the sequences of a description.

    bias: [B or 1, Hq or 1, N or 1, M or 1], added to the scores.
    """
    out: Tensor = torch.ops.sparseflash.model_attention(
        q, k, v, sinks, bias, mask, pattern, block, scale, softcap, dropout, seed if dropout else None
    )[0]
    return out


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bias: Tensor | None,
    mask: Tensor,
    pattern: str,
    block: int,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    told = read(mask, q.shape[2], k.shape[2])
    keys = told.keys(q.shape[2], k.shape[2])
    if _decodes(told, q) and not dropout and bias is None:
        table = _room(pattern, told, max(k.shape[2], SMALLEST_ROOM), q.device)
        # Keys at or past `keys` are not read, so the table may cover more keys than k has.
        fitting = dataclasses.replace(table, shape=(k.shape[2], k.shape[2]))
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):  # the operator has its own gradient
            return decode(*(q, k, v, fitting), lengths=keys, scale=scale, softcap=softcap, sinks=sinks, return_lse=True)
    table = _table(pattern, block, told, (q.shape[2], keys), q.device)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        return attention(
            *(q, k[:, :, :keys], v[:, :, :keys], table),
            scale=scale, softcap=softcap, bias=_of_keys(bias, keys), sinks=sinks, dropout_p=dropout, seed=seed,
            return_lse=True,
        )  # fmt: skip


def _backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    pattern: str,
    block: int,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, over = _over(q, k, mask, pattern, block)
    dq, dk, dv = torch.ops.sparseflash.attention_backward(
        *(dout, None, q, k[:, :, :keys], v[:, :, :keys], out, lse, _of_keys(bias, keys)),
        *(*over, False),
        *(scale, softcap, None, 0, dropout, seed),
    )
    if room := k.shape[2] - keys:
        dk, dv = (F.pad(x, (0, 0, 0, room)) for x in (dk, dv))
    return dq, dk, dv


def _bias_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor,
    mask: Tensor,
    pattern: str,
    block: int,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    keys, over = _over(q, k, mask, pattern, block)
    of_keys: Tensor = torch.ops.sparseflash.attention_bias_backward(
        *(dout, None, q, k[:, :, :keys], v[:, :, :keys], out, lse, _of_keys(bias, keys)),
        *over,
        *(scale, softcap, None, 0, dropout, seed),
    )
    return F.pad(of_keys, (0, bias.shape[3] - of_keys.shape[3]))


def _over(q: Tensor, k: Tensor, mask: Tensor, pattern: str, block: int) -> tuple[int, tuple[Any, ...]]:
    """The number of keys, and the table of the mask and the backend as arguments of the gradient operators."""
    told = read(mask, q.shape[2], k.shape[2])
    keys = told.keys(q.shape[2], k.shape[2])
    table = _table(pattern, block, told, (q.shape[2], keys), q.device)
    return keys, (*MaskArguments.of(table), "cpu" if q.device.type == "cpu" else "triton")


def _of_keys(bias: Tensor | None, keys: int) -> Tensor | None:
    """The bias of the first ``keys`` keys: a cache may have room for more."""
    return bias if bias is None or bias.shape[3] == 1 else bias[..., :keys]


def _decodes(told: Description, q: Tensor) -> bool:
    """Whether this is decoding: few new queries and a cache, and every sample ends with the newest token."""
    keys = told.first_query + q.shape[2]
    if told.drawn or not told.causal:
        return False
    return q.shape[2] <= MOST_QUERIES and told.first_query > 0 and all(p and p[-1][1] == keys for p in told.samples)


@TABLES.bounds
@lru_cache(maxsize=64)
def _table(pattern: str, block: int, told: Description, shape: tuple[int, int], device: torch.device) -> LookupTable:
    return lookup(compiled(pattern, told, shape, block, told.first_query), device)


def _room(pattern: str, told: Description, tokens: int, device: torch.device) -> LookupTable:
    """The table for decoding with a cache of ``tokens``, rounded up to a power of two; sequences extend to its end."""
    room = 1 << (tokens - 1).bit_length()
    keys = max(pieces[-1][1] for pieces in told.samples)
    samples = tuple(
        tuple((start, room if stop == keys else stop, origin) for start, stop, origin in pieces)
        for pieces in told.samples
    )
    # Any first query but 0: its position grows with every token, and the table does not depend on it.
    return _cached_room(pattern, dataclasses.replace(told, first_query=1, samples=samples), room, device)


@TABLES.bounds
@lru_cache(maxsize=64)
def _cached_room(pattern: str, told: Description, room: int, device: torch.device) -> LookupTable:
    return lookup(compiled(pattern, told, (room, room), DECODE_BLOCK, 0), device)


def compiled(
    text: str, told: Description, shape: tuple[int, int], block: int | tuple[int, int], q_offset: int
) -> BlockMask:
    """The mask of a batch: the pattern, restricted to what the model allows, within each sequence separately.

    Raises:
        ValueError: a pattern that depends on the length, with a cache or in cross-attention; unmarked cross-attention.
    """
    patterns = [checked(one) for one in text.split(BETWEEN_SAMPLES)]
    if told.crossing and any(map(_depends_on_length, patterns)):
        raise ValueError(
            f"the pattern {text} of cross-attention depends on the length, which changes as the decoder generates: "
            "use a pattern without random_blocks and beside(..., after=)"
        )
    if told.first_query and any(map(_depends_on_length, patterns)):
        raise ValueError(
            f"the pattern {text} depends on the length, which changes as a cache grows; "
            "call the model with use_cache=False, or use a pattern without random_blocks"
        )
    if (
        not (told.causal or told.drawn or told.crossing)
        and told.first_query + shape[0] != shape[1]
        and text != EVERYTHING
    ):
        raise ValueError(
            f"a pattern applies to the tokens of one sequence, but here {shape[0]} queries attend to {shape[1]} keys "
            "of another one, in a module that is not marked as cross-attention: call use_pattern(model, ...), which "
            "marks such modules"
        )
    if told.causal:
        patterns = [pattern & causal() for pattern in patterns]
    if told.chunk is not None:
        patterns = [pattern & fixed(told.chunk, summary=0) for pattern in patterns]
    if told.window is not None:
        patterns = [pattern & local(told.window - told.causal) for pattern in patterns]
    samples = told.samples
    if len(patterns) == 1 or len(samples) == 1:
        patterns, samples = patterns * len(samples), samples * len(patterns)
    offsets = [q_offset] * len(samples)
    if told.crossing:  # keys are counted from their first token, which may follow padding
        firsts = [pieces[0][2] if pieces else 0 for pieces in samples]
        offsets = [query + key for query, key in zip(told.crossing, firsts, strict=True)]
    masks = [
        _of_sample(pattern, pieces, shape, block, offset)
        for pattern, pieces, offset in zip(patterns, samples, offsets, strict=True)
    ]
    mask = BlockMask.of(stacked(masks, axis=0))
    if not told.drawn:
        return mask
    return mask & BlockMask.of(stacked([mask_of(heads, shape, block, q_offset) for heads in told.drawn], axis=0))


# Batches differ, but the lengths of their samples recur.
@MASKS.bounds
@lru_cache(maxsize=512)
def _of_sample(
    pattern: Pattern, pieces: tuple[Piece, ...], shape: tuple[int, int], block: int | tuple[int, int], q_offset: int
) -> BlockMask:
    return within(pattern, pieces, shape[1]).compile(shape, block, q_offset)


@lru_cache(maxsize=128)
def checked(text: str) -> Pattern:
    """Parse a pattern that applies to every batch.

    Raises:
        TypeError: not a text.
        ValueError: a text that is not a pattern, or a pattern per sample.
    """
    pattern = parse(text)
    if holds(pattern, PerSample):
        raise ValueError(f"{text}: a model's pattern applies to every batch, so it cannot be per sample")
    return pattern


def _depends_on_length(pattern: Pattern) -> bool:
    short, long = (Grid(n, n, 128, 128, 0) for n in (1 << 10, 1 << 14))
    return pattern.at(short) != pattern.at(long)


def _save(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, bias, mask, *ctx.setting, seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, sinks, bias, mask, seed)


def _gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sinks, bias, mask, seed = ctx.saved_tensors
    dsinks = dbias = None
    if dout is None:
        return (None,) * 5
    wants_bias = ctx.needs_input_grad[4]
    if wants_bias and biases.is_of_queries(bias):
        dbias, wants_bias = biases.of_queries(bias, dout, None, out, lse, sinks), False
    if sinks is not None:
        dout, dsinks = sink_logits.fold(dout, out, lse, sinks)
    given = dout, q, k, v, out, lse, bias, mask, *ctx.setting, seed
    dq, dk, dv = torch.ops.sparseflash.model_attention_backward(*given)
    if wants_bias:
        dbias = torch.ops.sparseflash.model_attention_bias_backward(*given)
    return dq, dk, dv, dsinks, dbias


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), lse


def _backward_fake(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _bias_backward_fake(dout: Tensor, *arguments: Any) -> Tensor:
    bias: Tensor = arguments[5]
    return bias.new_empty(bias.shape)


transforms.register(
    _library,
    f"model_attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, {_SETTING}) "
    "-> (Tensor out, Tensor lse)",
    _forward,
    _forward_fake,
    transforms.differentiable("model_attention", 5, _save, _gradient),
    _TAGS,
)
transforms.register(
    _library,
    "model_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? bias, "
    f"{_SETTING}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _backward,
    _backward_fake,
    transforms.derived("model_attention_backward", 7),
    _TAGS,
)
transforms.register(
    _library,
    "model_attention_bias_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bias, "
    f"{_SETTING}) -> Tensor",
    _bias_backward,
    _bias_backward_fake,
    transforms.derived("model_attention_bias_backward", 7),
    _TAGS,
)
