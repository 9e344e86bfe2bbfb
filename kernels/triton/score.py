"""Score features: what happens to scores before the softmax, and dropout after it.

A feature that is off is None and compiles to nothing. `s` is [queries, keys] in the passes over rows and
[keys, queries] in the pass over columns; the helpers here take either. The *unit* of scores is that of the caller's
exponential: with base 2, scale, cap and slope come multiplied by log2(e).
"""

# @triton.jit bodies are a language of their own; their launchers are typed.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sparseflash.kernels import bias as biases
from sparseflash.kernels import dropout
from sparseflash.kernels.layout import Score
from sparseflash.kernels.triton.bias import bias_arguments

_GOLDEN = tl.constexpr(dropout.GOLDEN)
_MIX_1 = tl.constexpr(dropout.MIX_1)
_MIX_2 = tl.constexpr(dropout.MIX_2)
_ONE = tl.constexpr(float(dropout.ONE))


@triton.jit
def tanh(x):
    """Within a few units in the last place, also near 0, where (1 - e) / (1 + e) would cancel.

    The polynomial is that of tanhf in Moshier's Cephes library. libdevice's tanh is not in the interpreter.
    """
    size = tl.abs(x)
    near = tl.minimum(size, 0.625)
    z = near * near
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = series * z - 5.37397155531e-2
    series = series * z + 1.33314422036e-1
    series = series * z - 3.33332819422e-1
    near = near + near * z * series
    e = tl.exp2(size * -2.8853900817779268)
    value = tl.where(size < 0.625, near, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -value, value)


@triton.jit
def in_unit(x, unit):
    """The scale or the cap in the unit of scores; None for None."""
    if x is not None:
        return tl.cast(x, tl.float32) * unit


@triton.jit
def slope_of(slopes_ptr, slopes_b, batch, head, unit):
    """A head's slope in the unit of scores; None without a bias."""
    if slopes_ptr is not None:
        return tl.load(slopes_ptr + batch * slopes_b + head) * unit


@triton.jit
def position_of(first, q_offset):
    """The position of query `first`, key 0 at 0; None without a bias."""
    if q_offset is not None:
        return first + q_offset


@triton.jit
def capped(s, score):
    """Scores before any bias, in the unit of c; the plain products where there is neither cap nor bias."""
    if score.cap is not None:
        s = tanh(s * (score.c / score.cap)) * score.cap
    elif score.slope is not None or score.bias is not None:
        s = s * score.c
    return s


@triton.jit
def scored(s, score, column):
    """Scores without the additive bias, in the unit of c; the plain products where there is neither cap nor bias.

    `factor` has what is left to multiply them by. `column` is the position of the first column of s.
    """
    s = capped(s, score)
    if score.slope is not None:
        rows = (score.position - column).to(tl.float32) + tl.arange(0, s.shape[0]).to(tl.float32)
        s -= score.slope * tl.abs(rows[:, None] - tl.arange(0, s.shape[1]).to(tl.float32)[None, :])
    return s


@triton.jit
def factor(score):
    """What `scored` leaves to multiply by: plain products are scaled inside the exponential at no cost."""
    left = score.c
    if score.cap is not None:
        left = 1.0
    if score.slope is not None:
        left = 1.0
    if score.bias is not None:
        left = 1.0
    return left


@triton.jit
def softcap_grad(s, c, cap):
    """The derivative of the cap at products s."""
    t = tanh(s * (c / cap))
    return 1.0 - t * t


@triton.jit
def _absorbed(x, y):
    return _mixed((x ^ y.to(tl.uint32)) + _GOLDEN)


@triton.jit
def _mixed(x):
    x ^= x >> 16
    x *= _MIX_1
    x ^= x >> 15
    x *= _MIX_2
    x ^= x >> 16
    return x


@triton.jit
def head_key(seed_ptr, index):
    """The part of all row keys that depends on the seed and the head (sample * Hq + query head): see `dropout`."""
    seed = tl.load(seed_ptr)
    key = _absorbed(tl.cast(0, tl.uint32), seed)
    return _absorbed(_absorbed(key, seed >> 32), index)


@triton.jit
def row_keys(key, queries):
    """Keys of rows from the `head_key`."""
    return _absorbed(key, _absorbed(tl.cast(0, tl.uint32), queries))


@triton.jit
def dropout_keys(seed_ptr, index, first, BM: tl.constexpr):
    """Keys [BM] of a head's rows from `first` on; None without dropout."""
    if seed_ptr is not None:
        return row_keys(head_key(seed_ptr, index), first + tl.arange(0, BM))


@triton.jit
def keep_mask(rows, keys, threshold):
    """Which pairs dropout keeps; row keys and indices of keys, of shapes that broadcast."""
    hashed = _mixed(rows + (keys + 1).to(tl.uint32) * _GOLDEN)
    return (hashed >> 8).to(tl.int32) < threshold


@triton.jit
def keep_scale(threshold):
    """The factor of the probabilities that dropout keeps."""
    return _ONE / threshold.to(tl.float32)


def feature_arguments(score: Score, device: torch.device) -> dict[str, Any]:
    """The kernels' arguments for the features of a score; None for those that are off."""
    arguments: dict[str, Any] = dict.fromkeys(("slopes_ptr", "slopes_b", "q_offset", "seed_ptr", "threshold"))
    arguments |= bias_arguments(score.bias)
    arguments["cap"] = score.softcap
    if score.slopes is not None:
        slopes = score.slopes.contiguous()
        arguments |= {"slopes_ptr": slopes, "slopes_b": slopes.shape[-1] if slopes.dim() == 2 else 0}
    if score.slopes is not None or (score.bias is not None and biases.is_relative(score.bias)):
        arguments["q_offset"] = score.q_offset
    if score.seed is not None:
        if score.seed.device != device and torch.cuda.is_current_stream_capturing():
            raise ValueError(f"a CUDA graph cannot read a seed on {score.seed.device}: give a tensor on {device}")
        arguments |= {"seed_ptr": score.seed.to(device), "threshold": dropout.threshold(score.dropout)}
    return arguments
