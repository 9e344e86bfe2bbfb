"""Attention over lookup tables on a CPU, forward and backward: with torch's flash kernel or batched matrix products.

Scores that take nothing but a scale go to `cpu_fused`. Here is what softcap, ALiBi and dropout need: block rows with
equally many blocks are taken together, and their key blocks are gathered, multiplied and reduced as one batch, a few
megabytes at a time. Long rows are walked in several steps with an online softmax.

Shape legend: H query heads of all samples that share a pattern, R block rows, E entries (key blocks) a row in this
step, BQ x BK tokens a block, D head dim of q and k, V head dim of v.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from sparseflash.kernels import cpu_fused
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.cpu_score import Shaping
from sparseflash.kernels.layout import FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP, Score, Side, Tiles

# Scores held at once. 1 M fp32 scores are 4 MB, which two cores' caches hold together with the operands.
SCORES_AT_ONCE = 1 << 20
# Up to this many tiles are unpacked once a call (a byte a bit) rather than each time they are met.
TILES_UNPACKED = 256


@dataclass(frozen=True)
class _Step:
    """Entries of R equally long rows of one pattern, for some of the heads that share it."""

    heads: torch.Tensor  # int64 [H] flat (sample, query head)
    kv_heads: torch.Tensor  # int64 [H] flat (sample, key head)
    rows: torch.Tensor  # int64 [R] block rows
    cols: torch.Tensor  # int64 [R, E] key blocks
    tiles: torch.Tensor  # int64 [R, the last of the E entries]: the tiles of those that are PARTIAL


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    score: Score,
    sinks: torch.Tensor | None = None,  # [Hq]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32 (fp64 for fp64 inputs)."""
    if _fused(score):
        out, lse = cpu_fused.forward(q, k, v, rows, tiles, pattern_of, block, score.scale)
        if sinks is not None:
            out *= sink_logits.share(lse, sinks).unsqueeze(-1)
        return out, lse
    operands = _Operands(q, k, v, block, score.scale)
    shaping = Shaping(score, operands.batch, operands.q_heads, block)
    masks = _Masks(tiles, block, clean=not operands.finite)
    qb, kb, vb = operands.q, operands.k, operands.v
    out = qb.new_zeros(*qb.shape[:-1], v.shape[-1])
    lse = qb.new_full(qb.shape[:-1], -torch.inf)
    for steps in _walk(operands, rows, pattern_of):
        peak: torch.Tensor | None = None
        for step in steps:
            keys, values = kb[step.kv_heads[:, None, None], step.cols], vb[step.kv_heads[:, None, None], step.cols]
            masks.clean(step, keys, values)
            here = step.heads, step.rows, step.cols
            scores, _ = shaping.scores(_scores(qb[step.heads[:, None], step.rows], keys), *here)
            masks.hide(step, scores)
            top = scores.amax(-1, keepdim=True)
            new = top if peak is None else torch.maximum(peak, top)
            # A row that has seen nothing yet has a peak of -inf; 0 in its place keeps exp(-inf - peak) at 0.
            shift = torch.where(new == -torch.inf, 0, new)
            p = scores.sub_(shift).exp_()
            total_here = p.sum(-1, keepdim=True)
            if (dropped := shaping.dropped(*here)) is not None:
                p.masked_fill_(dropped, 0)
            out_here = p @ values.flatten(2, 3)
            if peak is None:
                total, acc = total_here, out_here
            else:
                keep = torch.exp(peak - shift)
                total, acc = total * keep + total_here, acc * keep + out_here
            peak = new
        assert peak is not None
        at = step.heads[:, None], step.rows
        out[at] = acc / torch.where(total == 0, 1, total)
        lse[at] = (torch.where(peak == -torch.inf, 0, peak) + total.log()).squeeze(-1)
    out, lse = operands.queries(out), operands.queries(lse)
    if score.seed is not None:
        out *= shaping.retained
    if sinks is not None:
        out *= sink_logits.share(lse, sinks).unsqueeze(-1)
    return out.to(q.dtype), lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: Side,
    columns: Side,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
    score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v (without sinks) in their dtypes. Walks the rows alone: one pass serves all three."""
    if _fused(score):
        return cpu_fused.backward(dout, dlse, q, k, v, out, lse, rows, tiles, pattern_of, block, score.scale)
    operands = _Operands(q, k, v, block, score.scale)
    shaping = Shaping(score, operands.batch, operands.q_heads, block)
    masks = _Masks(tiles, block, clean=not operands.finite)
    qb, kb, vb = operands.q, operands.k, operands.v
    wide = qb.dtype
    dead = lse == -torch.inf
    # Whatever cotangents rows that see nothing get, their gradients are 0: +inf makes their exp(score - lse) 0.
    dout, lse = dout.masked_fill(dead.unsqueeze(-1), 0), lse.masked_fill(dead, torch.inf)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(wide).masked_fill(dead, 0)
    dob = operands.blocks(dout, block[0])
    delta_b, lse_b = (operands.blocks(x.unsqueeze(-1), block[0]) for x in (delta, lse))
    dq, dk, dv = (x.new_zeros(x.shape) for x in (qb, kb, vb))  # contiguous, whatever the layout of x
    for steps in _walk(operands, rows, pattern_of):
        for step in steps:
            at = step.heads[:, None], step.rows
            keys, values = kb[step.kv_heads[:, None, None], step.cols], vb[step.kv_heads[:, None, None], step.cols]
            masks.clean(step, keys, values)
            queries, grads = qb[at], dob[at]
            here = step.heads, step.rows, step.cols
            scores, bend = shaping.scores(_scores(queries, keys), *here, bent=True)
            masks.hide(step, scores)
            p = scores.sub_(lse_b[at]).exp_()
            dp = _scores(grads, values)
            dropped = shaping.dropped(*here)
            if dropped is not None:
                dp.masked_fill_(dropped, 0).mul_(shaping.retained)
            ds = dp.sub_(delta_b[at]).mul_(p)
            if bend is not None:
                ds *= bend
            if dropped is not None:
                p.masked_fill_(dropped, 0)
            dq[at] += ds @ keys.flatten(2, 3)
            _add_blocks(dk, step, ds.mT @ queries)
            _add_blocks(dv, step, p.mT @ grads)
    # q was scaled when it was laid out in blocks: dq lacks the factor, dk has it.
    dq *= score.scale
    if score.seed is not None:
        dv *= shaping.retained
    return operands.queries(dq).to(q.dtype), operands.keys(dk).to(k.dtype), operands.keys(dv).to(v.dtype)


def _fused(score: Score) -> bool:
    """Whether torch's own kernel can do it."""
    return cpu_fused.AVAILABLE and not score.featured


class _Operands:
    """q (scaled), k and v as [heads, blocks, block, dim], padded to whole blocks; half precision as fp32."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: tuple[int, int], scale: float) -> None:
        self.batch, self.q_heads, self.q_len, _ = q.shape
        self.kv_heads, self.kv_len = k.shape[1:3]
        self.block = block
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.q = self.blocks(q, block[0]) * scale
        self.k, self.v = self.blocks(k, block[1]), self.blocks(v, block[1])
        self.finite = bool(torch.isfinite(self.k.sum()) & torch.isfinite(self.v.sum()))

    def blocks(self, x: torch.Tensor, size: int) -> torch.Tensor:
        x = x.to(self.dtype)
        spare = -x.shape[2] % size
        x = F.pad(x, (0, 0, 0, spare)) if spare else x
        return x.reshape(x.shape[0] * x.shape[1], -1, size, x.shape[3])

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Back from [B * Hq, nQ, BQ, ...] to [B, Hq, N, ...]."""
        return x.reshape(self.batch, self.q_heads, -1, *x.shape[3:])[:, :, : self.q_len].contiguous()

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Back from [B * Hkv, nK, BK, ...] to [B, Hkv, M, ...]."""
        return x.reshape(self.batch, self.kv_heads, -1, *x.shape[3:])[:, :, : self.kv_len].contiguous()


class _Masks:
    """What PARTIAL blocks hide: scores by their tile, and keys that no query of the block sees."""

    def __init__(self, tiles: Tiles, block: tuple[int, int], clean: bool) -> None:
        self.tiles, self.bk, self.dirty = tiles, block[1], clean
        self.hidden = self._hidden(tiles.bits) if len(tiles.bits) <= TILES_UNPACKED else None

    def _hidden(self, words: torch.Tensor) -> torch.Tensor:
        """Words [..., W] to booleans [..., BK], true where a bit is 0."""
        shifts = torch.arange(min(32, self.bk), dtype=torch.int32)
        return ((words.unsqueeze(-1) >> shifts) & 1).flatten(-2) == 0

    def hide(self, step: _Step, scores: torch.Tensor) -> None:
        """-inf in scores [H, R, BQ, E * BK] where the tile of a PARTIAL entry has a 0."""
        partial = step.tiles.shape[1]
        if not partial:
            return
        hidden = self._hidden(self.tiles.bits[step.tiles]) if self.hidden is None else self.hidden[step.tiles]
        tail = scores.unflatten(-1, (-1, self.bk))[..., -partial:, :]  # [H, R, BQ, partial, BK]
        tail.masked_fill_(hidden.transpose(1, 2), -torch.inf)

    def clean(self, step: _Step, *operands: torch.Tensor) -> None:
        """Zero the rows of gathered keys or values that no query sees: 0 * NaN would be NaN."""
        partial = step.tiles.shape[1]
        if not partial or not self.dirty:
            return
        unseen = self._hidden(self.tiles.seen_keys[step.tiles])  # [R, partial, BK]
        for operand in operands:
            operand[:, :, -partial:].masked_fill_(unseen.unsqueeze(-1), 0)


def _scores(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """[H, R, BQ, D] times [H, R, E, BK, D] to [H, R, BQ, E * BK]."""
    return rows @ blocks.flatten(2, 3).mT


def _add_blocks(total: torch.Tensor, step: _Step, part: torch.Tensor) -> None:
    """Add part [H, R, E * BK, D] to blocks of total [heads, nK, BK, D]; one block may be met several times."""
    heads, blocks, size, dim = total.shape
    index = step.kv_heads[:, None, None] * blocks + step.cols
    total.view(heads * blocks, size, dim).index_add_(0, index.flatten(), part.reshape(-1, size, dim))


def _walk(operands: _Operands, rows: Side, pattern_of: torch.Tensor) -> Iterator[list[_Step]]:
    """Batches of block rows; the steps of one batch walk its entries from first to last."""
    batch, q_heads = operands.batch, operands.q_heads
    pattern_of = pattern_of.expand(batch, q_heads).reshape(-1)
    area = operands.block[0] * operands.block[1]
    for p in range(len(rows.spans)):
        heads = (pattern_of == p).nonzero().flatten()
        if not len(heads):
            continue
        kv_heads = heads // q_heads * operands.kv_heads + heads % q_heads * operands.kv_heads // q_heads
        spans = rows.spans[p].long()
        lengths = torch.stack(
            [spans[:, FULL_STOP] - spans[:, FULL_START], spans[:, PARTIAL_STOP] - spans[:, PARTIAL_START]], 1
        )
        kinds, kind_of = lengths.unique(dim=0, return_inverse=True)
        for kind, (full, partial) in enumerate(kinds.tolist()):
            entries = full + partial
            if not entries:
                continue
            group = (kind_of == kind).nonzero().flatten()
            at_once = max(1, SCORES_AT_ONCE // (area * entries))  # rows, over all heads
            for some_heads, some_kv_heads in zip(heads.split(at_once), kv_heads.split(at_once), strict=True):
                for some in group.split(max(1, at_once // len(some_heads))):
                    yield list(_steps(rows, some_heads, some_kv_heads, some, spans[some], full, partial, area))


def _steps(
    rows: Side,
    heads: torch.Tensor,
    kv_heads: torch.Tensor,
    group: torch.Tensor,
    spans: torch.Tensor,
    full: int,
    partial: int,
    area: int,
) -> Iterator[_Step]:
    masked = spans[:, PARTIAL_START, None] + torch.arange(partial)
    cols = torch.cat([rows.full[spans[:, FULL_START, None] + torch.arange(full)], rows.partial[masked]], 1).long()
    tiles = rows.tile[masked].long()
    stride = max(1, SCORES_AT_ONCE // area)
    for first in range(0, full + partial, stride):
        last = first + stride
        part = tiles[:, max(0, first - full) : max(0, last - full)]
        yield _Step(heads, kv_heads, group, cols[:, first:last], part)
