"""Decoding: attention of a few new queries over a long cache of keys and values, and its operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch

from sparseflash.functional import transforms
from sparseflash.functional.arguments import (
    check_no_gradient,
    checked_lengths,
    parsed,
    refuse_mask,
)
from sparseflash.functional.attention import Mask
from sparseflash.functional.call import Call
from sparseflash.kernels import cpu
from sparseflash.kernels.layout import BlockLists, Score, Tiles
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.full import full
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.traced_constant import constant
from sparseflash.tables.lookup import lookup
from sparseflash.tables.table import LookupTable

# At most this many new queries per call. A block row has at least as many tokens, so they touch two block rows at most.
MOST_QUERIES = 16
# The smallest block rows: a call needs few queries of a row, but reads all its blocks.
BLOCK = (16, 128)

_library = torch.library.Library("sparseflash", "FRAGMENT")


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    lengths: torch.Tensor,
    rows: Sequence[torch.Tensor],
    tiles: Sequence[torch.Tensor],
    pattern_of: torch.Tensor,
    bq: int,
    bk: int,
    backend: str,
    *score: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    arguments = (q, k, v, lengths, BlockLists(*rows), Tiles(*tiles), pattern_of, (bq, bk), Score(*score), sinks)
    if backend == "cpu":
        with torch.autocast("cpu", enabled=False):  # the operands' dtypes have been decided
            return cpu.decode(*arguments)
    from sparseflash.kernels.triton.decode import decode as decode_kernels

    return decode_kernels(*arguments)


def _decode_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[:-1], dtype=torch.promote_types(q.dtype, torch.float32))


transforms.register(
    _library,
    "decode(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor lengths, Tensor[] rows, Tensor[] tiles, "
    "Tensor pattern_of, int bq, int bk, str backend, float scale, float? softcap, Tensor? slopes) "
    "-> (Tensor out, Tensor lse)",
    _decode,
    _decode_fake,
    transforms.constant("decode"),
)


@overload
def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *, lengths: torch.Tensor | int,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, return_lse: Literal[False] = False, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *, lengths: torch.Tensor | int,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, return_lse: Literal[True], backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
@overload
def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *, lengths: torch.Tensor | int,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, return_lse: bool, backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask = None,
    *,
    lengths: torch.Tensor | int,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of the newest queries of each sample over its cache. Reads the mask's rows at their positions only.

    Query i of sample b stands at position ``lengths[b] - n + i``. On a GPU the keys are split over many programs and
    the parts merged by lse, as in Flash-Decoding (https://pytorch.org/blog/flash-decoding/); query heads that share a
    key head read it together. The host never waits for the device, and growing lengths compile nothing: the launch
    depends on shapes alone. Inference only. :class:`sparseflash.KVCache` keeps k, v and lengths.

    Args:
        q: [B, Hq, n, D], the n newest queries of each sample, 1 to 16; dtypes as in :func:`sparseflash.attention`.
        k: [B, Hkv, M, D], a cache with room for M tokens per sample; the first ``lengths[b]`` are filled. Hq is a
            multiple of Hkv. Contiguous last dim, any other strides.
        v: [B, Hkv, M, Dv].
        mask: for M queries and M keys, with the first query at position 0: a Pattern or its text (compiled once at
            block (16, 128), and cached), a BlockMask, a LookupTable whose rows list their blocks in ascending order, or
            None for all keys in the cache.
        lengths: int32 or int64 [B] on q's device: tokens in the cache, including the n new ones. An int holds for
            all samples; in a compiled graph give a tensor, because an int would be a constant of the graph.
        scale: factor on the scores, default ``D ** -0.5``.
        softcap: see :func:`sparseflash.attention`, also for the next two.
        alibi_slopes: fp32 [Hq] or [B, Hq].
        sinks: floating [Hq].
        return_lse: also return the log-sum-exp (natural log) of each query's scores, without its sink.
        backend: "cpu" or "triton"; None chooses by the device of q.

    Returns:
        out [B, Hq, n, Dv] in q's dtype, and with ``return_lse`` also lse [B, Hq, n] in fp32 (fp64 for fp64). Keys at
        or past ``lengths[b]`` are never read, whatever the mask says. A query that sees no key, or whose position is
        outside 0 to M - 1 (an empty slot of a batch has length 0), gets 0 and -inf.

    Raises:
        TypeError: an unsupported dtype, dtypes that differ, lengths that are not ints, a scale that is not a number,
            or a mask of another type.
        ValueError: shapes, strides or devices that do not match, more than 16 queries, a mask for other lengths or
            with another offset, an int length outside n to M, or an operand that requires a gradient while gradients
            are recorded.
        NotImplementedError: a derivative in forward mode.

    Example:
        >>> import torch, sparseflash as sf
        >>> q, k, v = torch.randn(3, 2, 4, 1000, 32).unbind(0)
        >>> pattern = sf.parse("causal() & (local(100) | butterfly(unit=64))")
        >>> everything = sf.attention(q, k, v, pattern)
        >>> lengths = torch.tensor([700, 53])  # two samples of different lengths
        >>> new = torch.stack([q[0, :, 697:700], q[1, :, 50:53]])  # 3 new queries per sample
        >>> out = sf.decode(new, k, v, pattern, lengths=lengths)
        >>> torch.allclose(out[0], everything[0, :, 697:700], atol=1e-5)
        True
        >>> torch.allclose(out[1], everything[1, :, 50:53], atol=1e-5)
        True
    """
    call = Call.checked(
        q, k, v, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, backend=backend
    )  # fmt: skip
    q, k, v = call.q, call.k, call.v
    if q.shape[2] > MOST_QUERIES:
        raise ValueError(
            f"decode takes 1 to {MOST_QUERIES} new queries, got {q.shape[2]} (q {tuple(q.shape)}); "
            "sparseflash.attention takes longer stretches"
        )
    check_no_gradient(q, k, v, sinks)
    lengths = checked_lengths(lengths, q, k)
    table = _table(mask, q, k)
    if not q.shape[0]:  # mask and lengths have been checked
        out, lse = _decode_fake(q, k, v)
        return (out, lse) if return_lse else out
    out, lse = torch.ops.sparseflash.decode(
        *(q, k, v, sinks, lengths, table.rows.tensors(), table.tiles.tensors(), table.pattern_of, *table.block),
        *(call.backend, call.scale, call.softcap, alibi_slopes),
    )
    return (out, lse) if return_lse else out


def _table(mask: Mask, q: torch.Tensor, k: torch.Tensor) -> LookupTable:
    capacity = range(k.shape[2]).stop  # may be a symbol of torch.compile, and range() makes it a number
    if mask is None:
        mask = full()
    if isinstance(mask, LookupTable):
        if mask.buffer is not None and torch.compiler.is_exporting():
            raise TypeError("decode in torch.export takes a Pattern or a BlockMask, got the LookupTable of one")
        if mask.pattern_of.device != q.device:
            raise ValueError(f"the table lies on {mask.device}, q on {q.device}: sparseflash.lookup(mask, q.device)")
        table = mask
        _check_whole(table, capacity)
    elif isinstance(mask, Pattern | BlockMask):
        table = constant(mask, _cached_table, capacity, q.device)
    elif isinstance(mask, str):
        table = _table_of_text(mask, capacity, q.device)
    else:
        refuse_mask(mask)
    for size, have, what in zip(table.pattern_of.shape, q.shape[:2], ("samples", "query heads"), strict=True):
        if size not in (1, have):
            raise ValueError(f"the mask is for {size} {what}, q has {have} (shape {tuple(q.shape)})")
    return table


def _cached_table(mask: Pattern | BlockMask, capacity: int, device: torch.device) -> LookupTable:
    """The table of a mask."""
    table = lookup(mask.compile(capacity, BLOCK, q_offset=0) if isinstance(mask, Pattern) else mask, device)
    _check_whole(table, capacity)
    if torch.compiler.is_exporting():  # AOTInductor misplaces constants that are views of one buffer
        rows, tiles = (tuple(x.clone() for x in part.tensors()) for part in (table.rows, table.tiles))
        table = replace(
            table, rows=BlockLists(*rows), tiles=Tiles(*tiles), pattern_of=table.pattern_of.clone(), buffer=None
        )
    return table


def _table_of_text(text: str, capacity: int, device: torch.device) -> LookupTable:
    return _cached_table(parsed(text), capacity, device)


_table_of_text._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a constant of a compiled graph


def _check_whole(table: LookupTable, capacity: int) -> None:
    if table.shape != (capacity, capacity):
        raise ValueError(
            f"decode takes a mask of the whole sequence, for (q_len, kv_len) = {(capacity, capacity)} as k has room "
            f"for {capacity} tokens; got one for {table.shape}"
        )
    if table.q_offset != 0:
        raise ValueError(f"decode takes a mask whose first query stands at 0, got q_offset={table.q_offset}")
