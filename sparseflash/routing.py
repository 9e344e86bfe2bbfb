"""Routing by content: each block of queries picks the blocks of keys that it reads.

The scores are those of MoBA (Lu et al. 2025, https://arxiv.org/abs/2502.13189): the product of a query and the mean
key of a block; the best blocks are read, the query's own is always among them, blocks in the future never. Kernels
read whole block rows, so here the queries of one block choose together: their score of a key block is the mean of
their own scores, which is the product of the mean query and the mean key.

Shape legend: B samples, H heads that choose, nQ x nK blocks of BQ x BK tokens.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch

from sparseflash.functional.arguments import check_size
from sparseflash.functional.operands import check_queries_and_keys
from sparseflash.patterns.grid import Grid, make_grid
from sparseflash.tables.table import LookupTable


class Selection(NamedTuple):
    """The key blocks that each block row reads, as :meth:`sparseflash.LookupTable.from_indices` takes them."""

    indices: torch.Tensor  # int64 [B, H, nQ, min(k_blocks, nK)]: the best first, after those that are always read
    counts: torch.Tensor  # int64 [B, H, nQ]: so many of a row's indices are meant


def topk_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    k_blocks: int,
    *,
    block: int | tuple[int, int] = 128,
    causal: bool = True,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    q_offset: int | None = None,
    share_group: bool = True,
    query: Literal["mean", "first"] = "mean",
) -> Selection:
    """The key blocks with the highest scores for each block of queries.

    A score is the product of the mean query of a block and the mean key of a block, in fp32 (fp64 for fp64); a ragged
    last block is averaged over the tokens that it has. Nothing waits for the device, and it works in
    ``torch.compile(fullgraph=True)``. Memory is that of the scores, one number for each block of the mask.

    The choice has no gradient. It is trained all the same, as in MoBA: attention inside the chosen blocks trains the
    projections of q and k, of which the scores are made.

    Args:
        q: [B, Hq, N, D], floating.
        k: [B, Hkv, M, D], Hq a multiple of Hkv.
        k_blocks: how many key blocks a block row reads, those that are always read among them. Rows that may see
            fewer read all they may.
        block: tokens a block side from 16, 32, 64, 128, 256, or (BQ, BK).
        causal: query i, at position ``i + q_offset``, reads no key past its position; blocks that lie in the future
            of all queries of a block are never chosen.
        local_blocks: always read the blocks in which the queries stand, and ``local_blocks - 1`` before them. With 0,
            a query's own block competes with the others, by a mean that knows its later keys.
        sink_blocks: always read so many of the first blocks.
        q_offset: position of the first query; default ``M - N``.
        share_group: one choice for the query heads that share keys, by their mean query: H = Hkv, and kernels load
            keys once for all of them. False lets each query head choose: H = Hq.
        query: "mean" scores with the mean query of a block, so that an early query's blocks depend on the later
            queries of its block: fine for encoders and usual in training, but decoding token by token cannot repeat
            it. "first" scores with the first query of each block: with ``local_blocks`` at least 1, no output
            depends on any later token.

    Returns:
        Indices int64 [B, H, nQ, min(k_blocks, nK)] and counts int64 [B, H, nQ]. Give both to
        :meth:`sparseflash.LookupTable.from_indices`, with equal lengths, block, q_offset and causal and with
        ``q_heads=Hq``; :func:`topk_table` does.

    Raises:
        TypeError: q or k are no floating tensors, numbers that are no ints.
        ValueError: shapes, heads or devices that do not fit each other, a block of another size, k_blocks below the
            blocks that some row always reads.

    Example:
        >>> import torch, sparseflash as sf
        >>> q, k, v = torch.randn(3, 1, 4, 1024, 32).unbind(0)
        >>> indices, counts = sf.routing.topk_blocks(q, k, 3, block=128)
        >>> indices.shape, counts[0, 0].tolist()
        (torch.Size([1, 4, 8, 3]), [1, 2, 3, 3, 3, 3, 3, 3])
        >>> table = sf.LookupTable.from_indices(indices, counts, shape=1024, block=128, causal=True)
        >>> sf.attention(q, k, v, table).shape
        torch.Size([1, 4, 1024, 32])
    """
    check_queries_and_keys(q, k)
    if not q.shape[0]:
        raise ValueError(f"q must have at least one sample to choose blocks for, got q {tuple(q.shape)}")
    for name, number, least in (("k_blocks", k_blocks, 1), ("local_blocks", local_blocks, 0),
                                ("sink_blocks", sink_blocks, 0)):  # fmt: skip
        check_size(name, number, least)
    if query not in ("mean", "first"):
        raise ValueError(f"query must be 'mean' or 'first', got {query!r}")
    # Lengths may be symbols of a compiled graph; a grid belongs to numbers, and range() decides on them.
    lengths = range(q.shape[2]).stop, range(k.shape[2]).stop
    places = _places(lengths, block, q_offset, bool(causal), local_blocks, sink_blocks)
    k_blocks = min(k_blocks, places.blocks[1])
    if places.most_always > k_blocks:
        bq, bk = places.block
        raise ValueError(
            f"k_blocks={k_blocks} is below the {places.most_always} blocks that some row always reads "
            f"(local_blocks={local_blocks}, sink_blocks={sink_blocks}, blocks of {bq} x {bk}, "
            f"q_offset={places.q_offset}); raise k_blocks"
        )
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        scores = _scores(q, k, places.block, share_group, query)
        visible, always = _marks(places, bool(causal), local_blocks, sink_blocks, q.device)
        # Infinities and NaN of broken operands must not pass for the two marks below.
        finite = torch.finfo(scores.dtype)
        scores = scores.nan_to_num(nan=finite.min, posinf=finite.max, neginf=finite.min)
        scores = scores.masked_fill(always, torch.inf).masked_fill(~visible, -torch.inf)
        indices = scores.topk(k_blocks, dim=-1).indices
        counts = visible.sum(-1).clamp(max=k_blocks).expand(indices.shape[:3])
    return Selection(indices, counts)


def topk_table(
    q: torch.Tensor,
    k: torch.Tensor,
    k_blocks: int,
    *,
    block: int | tuple[int, int] = 128,
    causal: bool = True,
    local_blocks: int = 1,
    sink_blocks: int = 0,
    q_offset: int | None = None,
    share_group: bool = True,
    query: Literal["mean", "first"] = "mean",
) -> LookupTable:
    """The lookup table of the key blocks with the highest scores, for :func:`sparseflash.attention`.

    Args and errors are those of :func:`topk_blocks`.

    Example:
        >>> import torch, sparseflash as sf
        >>> q, k, v = torch.randn(2, 8, 1000, 32), torch.randn(2, 2, 1000, 32), torch.randn(2, 2, 1000, 32)
        >>> table = sf.routing.topk_table(q, k, 4, block=64, sink_blocks=1)
        >>> sf.attention(q, k, v, table).shape
        torch.Size([2, 8, 1000, 32])
    """
    indices, counts = topk_blocks(
        q, k, k_blocks, block=block, causal=causal, local_blocks=local_blocks, sink_blocks=sink_blocks,
        q_offset=q_offset, share_group=share_group, query=query,
    )  # fmt: skip
    return LookupTable.from_indices(
        indices, counts, shape=(q.shape[2], k.shape[2]), block=block, q_offset=q_offset, q_heads=q.shape[1],
        causal=causal,
    )  # fmt: skip


class Places(NamedTuple):
    """Where the blocks lie, in numbers of the host."""

    block: tuple[int, int]  # (BQ, BK)
    blocks: tuple[int, int]  # (nQ, nK)
    q_len: int
    q_offset: int
    most_always: int  # how many blocks the row reads that always reads the most


@lru_cache(maxsize=256)
def _places_of(grid: Grid, causal: bool, local_blocks: int, sink_blocks: int) -> Places:
    nq, nk = grid.shape
    first = grid.all_rows() * grid.bq
    last = np.minimum(first + grid.bq, grid.q_len) - 1
    own, end = (first + grid.q_offset) // grid.bk, (last + grid.q_offset) // grid.bk + 1
    end = np.clip(end, 0, nk)
    start = np.clip(own - local_blocks + 1, 0, end) if local_blocks else end
    sinks = np.minimum(sink_blocks, end if causal else nk)
    always = end - start + sinks - np.clip(np.minimum(end, sinks) - start, 0, None)
    return Places((grid.bq, grid.bk), (nq, nk), grid.q_len, grid.q_offset, int(always.max()))


def _places(
    lengths: tuple[int, int],
    block: int | tuple[int, int],
    q_offset: int | None,
    causal: bool,
    local_blocks: int,
    sink_blocks: int,
) -> Places:
    """In a compiled graph this is computed once, while tracing."""
    return _places_of(make_grid(lengths, block, q_offset), causal, local_blocks, sink_blocks)


# What torch.compiler.assume_constant_result sets; calling it would import the compiler for everyone.
_places._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _marks(
    places: Places, causal: bool, local_blocks: int, sink_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key blocks a row may read, and which it always reads if it may; bool [nQ, nK]."""
    (bq, bk), (nq, nk) = places.block, places.blocks
    first = torch.arange(nq, device=device)[:, None] * bq
    last = (first + bq).clamp(max=places.q_len) - 1
    first, last = ((x + places.q_offset).div(bk, rounding_mode="floor") for x in (first, last))
    column = torch.arange(nk, device=device)
    visible = column <= last if causal else torch.ones(nq, nk, dtype=torch.bool, device=device)
    always = (column < sink_blocks).expand(nq, nk)
    if local_blocks:
        always = always | ((column > first - local_blocks) & (column <= last))
    return visible, always


def _scores(q: torch.Tensor, k: torch.Tensor, block: tuple[int, int], share_group: bool, query: str) -> torch.Tensor:
    """Scores [B, H, nQ, nK]."""
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
    queries = q[:, :, :: block[0]].to(dtype) if query == "first" else _means(q, block[0], dtype)
    keys = _means(k, block[1], dtype)
    queries = queries.unflatten(1, (k.shape[1], -1))  # [B, Hkv, group, nQ, D]
    if share_group:
        queries = queries.mean(2, keepdim=True)
    return torch.matmul(queries, keys[:, :, None].mT).flatten(1, 2)


def _means(x: torch.Tensor, block: int, dtype: torch.dtype) -> torch.Tensor:
    """Mean token of each block, [B, H, tokens, D] -> [B, H, blocks, D]."""
    whole = x.shape[2] // block * block
    parts = [x[:, :, :whole].unflatten(2, (-1, block)).mean(3, dtype=dtype)] if whole else []
    if whole < x.shape[2]:
        parts.append(x[:, :, whole:].mean(2, keepdim=True, dtype=dtype))
    return torch.cat(parts, 2)
