"""Attention on a CPU in a few operators of torch for each block row: correct and simple, not fast.

It serves where there is no compiled kernel, and float64. A block row gathers the keys that some query of it sees, so
that nothing else is ever touched, and is masked dense attention of its queries with these.

Shape legend: H query heads (of all samples) that share a pattern, n queries of a block row, T keys that some of them
see, D head dim of q and k, V that of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from sparseflash.kernels import bias as biases
from sparseflash.kernels import dropout
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.layout import (
    FULL_START,
    FULL_STOP,
    PARTIAL_START,
    PARTIAL_STOP,
    BlockLists,
    Results,
    Score,
    Tiles,
)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32 (fp64 for fp64 inputs)."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    out, lse = call.empty_results()
    for heads in call.heads:
        for row in range(rows.ranges.shape[1]):
            first = row * block[0]
            call.attend(heads, row, range(first, min(first + block[0], q.shape[2])), first, out, lse)
    return _finished(q, out, lse, sinks)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, rows: BlockLists, tiles: Tiles,
    pattern_of: torch.Tensor, block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`forward`; query i of a sample is at position length - n + i.

    Keys at or past the length are not read.
    """
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    out, lse = call.empty_results()
    for sample, length in enumerate(lengths.tolist()):
        start, bound = length - q.shape[2], min(length, k.shape[2])
        for heads in call.heads:
            mine = heads.of_sample(sample)
            position = max(start, 0)
            while len(mine.number) and position < bound:
                stop = min(bound, (position // block[0] + 1) * block[0])
                places = range(position - start, stop - start)
                call.attend(mine, position // block[0], places, position, out, lse, bound)
                position = stop
    return _finished(q, out, lse, sinks)


def _finished(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if sinks is not None:
        out *= sink_logits.share(lse, sinks).unsqueeze(-1)
    return out.to(q.dtype), lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, rows: BlockLists, columns: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v (without sinks) in their dtypes. Walks the rows alone: one pass serves all three."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    gradients = tuple(x.new_zeros(x.shape, dtype=call.dtype) for x in (q, k, v))
    for heads in call.heads:
        for row in range(rows.ranges.shape[1]):
            first = row * block[0]
            here = range(first, min(first + block[0], q.shape[2]))
            call.differentiate(heads, row, here, (dout, dlse, out, lse), gradients)
    dq, dk, dv = gradients
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def bias_gradient(
    results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, rows: BlockLists,
    tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int], score: Score,
) -> torch.Tensor:  # fmt: skip
    """The gradient of a bias (without sinks), in its shape and dtype. Sums are in fp32, or fp64 for fp64 inputs."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    total = bias.new_zeros(bias.shape, dtype=call.dtype)
    for heads in call.heads:
        for row in range(rows.ranges.shape[1]):
            first = row * block[0]
            here = range(first, min(first + block[0], q.shape[2]))
            call.differentiate_bias(heads, row, here, results, total)
    return total.to(bias.dtype)


@dataclass(frozen=True)
class _Heads:
    """Query heads that share a pattern."""

    pattern: int
    sample: torch.Tensor  # int64 [H]
    number: torch.Tensor  # int64 [H]

    def of_sample(self, sample: int) -> _Heads:
        mine = self.sample == sample
        return _Heads(self.pattern, self.sample[mine], self.number[mine])


class _Part(NamedTuple):
    """What a block row has of the gradient."""

    keys: torch.Tensor  # int64 [T]
    dead: torch.Tensor  # bool [H, n, 1]: queries that see nothing
    q: torch.Tensor  # [H, n, D]
    dout: torch.Tensor  # [H, n, V]
    given: torch.Tensor  # [H, n, T]: probabilities after dropout
    ds: torch.Tensor  # [H, n, T]: by scores
    softcap_grad: torch.Tensor | None  # [H, n, T]: of scores by scaled products, None for 1


class _Call:
    """What all block rows of a call share."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: BlockLists, tiles: Tiles,
        pattern_of: torch.Tensor, block: tuple[int, int], score: Score,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v, self.rows, self.tiles, self.block, self.score = q, k, v, rows, tiles, block, score
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.group = q.shape[1] // k.shape[1]
        self.limit = dropout.threshold(score.dropout)
        self.keep_scale = 1.0 if score.seed is None else dropout.ONE / self.limit
        self.slopes = None if score.slopes is None else score.slopes.expand(q.shape[:2]).to(self.dtype)
        patterns = pattern_of.expand(q.shape[:2])
        self.heads = [_Heads(p, *(patterns == p).nonzero().unbind(1)) for p in patterns.unique().tolist()]

    def empty_results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of queries that see nothing."""
        out = self.q.new_zeros((*self.q.shape[:-1], self.v.shape[-1]), dtype=self.dtype)
        return out, self.q.new_full(self.q.shape[:-1], -torch.inf, dtype=self.dtype)

    def seen(self, pattern: int, row: int, queries: range, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys below a bound that some query of a block row sees, ascending int64 [T], and who sees which [n, T].

        `queries` are numbers within the row.
        """
        span = self.rows.ranges[pattern, row].tolist()
        full = self.rows.full_indices[span[FULL_START] : span[FULL_STOP]].long()
        partial = self.rows.partial_indices[span[PARTIAL_START] : span[PARTIAL_STOP]].long()
        tile = self.rows.partial_tiles[span[PARTIAL_START] : span[PARTIAL_STOP]].long()
        size = self.block[1]
        words = self.tiles.bits[tile, queries.start : queries.stop].unsqueeze(-1)
        bits = (words >> torch.arange(min(32, size), dtype=torch.int32) & 1).flatten(-2).bool()
        everything = torch.ones((len(queries), len(full), size), dtype=torch.bool)
        visible = torch.cat([everything, bits.transpose(0, 1)[..., :size]], 1)
        blocks, order = torch.cat([full, partial]).sort()
        keys = (blocks[:, None] * size + torch.arange(size)).flatten()
        visible = visible[:, order].flatten(1)
        chosen = visible.any(0) & (keys < bound)
        return keys[chosen], visible[:, chosen]

    def scores(
        self, heads: _Heads, positions: range, keys: torch.Tensor, visible: torch.Tensor, q: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores [H, n, T], -inf where a key is hidden, and their derivative by scaled products unless it is 1."""
        scores = (q @ self.taken(self.k, heads, keys).mT).mul_(self.score.scale)
        softcap_grad = None
        if self.score.softcap is not None:
            scores.div_(self.score.softcap).tanh_()
            softcap_grad = 1 - scores.square()
            scores.mul_(self.score.softcap)
        if self.slopes is not None:
            queries = self.places(positions)
            distance = (queries[:, None] - keys).abs().to(self.dtype)
            scores.addcmul_(self.slopes[heads.sample, heads.number][:, None, None], distance, value=-1)
        if self.score.bias is not None:
            bias = self.bias_of(self.score.bias, heads, positions, keys)
            scores.add_(bias).masked_fill_(bias == -torch.inf, -torch.inf)
        return scores.masked_fill_(~visible, -torch.inf), softcap_grad

    def bias_of(self, bias: torch.Tensor, heads: _Heads, positions: range, keys: torch.Tensor) -> torch.Tensor:
        """A bias [H, n, T] of queries and keys."""
        B, Hq, N = self.q.shape[:3]
        if biases.is_relative(bias):
            return bias.expand(Hq, -1)[heads.number][:, self.apart(bias, positions, keys)].to(self.dtype)
        queries = torch.arange(positions.start, positions.stop)[:, None]
        every = bias.expand(B, Hq, N, self.k.shape[2])
        return every[heads.sample[:, None, None], heads.number[:, None, None], queries, keys].to(self.dtype)

    def apart(self, bias: torch.Tensor, positions: range, keys: torch.Tensor) -> torch.Tensor:
        """Which number [n, T] of its head's relative bias a pair takes."""
        most = biases.reach(bias)
        queries = self.places(positions)
        return (keys - queries[:, None]).clamp_(-most, most).add_(most)

    def places(self, positions: range) -> torch.Tensor:
        """Where queries [n] stand, key 0 at 0."""
        return torch.arange(positions.start, positions.stop) + self.score.q_offset

    def taken(self, x: torch.Tensor, heads: _Heads, keys: torch.Tensor) -> torch.Tensor:
        """Keys or values [H, T, ...]."""
        return x[heads.sample[:, None], heads.number[:, None] // self.group, keys].to(self.dtype)

    def dropped(self, heads: _Heads, positions: range, keys: torch.Tensor) -> torch.Tensor | None:
        """Which probabilities [H, n, T] dropout makes 0; None without dropout."""
        if self.score.seed is None:
            return None
        numbers = (heads.sample * self.q.shape[1] + heads.number)[:, None]
        rows = dropout.row_keys(self.score.seed, numbers, torch.arange(positions.start, positions.stop))
        return ~dropout.keep_mask(rows.unsqueeze(-1), keys, self.limit)

    def attend(
        self, heads: _Heads, row: int, places: range, position: int, out: torch.Tensor, lse: torch.Tensor,
        bound: int | None = None,
    ) -> None:  # fmt: skip
        """Write the results of queries `places` of q; the first one is in block row `row`."""
        first = position - row * self.block[0]
        within = range(first, first + len(places))
        keys, visible = self.seen(heads.pattern, row, within, self.k.shape[2] if bound is None else bound)
        if not len(keys):
            return
        at = heads.sample, heads.number, slice(places.start, places.stop)
        positions = range(position, position + len(places))
        scores, _ = self.scores(heads, positions, keys, visible, self.q[at].to(self.dtype))
        total = scores.logsumexp(-1, keepdim=True)
        dead = total == -torch.inf
        p = scores.sub_(total.masked_fill(dead, 0)).exp_()  # -inf - -inf is NaN
        if (gone := self.dropped(heads, positions, keys)) is not None:
            p.masked_fill_(gone, 0).mul_(self.keep_scale)
        out[at] = (p @ self.taken(self.v, heads, keys)).masked_fill_(dead, 0)
        lse[at] = total.squeeze(-1)

    def part(self, heads: _Heads, row: int, places: range, results: Results) -> _Part | None:
        """What a block row adds to gradients; None for nothing."""
        keys, visible = self.seen(heads.pattern, row, range(len(places)), self.k.shape[2])
        if not len(keys):
            return None
        at = heads.sample, heads.number, slice(places.start, places.stop)
        # Whatever a query that sees nothing is, and its cotangents, it adds nothing.
        q, dout, out, lse = (x[at].to(self.dtype) for x in (self.q, results[0], *results[2:]))
        dead = lse.unsqueeze(-1) == -torch.inf
        q, dout = q.masked_fill(dead, 0), dout.masked_fill(dead, 0)
        scores, softcap_grad = self.scores(heads, places, keys, visible, q)
        hidden = (scores == -torch.inf) | dead
        p = scores.sub_(lse.unsqueeze(-1)).exp_().masked_fill_(hidden, 0)
        dp = dout @ self.taken(self.v, heads, keys).mT
        given = p
        if (gone := self.dropped(heads, places, keys)) is not None:
            dp = dp.masked_fill_(gone, 0).mul_(self.keep_scale)
            given = p.masked_fill(gone, 0).mul_(self.keep_scale)
        delta = (dout * out).sum(-1, keepdim=True)
        if results[1] is not None:
            delta = delta - results[1][at].to(self.dtype).unsqueeze(-1)
        ds = (p * (dp - delta)).masked_fill_(hidden, 0)
        return _Part(keys, dead, q, dout, given, ds, softcap_grad)

    def differentiate(
        self, heads: _Heads, row: int, places: range, results: Results, gradients: tuple[torch.Tensor, ...]
    ) -> None:
        """Add the part of a block row to the gradients of q, k and v."""
        part = self.part(heads, row, places, results)
        if part is None:
            return
        ds = part.ds if part.softcap_grad is None else part.ds * part.softcap_grad
        dq = (ds @ self.taken(self.k, heads, part.keys)).masked_fill_(part.dead, 0) * self.score.scale
        gradients[0][heads.sample, heads.number, places.start : places.stop] = dq
        owner = heads.sample * self.k.shape[1] + heads.number // self.group
        for total, sums in zip(
            gradients[1:], (ds.mT @ part.q * self.score.scale, part.given.mT @ part.dout), strict=True
        ):
            owners, sums = _by_owner(owner, sums)
            total.flatten(0, 1)[owners[:, None], part.keys] += sums

    def differentiate_bias(self, heads: _Heads, row: int, places: range, results: Results, total: torch.Tensor) -> None:
        """Add the part of a block row to the gradient of a bias."""
        part = self.part(heads, row, places, results)
        if part is None:
            return
        if biases.is_relative(total):
            index = self.apart(total, places, part.keys).flatten().expand(len(part.ds), -1)
            sums = total.new_zeros(len(part.ds), total.shape[1]).scatter_add_(1, index, part.ds.flatten(1))
            total.index_add_(0, heads.number * (total.shape[0] > 1), sums)
            return
        samples, numbers, queries, _ = total.shape
        ds = part.ds if queries > 1 else part.ds.sum(1, keepdim=True)
        owner = heads.sample * (samples > 1) * numbers + heads.number * (numbers > 1)
        owners, sums = _by_owner(owner, ds)
        here = torch.arange(places.start, places.stop) if queries > 1 else torch.zeros(1, dtype=torch.int64)
        total.flatten(0, 1)[owners[:, None, None], here[:, None], part.keys] += sums


def _by_owner(owner: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The owners [n] there are, and the sums [n, ...] of their parts [H, ...], in order.

    index_put_ with accumulate=True would add in whatever order threads come.
    """
    owners, place = owner.unique(return_inverse=True)
    return owners, parts.new_zeros(len(owners), *parts.shape[1:]).index_add_(0, place, parts)
