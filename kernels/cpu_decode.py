"""Decoding on a CPU: for each sample and block row, one matrix product over exactly the keys that its queries see.

Shape legend: H key heads whose query heads share a pattern, G of their query heads each, n new queries of a block row,
T keys that some of them see, BQ x BK tokens a block, D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.layout import FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP, Score, Side, Tiles


def decode(
    q: torch.Tensor,  # [B, Hq, n, D]
    k: torch.Tensor,  # [B, Hkv, M, D]
    v: torch.Tensor,  # [B, Hkv, M, V]
    lengths: torch.Tensor,  # int32 or int64 [B]: tokens in the cache, the n new ones included
    rows: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,  # int32 [B or 1, Hq or 1]
    block: tuple[int, int],
    score: Score,
    sinks: torch.Tensor | None,  # [Hq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, Hq, n, V] in q's dtype and lse [B, Hq, n], of the keys alone, in fp32 (fp64 for fp64 inputs).

    Query i of a sample stands at position length - n + i. One that sees nothing gets out 0 and lse -inf.
    """
    batch, q_heads, n, _ = q.shape
    kv_heads, capacity = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros((batch, q_heads, n, v.shape[-1]), dtype=wide)
    lse = q.new_full((batch, q_heads, n), -torch.inf, dtype=wide)
    queries, outs, lses = (x.unflatten(1, (kv_heads, -1)) for x in (q, out, lse))  # [B, Hkv, Hq / Hkv, n, ...]
    pattern_of = pattern_of.expand(batch, q_heads).unflatten(1, (kv_heads, -1))
    slopes = None
    if score.slopes is not None:
        slopes = score.slopes.to(wide).expand(batch, q_heads).unflatten(1, (kv_heads, -1))
    for sample, length in enumerate(lengths.tolist()):
        for pattern, heads, members in _shared(pattern_of[sample]):
            for line, first, last in _lines(length - n, length, block[0], capacity):
                keys, visible = _seen(rows, tiles, pattern, line, (first, last), min(length, capacity), block)
                if not len(keys):
                    continue
                here = slice(first - (length - n), last - (length - n))
                at = heads[:, None], members
                few = (queries[sample][at][:, :, here].to(wide) * score.scale).flatten(1, 2)  # [H, G * n, D]
                scores = few @ _taken(k[sample], heads, keys).to(wide).mT  # [H, G * n, T]
                scores = scores.unflatten(1, (len(members), -1))  # [H, G, n, T]
                if score.softcap is not None:
                    scores = scores.div_(score.softcap).tanh_().mul_(score.softcap)
                if slopes is not None:
                    distance = (torch.arange(first, last)[:, None] - keys).abs().to(wide)
                    scores.addcmul_(slopes[sample][at][..., None, None], distance, value=-1)
                scores.masked_fill_(~visible, -torch.inf)
                total = scores.logsumexp(-1, keepdim=True)  # [H, G, n, 1]
                # A query that sees none of these keys: -inf - -inf is NaN.
                p = scores.sub_(total.masked_fill(total == -torch.inf, 0)).exp_()
                value = p.flatten(1, 2) @ _taken(v[sample], heads, keys).to(wide)
                outs[sample, heads[:, None], members, here] = value.unflatten(1, (len(members), -1))
                lses[sample, heads[:, None], members, here] = total.squeeze(-1)
    if sinks is not None:
        out *= sink_logits.share(lse, sinks).unsqueeze(-1)
    return out.to(q.dtype), lse


def _shared(pattern_of: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(pattern, key heads [H], members [G]): the members of each of these heads' groups that have the pattern."""
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for head, group in enumerate(pattern_of.tolist()):
        for pattern in sorted(set(group)):
            members = tuple(i for i, p in enumerate(group) if p == pattern)
            found.setdefault((pattern, members), []).append(head)
    for (pattern, members), heads in found.items():
        yield pattern, torch.tensor(heads), torch.tensor(members)


def _lines(start: int, stop: int, height: int, capacity: int) -> Iterator[tuple[int, int, int]]:
    """(block row, first, last): the positions from start to stop that exist, by block row."""
    start, stop = max(start, 0), min(stop, capacity)
    while start < stop:
        line = start // height
        last = min(stop, (line + 1) * height)
        yield line, start, last
        start = last


def _seen(
    rows: Side,
    tiles: Tiles,
    pattern: int,
    line: int,
    positions: tuple[int, int],
    bound: int,
    block: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys below bound that some query of a block row's positions sees, ascending [T], and who sees which [n, T]."""
    bq, bk = block
    span = rows.spans[pattern, line].tolist()
    full = rows.full[span[FULL_START] : span[FULL_STOP]].long()
    full = full[full * bk < bound]  # a bidirectional row lists all blocks of the cache
    partial = rows.partial[span[PARTIAL_START] : span[PARTIAL_STOP]].long()
    tile = rows.tile[span[PARTIAL_START] : span[PARTIAL_STOP]].long()
    first, last = (position - line * bq for position in positions)
    words = tiles.bits[tile, first:last]  # [PARTIAL entries, n, W]
    bits = (words.unsqueeze(-1) >> torch.arange(min(32, bk), dtype=torch.int32)) & 1
    visible = torch.cat(
        [
            torch.ones((last - first, len(full), bk), dtype=torch.bool),
            bits.flatten(-2).bool().transpose(0, 1),
        ],
        1,
    )
    # In the order of their positions, adjacent keys make runs, and one run needs no gathering.
    blocks, order = torch.cat([full, partial]).sort()
    keys = (blocks[:, None] * bk + torch.arange(bk)).flatten()
    visible = visible[:, order].flatten(1)
    chosen = visible.any(0) & (keys < bound)
    return keys[chosen], visible[:, chosen]


def _taken(x: torch.Tensor, heads: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Tokens `keys` of some heads of x [Hkv, M, ...]; without a copy where they are all heads and one run."""
    if len(heads) < len(x):
        x = x[heads]
    first, last = int(keys[0]), int(keys[-1])
    return x[:, first : last + 1] if last - first + 1 == len(keys) else x[:, keys]
