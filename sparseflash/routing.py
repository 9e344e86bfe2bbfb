"""Routing by content: each block of queries chooses the blocks of keys that it reads.

Scores are those of MoBA (Lu et al. 2025, https://arxiv.org/abs/2502.13189): the product of a query and the mean key of
a block. A query reads the blocks with the highest scores and always its own block, but never blocks in the future.
Kernels read whole block rows, so here the queries of a block choose together: their score of a key block is the mean of
the queries' scores, which equals the product of the mean query and the mean key.

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

    indices: torch.Tensor  # int64 [B, H, nQ, min(k_blocks, nK)]: forced blocks first, then by score
    counts: torch.Tensor  # int64 [B, H, nQ]: how many of a row's indices to use


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

    A score is the product of the mean query of a block and the mean key of a block, in fp32 (fp64 for fp64). The mean
    of a ragged last block is over its tokens only. The host never waits for the device, and the function works in
    ``torch.compile(fullgraph=True)``. It needs memory for one score per block of the mask.

    The choice has no gradient. It is trained nevertheless, as in MoBA: attention inside the chosen blocks trains the
    projections of q and k, which also give the scores.

    Args:
        q: [B, Hq, N, D], floating.
        k: [B, Hkv, M, D], Hq a multiple of Hkv.
        k_blocks: number of key blocks that a block row reads, including those that are always read. Rows that may see
            fewer read all of them.
        block: tokens per block side, one of 16, 32, 64, 128, 256, or (BQ, BK).
        causal: query i, at position ``i + q_offset``, reads no key past its position; blocks in the future of all
            queries of a block are never chosen.
        local_blocks: always read the queries' own blocks and the ``local_blocks - 1`` blocks before them. With 0, the
            own block competes with the others, and its mean key includes keys after the query.
        sink_blocks: always read this many of the first blocks.
        q_offset: position of the first query; default ``M - N``.
        share_group: query heads that share keys make one choice, by their mean query: H = Hkv, and kernels load keys
            once for all of them. With False each query head chooses: H = Hq.
        query: "mean" scores with the mean query of a block. The blocks of an early query then depend on later queries
            of its block, which suits encoders and is usual in training, but cannot be reproduced when decoding token by
            token. "first" scores with the first query of each block: with ``local_blocks`` at least 1, no output
            depends on a later token.

    Returns:
        Indices int64 [B, H, nQ, min(k_blocks, nK)] and counts int64 [B, H, nQ]. Pass both to
        :meth:`sparseflash.LookupTable.from_indices`, with the same lengths, block, q_offset and causal and with
        ``q_heads=Hq``, as :func:`topk_table` does.

    Raises:
        TypeError: q or k are not floating tensors, or a count is not an int.
        ValueError: shapes, heads or devices that do not match, an unsupported block size, or k_blocks below the number
            of blocks that some row always reads.

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
    # Lengths may be symbols of a compiled graph; a grid needs numbers, and range() makes the graph fix them.
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
        # Infinities and NaN in the operands must not be confused with the two marks below.
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

    Arguments and errors are those of :func:`topk_blocks`.

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
    """The blocks of the mask, as numbers on the host."""

    block: tuple[int, int]  # (BQ, BK)
    blocks: tuple[int, int]  # (nQ, nK)
    q_len: int
    q_offset: int
    most_always: int  # the largest number of blocks that a row always reads


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
    """The blocks of a mask of these lengths. A compiled graph computes this once, while tracing."""
    return _places_of(make_grid(lengths, block, q_offset), causal, local_blocks, sink_blocks)


# What torch.compiler.assume_constant_result sets; calling it would import the compiler for everyone.
_places._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _marks(
    places: Places, causal: bool, local_blocks: int, sink_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which key blocks a row may read, and which of them it always reads; bool [nQ, nK]."""
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
