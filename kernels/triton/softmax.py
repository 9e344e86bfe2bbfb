"""The online softmax of the passes over rows: forward, decoding, and the merge of splits of a row.

Shapes as in `common`. Scores live in base 2, see `forward`.
"""

# @triton.jit bodies are a language of their own.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.score import keep_mask
from sparseflash.kernels.triton.types import Softmax


@triton.jit
def nothing_seen(BM: tl.constexpr, DVP: tl.constexpr):
    """The softmax of rows before their first key."""
    return Softmax(
        tl.zeros((BM, DVP), tl.float32), tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    )


@triton.jit
def absorb(softmax, s, f, v, first, score, HIDDEN: tl.constexpr):
    """The softmax with one more step of keys: scores f s [BM, BN] of the keys from `first` on, and their values.

    HIDDEN: whether some of the scores may be -inf.
    """
    peak = tl.maximum(softmax.peak, tl.max(s, 1) * f)
    base = peak
    if HIDDEN:
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a row that saw nothing yet: -inf - -inf is NaN
    p = tl.exp2(s * f - base[:, None])
    fade = tl.exp2(softmax.peak - base)
    total = softmax.total * fade + tl.sum(p, 1)
    if score.dropout is not None:
        survives = keep_mask(score.dropout[:, None], (first + tl.arange(0, s.shape[1]))[None, :], score.threshold)
        p = tl.where(survives, p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, softmax.acc * fade[:, None], input_precision="ieee")
    return Softmax(acc, peak, total)


@triton.jit
def with_part(softmax, out, lse):
    """The softmax combined with another program's partial result: out [BM, DVP], lse [BM] in base 2."""
    peak = tl.maximum(softmax.peak, lse)
    base = tl.where(peak == float("-inf"), 0.0, peak)  # as above
    fade, weight = tl.exp2(softmax.peak - base), tl.exp2(lse - base)
    return Softmax(softmax.acc * fade[:, None] + out * weight[:, None], peak, softmax.total * fade + weight)
