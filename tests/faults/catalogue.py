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
        return f"{self.module.removeprefix('kernels.')}: {self.name}"


TABLE = [
    Fault(
        "the transposed table is off by one line",
        "patterns.overlay",
        "stop += place[begins + 1]",
        "stop += np.minimum(place[begins + 1] + 1, n)",
    ),
    Fault(
        "the transposed table starts one line late",
        "patterns.overlay",
        "start += place[begins]\n",
        "start += np.minimum(place[begins] + 1, place[begins + 1] - 1)\n",
    ),
    Fault(
        "FULL blocks are listed as PARTIAL",
        "tables.lookup",
        "is_full = runs.code == FULL",
        "is_full = runs.code != FULL",
    ),
    Fault(
        "a line's first PARTIAL entry is left out",
        "tables.lookup",
        "ranges[:, at], ranges[:, at + 1] = entries[:-1], entries[1:]",
        "ranges[:, at], ranges[:, at + 1] = np.minimum(entries[:-1] + at // 2, entries[1:]), entries[1:]",
    ),
    Fault(
        "tiles are those of the neighbour",
        "tables.lookup",
        "_padded(code - FIRST_TILE)",
        "_padded(np.roll(code, 1) - FIRST_TILE)",
    ),
    Fault(
        "no key of a tile is seen",
        "tables.packing",
        "np.bitwise_or.reduce(bits, axis=1)",
        "np.bitwise_and.reduce(bits, axis=1)",
    ),
    Fault(
        "two splits of a line overlap",
        "tables.splitting",
        "weight[line] * (number + 1) // splits[line]",
        "np.minimum(weight[line] * (number + 1) // splits[line] + 1, weight[line])",
    ),
    Fault(
        "a split is left out of the merge",
        "tables.splitting",
        "reductions = np.stack([split_lines, end - splits[split_lines], end]",
        "reductions = np.stack([split_lines, end - splits[split_lines] + 1, end]",
    ),
]

CPU = [
    Fault(
        "a dropped mask",
        "kernels.cpu.plain",
        "return scores.masked_fill_(~visible, -torch.inf), softcap_grad",
        "return scores, softcap_grad",
    ),
    Fault(
        "a wrong offset of positions",
        "kernels.cpu.plain",
        "torch.arange(positions.start, positions.stop) + self.score.q_offset",
        "torch.arange(positions.start, positions.stop)",
    ),
    Fault(
        "a wrong offset of new queries",
        "kernels.cpu.plain",
        "start, bound = length - q.shape[2],",
        "start, bound = length - q.shape[2] + 1,",
    ),
    Fault(
        "a key past the cache's end",
        "kernels.cpu.plain",
        "chosen = visible.any(0) & (keys < bound)",
        "chosen = visible.any(0) & (keys < bound + 1)",
    ),
    Fault(
        "FULL and PARTIAL swapped",
        "kernels.layout",
        "FULL_START, FULL_STOP, PARTIAL_START, PARTIAL_STOP = range(4)",
        "PARTIAL_START, PARTIAL_STOP, FULL_START, FULL_STOP = range(4)",
    ),
    Fault("the cotangent of lse is lost", "kernels.cpu.plain", "if results[1] is not None:", "if False:"),
    Fault("delta is lost", "kernels.cpu.plain", "ds = (p * (dp - delta))", "ds = (p * dp)"),
    Fault(
        "gradients of shared keys overwrite each other",
        "kernels.cpu.plain",
        "total.flatten(0, 1)[owners[:, None], part.keys] += sums",
        "total.flatten(0, 1)[owners[:, None], part.keys] = sums",
    ),
    Fault(
        "survivors of dropout are not scaled",
        "kernels.cpu.plain",
        "given = p.masked_fill(gone, 0).mul_(self.keep_scale)",
        "given = p.masked_fill(gone, 0)",
    ),
    Fault(
        "the cap has no derivative",
        "kernels.cpu.plain",
        "ds = part.ds if part.softcap_grad is None else part.ds * part.softcap_grad",
        "ds = part.ds",
    ),
    Fault(
        "a bias is taken the other way round",
        "kernels.cpu.plain",
        "(keys - queries[:, None])",
        "(queries[:, None] - keys)",
    ),
    Fault(
        "distances beyond the last are left out",
        "kernels.cpu.plain",
        ".clamp_(-most, most).add_(most)",
        ".add_(most).remainder_(2 * most + 1)",
    ),
    Fault(
        "a bias of -inf does not hide",
        "kernels.cpu.plain",
        "scores.add_(bias).masked_fill_(bias == -torch.inf, -torch.inf)",
        "scores.add_(bias.clamp(min=-1e4))",
    ),
    Fault(
        "the last head's bias gradient overwrites those before",
        "kernels.cpu.plain",
        "total.flatten(0, 1)[owners[:, None, None], here[:, None], part.keys] += sums",
        "total.flatten(0, 1)[owners[:, None, None], here[:, None], part.keys] = sums",
    ),
    Fault("a bias of queries forgets the sink", "kernels.bias", "if sinks is not None:", "if False:"),
]

# Of the compiled kernel: modules are its files.
NATIVE = [
    Fault("a dropped mask", "forward.h", "acc[r][c] = lanes(seen, c) ? acc[r][c] : all(-INFINITY);", "(void)seen;"),
    Fault(
        "a dropped mask in the backward",
        "backward.h",
        "y = seen(bits, words, g * G + r0 + r, p, c, edge) ? y : all(0.f);",
        "(void)y;",
    ),
    Fault(
        "a wrong offset of positions",
        "forward.h",
        "lane.position[i] = position + a.q_offset",
        "lane.position[i] = position",
    ),
    Fault(
        "a wrong offset of new queries", "forward.h", "start = length - a.N, bound", "start = length - a.N + 1, bound"
    ),
    Fault(
        "a key past the cache's end",
        "forward.h",
        "const int keys = at_most(a.BK, bound - block * a.BK);",
        "const int keys = at_most(a.BK, a.M - block * a.BK);",
    ),
    Fault("what was summed up is not faded", "forward.h", "store(to, load(to) * fade)", "store(to, load(to))"),
    Fault("the sum is not faded", "forward.h", "store(s, load(s) * fade)", "store(s, load(s))"),
    Fault("lse lacks the reference", "forward.h", "(top[i] + log2f(sum[i])) * LN_2", "log2f(sum[i]) * LN_2"),
    Fault(
        "parts are merged by the wrong reference",
        "forward.h",
        "const double weight = ::exp2(from[0] - top);",
        "const double weight = 1;",
    ),
    Fault("values that nobody sees are not cleaned", "forward.h", "if (rows.again()) rows.begin(n), walk(true);", ""),
    Fault(
        "sums of hidden NaNs are kept",
        "forward.h",
        "if (broken >> (i % PW) & 1 || rows.top[i] == -INFINITY)",
        "if (rows.top[i] == -INFINITY)",
    ),
    Fault(
        "rows that see nothing are not told",
        "forward.h",
        "if (broken >> (i % PW) & 1 || rows.top[i] == -INFINITY)",
        "if (broken >> (i % PW) & 1)",
    ),
    Fault(
        "dropout drops the next key",
        "forward.h",
        "(uint32_t)(key + 1) * GOLDEN)) >> 8",
        "(uint32_t)(key + 2) * GOLDEN)) >> 8",
    ),
    Fault("the cotangent of lse is lost", "backward.h", "total - (a.dlse ? a.dlse[at] : 0.f)", "total"),
    Fault("delta is lost", "backward.h", "vf s0 = p0 * (g0 - delta[r])", "vf s0 = p0 * g0"),
    Fault("the cap has no derivative", "backward.h", "s0 *= load(b), s1 *= load(b + PW);", "(void)b;"),
    Fault(
        "a bias of -inf does not hide",
        "problem.h",
        "return bias == all(-INFINITY) ? bias : x + bias;",
        "return x + larger(bias, all(-1e4f));",
    ),
    Fault(
        "distances beyond the last are read past the end",
        "backward.h",
        "apart >= -a.reach && apart + VL - 1 <= a.reach",
        "apart >= -a.reach && apart <= a.reach",
    ),
    Fault(
        "a bias's gradient has the derivative of the cap",
        "backward.h",
        "if (F && a.softcap && !BIAS) {",
        "if (F && a.softcap) {",
    ),
    Fault(
        "distances beyond the last are left out of the gradient",
        "bias.h",
        "to[apart + j < 0 ? 0 : at_most(apart + j, 2 * a.reach)] += ds[j];",
        "if (apart + j >= 0 && apart + j <= 2 * a.reach) to[apart + j] += ds[j];",
    ),
    Fault("the gradient of one head alone", "bias.h", "member < samples * heads", "member < samples"),
    Fault("survivors of dropout are not scaled", "backward.h", "y[d * PW] * (F ? keep_scale(a) : 1.f)", "y[d * PW]"),
    Fault(
        "a block's share overwrites those before",
        "problem.h",
        "store(at, load(at) + acc[r][c]);",
        "store(at, acc[r][c]);",
    ),
    Fault(
        "the last column is not added to dQ",
        "backward.h",
        "const bool edge = (p + 1) * PW > size;",
        "const bool edge = true; if (edge && (p + 1) * PW > size) return;",
    ),
    Fault(
        "half precision is not scaled",
        "backward.h",
        "narrow(sum[i * a.D + d] * (float)a.scale",
        "narrow(sum[i * a.D + d]",
    ),
    Fault(
        "cells are skipped that someone sees",
        "kernel.cpp",
        "cells[p] |= 1ull << (i / G);",
        "cells[p] |= 1ull << (i / G / 2);",
    ),
]

TRITON = [
    Fault("a dropped mask", "kernels.triton.forward", 's = tl.where(visible, s, float("-inf"))', "s = s"),
    Fault(
        "a dropped mask in dK and dV",
        "kernels.triton.backward_keys",
        's = tl.where(spread_t(words, key, BM, BN), s, float("-inf"))',
        "s = s",
    ),
    Fault(
        "a dropped mask in dQ",
        "kernels.triton.backward_queries",
        "visible = seen_by(ahead.words, (i % STEPS) * BN, sizes.FRAGMENTS, BM, BN)",
        "visible = seen_by(ahead.words, (i % STEPS) * BN, sizes.FRAGMENTS, BM, BN) | (dq.shape[0] > 0)",
    ),
    Fault(
        "a wrong offset within a block",
        "kernels.triton.forward",
        "first = block * sizes.BK + (i % STEPS) * BN",
        "first = block * sizes.BK",
    ),
    Fault(
        "a wrong offset of positions", "kernels.triton.backward_keys", "position = first - q_offset", "position = first"
    ),
    Fault(
        "a line of the head beside",
        "kernels.triton.walk",
        "return lists.ranges + (place.pattern * place.lines + line) * 4",
        "return lists.ranges + line * 4",
    ),
    Fault(
        "the last step of rows is not written",
        "kernels.triton.forward",
        "keep = first + tl.arange(0, BM) < N",
        "keep = first + tl.arange(0, BM) < N - 1",
    ),
    Fault(
        "the last key's gradients are not written",
        "kernels.triton.backward_keys",
        "keep = first + tl.arange(0, BN) < M",
        "keep = first + tl.arange(0, BN) < M - 1",
    ),
    Fault(
        "FULL and PARTIAL swapped",
        "kernels.triton.common",
        "FIRST: tl.constexpr = 2 if PARTIAL else 0",
        "FIRST: tl.constexpr = 0 if PARTIAL else 2",
    ),
    Fault(
        "an entry is left out",
        "kernels.triton.common",
        "count = tl.load(span + FIRST + 1) - start",
        "count = tl.maximum(tl.load(span + FIRST + 1) - start - 1, 0)",
    ),
    Fault(
        "what was summed up is not faded",
        "kernels.triton.softmax",
        "v, softmax.acc * fade[:, None], input_precision",
        "v, softmax.acc, input_precision",
    ),
    Fault("parts are merged without their lse", "kernels.triton.softmax", "out * weight[:, None]", "out"),
    Fault("lse lacks the peak", "kernels.triton.forward", "(peak + tl.log2(total)) * LN2", "tl.log2(total) * LN2"),
    Fault(
        "the cotangent of lse is lost",
        "kernels.triton.backward",
        "delta -= tl.load(dlse_ptr + row + rows, mask=keep, other=0.0)",
        "delta -= 0.0",
    ),
    Fault(
        "a split is added twice",
        "kernels.triton.merge",
        "for _ in range(splits.begin, splits.end):\n        acc +=",
        "for _ in range(splits.begin - 1, splits.end):\n        acc +=",
    ),
    Fault(
        "a row that sees nothing is divided by 0",
        "kernels.triton.forward",
        "total = tl.where(dead, 1.0, total)",
        "total = total",
    ),
    Fault(
        "a bias is taken the other way round",
        "kernels.triton.bias",
        "apart = (key - (query + bias.offset)) + (keys - queries)",
        "apart = (query + bias.offset - key) + (queries - keys)",
    ),
    Fault(
        "distances beyond the last are left out of the gradient",
        "kernels.triton.backward_bias",
        "tl.where(met & (apart > bias.reach), total, 0.0)",
        "tl.where(met & (apart > bias.reach), 0.0, 0.0)",
    ),
    Fault(
        "a diagonal is summed beside its own",
        "kernels.triton.backward_bias",
        "tl.arange(0, BM)[None, :] - (BM - 1)\n    there",
        "tl.arange(0, BM)[None, :] - BM\n    there",
    ),
    Fault("unseen keys are read", "kernels.triton.forward", "keep = ahead.seen", "keep = None"),
    Fault(
        "a tile's word of the step before",
        "kernels.triton.common",
        "lanes = key % 32 + tl.arange(0, LANES)\n    bits = (words[:, :, None]",
        "lanes = tl.arange(0, LANES)\n    bits = (words[:, :, None]",
    ),
]
