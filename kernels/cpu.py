"""Attention over lookup tables on a CPU, forward and backward, in batches of torch's matrix products.

A piece (`cpu_plan`) is some block rows and the key blocks that they meet: one product gives its scores, which are
turned into probabilities in place, another the output. Nothing larger than some megabytes is held, so that scores stay
in a cache from the first product to the last; rows too long for that are taken in several parts, summed up.

A softmax may leave out the search for the largest score: exp2 of the scores themselves gives the same probabilities to
the last bit or two unless a row's sum leaves the range of floating point by far, which is seen from that sum. Then the
piece is done again with running maxima. Values so large or small that such a sum of them could leave it get the maxima
at once. Likewise pairs are hidden by adding -inf, and by writing it only where scores may be infinite or NaN.

Some pieces go to torch's flash operator instead (`cpu_flash`): tall windows, which it is made for, and forward on a
processor with matrix units all of bf16's. With features there are no such pieces.

Shape legend: see cpu_operands. D is the head dim of q and k, V that of v, P the unscaled probabilities exp2(scores).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from sparseflash.kernels import cpu_flash, cpu_operands, cpu_plan
from sparseflash.kernels import sinks as sink_logits
from sparseflash.kernels.cpu_operands import Keys, Lane, Masks, Queries, Scratch, Sums, bundles
from sparseflash.kernels.cpu_plan import Piece
from sparseflash.kernels.cpu_score import LOG2_E, Shaping, Where
from sparseflash.kernels.layout import Score, Side, Tiles
from sparseflash.kernels.magnitude import may_be_added_to, needs, with_normal_scale

# Sums of exp2(score) from 2^-SOUND to 2^SOUND are taken as they are: far from where a term that counts underflows.
SOUND = 60
# Rows whose lse in base 2 is within this bound are differentiated without shifting their scores.
CAREFREE = 40


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
    q, score, _ = with_normal_scale(q, score)
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=call.dtype)
    for bundle, (kx, vx), (qx, out_x, lse_x) in call.bundles((k, v), (q, out, lse)):
        keys, values = call.keys(kx, bundle, "keys"), call.keys(vx, bundle, "values")
        for lane in bundle:
            queries = call.queries(qx, lane, call.scratch.dtype)
            outs, logs = (call.queries(x, lane) for x in (out_x, lse_x))
            outs.clear(0)
            logs.clear(-torch.inf)
            for piece in lane.plan.pieces:
                value, log = _attend(call, lane, piece, keys, values, queries.of(piece))
                if piece.again:
                    value, log = _merged(value.to(call.dtype), log, outs.of(piece), logs.of(piece))
                outs.put(piece, value)
                logs.put(piece, log)
    if score.seed is not None:
        out *= call.shaping.retained
    if sinks is not None:
        out *= sink_logits.share(lse, sinks).unsqueeze(-1)
    return out, lse


def _attend(
    call: _Call, lane: Lane, piece: Piece, keys: Keys, values: Keys, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n, queries, V] and lse [n, queries] of a piece for its queries q [n, queries, D]."""
    if piece.tall or call.fused:
        (k, v), group = call.operands(piece, keys, values), lane.heads.shape[1]
        queries = q.shape[1] // group // (len(piece.rows) if piece.window else 1)
        hidden = call.masks.all(piece, call.scratch, group, queries, k.shape[1])
        if hidden is not None and call.needs.own_products and not may_be_added_to(q, k, call.largest):
            return cpu_flash.attend_without(piece, q, k, v, hidden, call.score.scale)
        return cpu_flash.attend(piece, q, k, v, hidden, call.score.scale)
    acc = call.scratch("out", *q.shape[:2], values.x.shape[2])
    for careful in (True,) if piece.blind or call.needs.shifting else (False, True):
        peak: torch.Tensor | None = None
        total: torch.Tensor | None = None
        for part in call.parts(piece, q):
            p, _, here, where, _ = call.scores(lane, part, keys, values, q)
            if careful:
                top = p.amax(-1, keepdim=True)
                new = top if peak is None else torch.maximum(peak, top)
                # A query that has seen nothing yet has a peak of -inf; 0 in its place keeps -inf - peak at -inf.
                shift = new.masked_fill(new == -torch.inf, 0)
                p.sub_(shift)
                if peak is not None and total is not None:
                    keep = torch.exp2(peak - shift)
                    acc *= keep
                    total *= keep
                peak = new
            p.exp2_()
            total_here = p.sum(-1, keepdim=True)
            if where is not None:
                call.shaping.drop(lane.five(p, part), where)
            torch.baddbmm(acc, p, here, beta=0 if total is None else 1, out=acc)
            total = total_here if total is None else total.add_(total_here)
        assert total is not None, "a piece has entries"
        if careful or _sound(total):
            break
    assert total is not None, "one of the two attempts was made"
    log = total.log()
    if peak is not None:
        log += peak.masked_fill(peak == -torch.inf, 0).div_(LOG2_E)
        total.masked_fill_(total == 0, 1)
    return acc.div_(total), log.squeeze(-1)


def _merged(
    value: torch.Tensor, log: torch.Tensor, other: torch.Tensor, other_log: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse over two sets of keys, of which the other is seen by every query."""
    both = torch.logaddexp(log, other_log)
    # Not a lerp, which takes the difference of the two outputs: it may overflow.
    kept = other * torch.exp(other_log - both).unsqueeze(-1)
    return kept.addcmul_(value, torch.exp(log - both).unsqueeze(-1)), both


def _sound(total: torch.Tensor) -> bool:
    low, high = (float(x) for x in total.aminmax())
    return low > 2.0**-SOUND and high < 2.0**SOUND  # false for NaN


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
    q, score, share = with_normal_scale(q, score)
    if dlse is None:
        dlse = lse.new_zeros(()).expand(lse.shape)
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score, (dout, dlse))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for bundle, (kx, vx, dk_x, dv_x), (*given, dq_x) in call.bundles((k, v, dk, dv), (q, out, lse, dout, dlse, dq)):
        keys, values = call.keys(kx, bundle, "keys"), call.keys(vx, bundle, "values")
        heads = bundle[0].keys
        dkeys, dvalues = (Sums(x[heads], block[1], call.scratch, n) for x, n in ((dk_x, "dk"), (dv_x, "dv")))
        for lane in bundle:
            *sources, dqueries = (call.queries(x, lane) for x in (*given, dq_x))
            dqueries.clear(0)
            for piece in lane.plan.pieces:
                operands = (x.of(piece) for x in sources)
                dq_here = _differentiate(call, lane, piece, (keys, values, dkeys, dvalues), *operands)
                (dqueries.add if piece.again else dqueries.put)(piece, dq_here)
        dkeys.write()
        dvalues.write()
    if score.seed is not None:
        dv *= call.shaping.retained
    if share != 1:
        dq *= share
    return dq, dk, dv


def _differentiate(
    call: _Call,
    lane: Lane,
    piece: Piece,
    sides: tuple[Keys, Keys, Sums, Sums],
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor,
) -> torch.Tensor:
    """The dQ [n, queries, D] of a piece; its part of dK and dV is added to them.

    With P = exp2(scores) without a maximum or a sum, and w = exp(-lse) of a row, dS = P (w dP - w delta): so w goes
    into dout and delta, which are far smaller than P. Where P or they could overflow, lse goes into the scores instead.
    """
    keys, values, dkeys, dvalues = sides
    # The operator knows of no cotangent of lse.
    if piece.tall and not dlse.any():
        operands = q, keys.of(piece), values.of(piece), out, lse, dout
        dq, dk, dv = cpu_flash.differentiate(*operands, call.score.scale)
        dkeys.take(piece, dk)
        dvalues.take(piece, dv)
        return dq
    delta = (dout * out).sum(-1, keepdim=True).sub_(dlse.unsqueeze(-1))
    log = lse.unsqueeze(-1) * LOG2_E
    careful = call.needs.shifting or not bool(log.abs().max() < CAREFREE)  # true for NaN
    if careful:
        # Whatever queries that see nothing are, and their cotangents, gradients are 0: P becomes exp2(-inf - inf).
        dead = log == -torch.inf
        q = q.masked_fill(dead, 0)
        log, dout, delta = log.masked_fill(dead, torch.inf), dout.masked_fill(dead, 0), delta.masked_fill(dead, 0)
    else:
        weight = torch.exp2(-log)
        dout, delta = dout * weight, delta * weight
    acc = call.scratch("dq", *q.shape)
    first = True
    for part in call.parts(piece, q):
        p, keys_here, values_here, where, bend = call.scores(lane, part, keys, values, q, bent=True)
        if careful:
            p.sub_(log)
        p.exp2_()
        if call.needs.clearing:  # -inf less a lse of NaN
            call.masks.fill(lane.five(p, part), part, 0)
        dp = call.scratch("dp", *p.shape)
        torch.baddbmm(dp, dout, values_here.mT, beta=0, out=dp)
        dropped = None if where is None else call.shaping.dropped(lane.five(p, part), where)
        if dropped is not None:
            lane.five(dp, part).masked_fill_(dropped, 0).mul_(call.shaping.retained)
        # 2 P (dP - delta) in one pass over memory; there is no operator of a plainer name for it.
        torch.ops.aten.mse_loss_backward.grad_input(p, dp, delta, 0, grad_input=dp)
        if bend is not None:
            lane.five(dp, part).mul_(bend)
        if call.needs.clearing:  # 0 times what is not finite
            call.masks.fill(lane.five(dp, part), part, 0)
        if dropped is not None:
            lane.five(p, part).masked_fill_(dropped, 0)
        half = call.score.scale / 2
        torch.baddbmm(acc, dp, keys_here, beta=0 if first else 1, alpha=half, out=acc)
        dkeys.add(part, q, dp, half)
        dvalues.add(part, dout, p)
        first = False
    return acc


def _follow(x: torch.Tensor) -> bool:
    """Whether the heads of each sample follow those of the one before."""
    return x.stride(0) == x.shape[1] * x.stride(1)


class _Call:
    """What all pieces of a call share."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Side, tiles: Tiles, pattern_of: torch.Tensor,
        block: tuple[int, int], score: Score,
        cotangents: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.tiles, self.block, self.score = rows, tiles, block, score
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.lengths = q.shape[2], k.shape[2]
        self.group = q.shape[1] // k.shape[1]
        self.patterns = pattern_of.expand(q.shape[:2]).numpy().reshape(*k.shape[:2], self.group)
        # What a bundle may have to copy of K and V, and has to hold of their gradients, for a head.
        copied = 0 if k.is_contiguous() and v.is_contiguous() else k.itemsize
        summed = 0 if cotangents is None else self.dtype.itemsize
        self.bytes_a_head = k.shape[2] * (k.shape[3] + v.shape[3]) * (copied + summed)
        self.shaping = Shaping(score, q.shape[0], q.shape[1], block)
        far = 2.0**SOUND if cotangents is None else 2.0**CAREFREE
        self.needs = needs(q, k, v, cotangents, self.largest, far)
        self.masks = Masks(tiles, block, self.dtype, self.needs.writing)
        plain = not score.featured and self.dtype == torch.float32 and q.shape[3] == v.shape[3]
        self.tall = cpu_flash.FLASH and plain
        self.fused = plain and cotangents is None and cpu_flash.suits(q.dtype)
        self.scratch = Scratch(q.dtype if self.fused else self.dtype)

    def largest(self, product: float) -> float:
        """A bound of scores from one of the products of queries and keys."""
        return self.shaping.largest(product, sum(self.lengths))

    def bundles(
        self, keys: Sequence[torch.Tensor], queries: Sequence[torch.Tensor]
    ) -> Iterator[tuple[list[Lane], list[torch.Tensor], list[torch.Tensor]]]:
        """Lanes with tensors like k as [heads, M, ...], like q as [heads, G, N, ...]; a sample each, or all as one."""
        patterns, samples = self.patterns, len(self.patterns)
        at_once = cpu_plan.FUSED_AT_ONCE if self.fused else cpu_plan.SCORES_AT_ONCE
        queries = [x.unflatten(1, (-1, self.group)) for x in queries]
        if samples > 1 and sum(x.nbytes for x in (*keys, *queries)) <= cpu_operands.KEYS_HELD:
            # Samples side by side are worth a copy of operands with interleaved heads. Results never are such.
            keys, queries = ([x if _follow(x) else x.contiguous() for x in some] for some in (keys, queries))
        if samples == 1 or all(_follow(x) for x in (*keys, *queries)):
            keys, queries = ([x.flatten(0, 1).unsqueeze(0) for x in some] for some in (keys, queries))
            patterns = patterns.reshape(1, -1, self.group)
        for sample, mine in enumerate(patterns):
            first = sample * mine.size
            table = self.rows, self.tiles, self.block, self.lengths
            for bundle in bundles(mine, first, *table, self.bytes_a_head, self.tall, at_once):
                yield bundle, [x[sample] for x in keys], [x[sample] for x in queries]

    def keys(self, x: torch.Tensor, bundle: list[Lane], name: str) -> Keys:
        return Keys(x[bundle[0].keys], bundle, self.block[1], self.scratch, name)

    def queries(self, x: torch.Tensor, lane: Lane, dtype: torch.dtype | None = None) -> Queries:
        return Queries(x, lane, self.block[0], dtype or self.dtype)

    def parts(self, piece: Piece, q: torch.Tensor) -> Iterator[Piece]:
        return piece.parts(max(1, cpu_plan.SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * self.block[1])))

    def operands(self, part: Piece, keys: Keys, values: Keys) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, L, D], 0 where no query sees them if some are not finite."""
        dirty = self.needs.cleaning and bool(part.masked)
        k, v = keys.of(part, copy=dirty), values.of(part, copy=dirty)
        if dirty:
            self.masks.clean(part, k, v)
        return k, v

    def scores(
        self, lane: Lane, part: Piece, keys: Keys, values: Keys, q: torch.Tensor, bent: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Where | None, torch.Tensor | None]:
        """Masked scores [n, queries, L] in base 2, the keys and values [n, L, D] they are of, where, and their bend."""
        k, v = self.operands(part, keys, values)
        scores = self.scratch("scores", *q.shape[:2], k.shape[1])
        torch.baddbmm(scores, q, k.mT, beta=0, alpha=self.shaping.factor, out=scores)
        five = lane.five(scores, part)
        where, bend = None, None
        if self.score.featured:
            where = Where(lane.heads, torch.from_numpy(part.rows), part.blocks())
            bend = self.shaping.scores(five, where, bent)
        self.masks.hide(five, part)
        return scores, k, v, where, bend
