"""Faults put into the source on purpose, each of a kind that has been seen in kernels of this sort.

A fault is one replacement of text that stands in its module exactly once, so that a change of the source is noticed
here rather than making the fault vanish.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A piece of a module's text and what stands there instead."""

    name: str
    module: str  # below sparseflash
    text: str
    instead: str

    def __str__(self) -> str:
        return f"{self.module.rpartition('.')[2]}: {self.name}"


TABLE = [
    Fault(
        "the transposed table is off by one line",
        "patterns.refinement",
        "stop += place[begins + 1]",
        "stop += np.minimum(place[begins + 1] + 1, n)",
    ),
    Fault(
        "the transposed table starts one line late",
        "patterns.refinement",
        "start += place[begins]\n",
        "start += np.minimum(place[begins] + 1, place[begins + 1] - 1)\n",
    ),
    Fault(
        "FULL blocks are listed as PARTIAL", "tables", "is_full = runs.letter == FULL", "is_full = runs.letter != FULL"
    ),
    Fault(
        "a line's first PARTIAL entry is left out",
        "tables",
        "spans[:, at], spans[:, at + 1] = entries[:-1], entries[1:]",
        "spans[:, at], spans[:, at + 1] = np.minimum(entries[:-1] + at // 2, entries[1:]), entries[1:]",
    ),
    Fault(
        "tiles are those of the neighbour",
        "tables",
        "_padded(letter - FIRST_TILE)",
        "_padded(np.roll(letter, 1) - FIRST_TILE)",
    ),
    Fault(
        "no key of a tile is seen",
        "tables",
        "np.bitwise_or.reduce(bits, axis=1)",
        "np.bitwise_and.reduce(bits, axis=1)",
    ),
    Fault(
        "two pieces of a line overlap",
        "schedule",
        "weight[line] * (number + 1) // pieces[line]",
        "np.minimum(weight[line] * (number + 1) // pieces[line] + 1, weight[line])",
    ),
    Fault(
        "a piece is left out of the merge",
        "schedule",
        "merges = np.stack([cut_lines, end - pieces[cut_lines], end]",
        "merges = np.stack([cut_lines, end - pieces[cut_lines] + 1, end]",
    ),
]

CPU = [
    Fault("a dropped mask", "kernels.cpu", "self.masks.hide(five, part)", "pass"),
    Fault("a dropped mask in decoding", "kernels.cpu_decode", "scores.masked_fill_(~visible, -torch.inf)", "pass"),
    Fault(
        "a wrong offset of a row's keys",
        "kernels.cpu_plan",
        "self.full[spans[:, FULL_START, None] + np.arange(fulls)]",
        "self.full[spans[:, FULL_START, None] + np.arange(1, fulls + 1)]",
    ),
    Fault(
        "a wrong offset of positions",
        "kernels.cpu_score",
        "self._queries(where, products) + self.score.q_offset",
        "self._queries(where, products)",
    ),
    Fault(
        "a wrong offset of new queries",
        "kernels.cpu_decode",
        "_lines(length - n, length,",
        "_lines(length - n + 1, length + 1,",
    ),
    Fault(
        "a key past the cache's end",
        "kernels.cpu_decode",
        "chosen = visible.any(0) & (keys < bound)",
        "chosen = visible.any(0) & (keys < bound + 1)",
    ),
    Fault("a row without keys is not written", "kernels.cpu", "outs.clear(0)", "pass"),
    Fault("lse of a row without keys is not written", "kernels.cpu", "logs.clear(-torch.inf)", "pass"),
    Fault("dq of a row without keys is not written", "kernels.cpu", "dqueries.clear(0)", "pass"),
    Fault(
        "the last row is not written",
        "kernels.cpu_operands",
        "blocks[:, :, piece.at] = self.lane.five(value, piece).to(blocks.dtype)",
        "None if piece.short else blocks[:, :, piece.at].copy_(self.lane.five(value, piece))",
    ),
    Fault(
        "FULL and PARTIAL swapped",
        "kernels.layout",
        "FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP = range(4)",
        "PARTIAL_START, PARTIAL_STOP, FULL_START, FULL_STOP = range(4)",
    ),
    Fault(
        "masks hide the entries before theirs",
        "kernels.cpu_plan",
        "masked=(Masked.of(fulls, torch.from_numpy(tiles)),) if partials else ()",
        "masked=(Masked.of(0, torch.from_numpy(tiles)),) if partials else ()",
    ),
    Fault("what was summed up is not faded", "kernels.cpu", "acc *= keep", "pass"),
    Fault("parts are merged by the wrong lse", "kernels.cpu", "torch.exp(log - both)", "torch.exp(other_log - both)"),
    Fault(
        "lse lacks the peak",
        "kernels.cpu",
        "log += peak.masked_fill(peak == -torch.inf, 0).div_(LOG2_E)",
        "log += 0 * peak",
    ),
    Fault("the cotangent of lse is lost", "kernels.cpu", ".sub_(dlse.unsqueeze(-1))", ""),
    Fault(
        "delta is lost",
        "kernels.cpu",
        "delta = (dout * out).sum(-1, keepdim=True)",
        "delta = 0 * (dout * out).sum(-1, keepdim=True)",
    ),
    Fault(
        "gradients of shared keys overwrite each other",
        "kernels.cpu_operands",
        "here.baddbmm_(left.mT, right, alpha=alpha)",
        "here.baddbmm_(left.mT, right, beta=0, alpha=alpha)",
    ),
    Fault("unseen keys are not cleaned", "kernels.cpu", "self.masks.clean(part, k, v)", "pass"),
    Fault("survivors of dropout are not scaled", "kernels.cpu", "dv *= call.shaping.retained", "pass"),
    Fault("the cap has no derivative", "kernels.cpu", "lane.five(dp, part).mul_(bend)", "pass"),
]

TRITON = [
    Fault("a dropped mask", "kernels.triton_forward", 's = tl.where(visible, s, float("-inf"))', "s = s"),
    Fault(
        "a dropped mask in dK and dV",
        "kernels.triton_backward_keys",
        's = tl.where(spread_t(bits, key, BM, BN), s, float("-inf"))',
        "s = s",
    ),
    Fault(
        "a dropped mask in dQ",
        "kernels.triton_backward_queries",
        "visible = spread(words, (i % SPLIT) * BN, BM, BN)",
        "visible = spread(words, (i % SPLIT) * BN, BM, BN) | (q.shape[0] > 0)",
    ),
    Fault(
        "a wrong offset within a block",
        "kernels.triton_forward",
        "first = block * BK + (i % SPLIT) * BN",
        "first = block * BK",
    ),
    Fault(
        "a wrong offset of positions", "kernels.triton_backward_keys", "position = first - q_offset", "position = first"
    ),
    Fault(
        "a line of the head beside",
        "kernels.triton_forward",
        "span = spans_ptr + (p * lines + line) * 4 if",
        "span = spans_ptr + line * 4 if",
    ),
    Fault(
        "the last step of rows is not written",
        "kernels.triton_forward",
        "keep = first + tl.arange(0, BM) < N",
        "keep = first + tl.arange(0, BM) < N - 1",
    ),
    Fault(
        "the last key's gradients are not written",
        "kernels.triton_backward_keys",
        "keep = first + tl.arange(0, BN) < M",
        "keep = first + tl.arange(0, BN) < M - 1",
    ),
    Fault(
        "FULL and PARTIAL swapped",
        "kernels.triton_common",
        "FIRST: tl.constexpr = 2 if PARTIAL else 0",
        "FIRST: tl.constexpr = 0 if PARTIAL else 2",
    ),
    Fault(
        "an entry is left out",
        "kernels.triton_common",
        "count = tl.load(span + FIRST + 1) - start",
        "count = tl.maximum(tl.load(span + FIRST + 1) - start - 1, 0)",
    ),
    Fault(
        "what was summed up is not faded",
        "kernels.triton_forward",
        "v, acc * fade[:, None], input_precision",
        "v, acc, input_precision",
    ),
    Fault("parts are merged without their lse", "kernels.triton_merge", "part * weight[:, None]", "part"),
    Fault("lse lacks the peak", "kernels.triton_forward", "(peak + tl.log2(total)) * LN2", "tl.log2(total) * LN2"),
    Fault(
        "the cotangent of lse is lost",
        "kernels.triton_backward",
        "delta -= tl.load(dlse_ptr + row + rows, mask=keep, other=0.0)",
        "delta -= 0.0",
    ),
    Fault(
        "a piece is added twice",
        "kernels.triton_merge",
        "for _ in range(begin, end):\n        acc +=",
        "for _ in range(begin - 1, end):\n        acc +=",
    ),
    Fault(
        "a row that sees nothing is divided by 0",
        "kernels.triton_forward",
        "total = tl.where(dead, 1.0, total)",
        "total = total",
    ),
    Fault("unseen keys are read", "kernels.triton_forward", "keep = seen", "keep = None"),
    Fault(
        "a tile's word of the step before",
        "kernels.triton_common",
        "lanes = key % 32 + tl.arange(0, LANES)\n    bits = (words[:, :, None]",
        "lanes = tl.arange(0, LANES)\n    bits = (words[:, :, None]",
    ),
]
