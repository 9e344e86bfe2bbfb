"""Dropout's random bits: a counter-based hash of (seed, head, query, key), the same on every backend.

A bit depends on where a pair stands and on nothing else, so forward and backward, every block size and every step of
a kernel draw equal bits, and none are stored. Arithmetic is in 32 bits, wrapping:

    absorb(x, y) = mix((x ^ y) + G)
    row key      = absorb(absorb(absorb(absorb(0, seed's low word), its high word), head), absorb(0, query))
    kept         = mix(row key + (key + 1) G) >> 8  <  round((1 - p) 2^24)

where head counts through the batch (sample * Hq + query head), and query and key are indices, not positions. Within a
row this is a SplitMix generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014) with
random access: G is its increment, the golden ratio's fraction in 32 bits. `mix` is lowbias32, a 32-bit finalizer from
the search by Wellons ("Prospecting for hash functions", 2018; public domain).
"""

from __future__ import annotations

import torch

GOLDEN = 0x9E3779B9
MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B
ONE = 1 << 24  # a threshold of ONE keeps everything


def threshold(p: float) -> int:
    """How many of the 2^24 hashes are kept. What is kept is scaled by ONE / threshold, so that the mean is exact."""
    return max(1, round((1 - p) * ONE))


def row_keys(seed: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """int32 keys of rows; seed int64 [], heads and queries are integers of shapes that broadcast."""
    key = _absorbed(torch.zeros((), dtype=torch.int32, device=heads.device), seed.to(heads.device))
    key = _absorbed(key, seed.to(heads.device) >> 32)
    return _absorbed(_absorbed(key, heads), _absorbed(torch.zeros_like(key), queries))


def keep_mask(rows: torch.Tensor, keys: torch.Tensor, limit: int) -> torch.Tensor:
    """Whether pairs are kept: rows from `row_keys`, integer keys of a shape that broadcasts, limit from `threshold`."""
    hashed = _mixed(rows + (keys + 1).to(torch.int32) * _signed(GOLDEN))
    return (hashed >> 8).bitwise_and_(ONE - 1) < limit


def _absorbed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _mixed((x ^ y.to(torch.int32)) + _signed(GOLDEN))


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """lowbias32, in place. int32's >> copies the sign: masks make it a logical shift."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= _signed(MIX_1)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= _signed(MIX_2)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word
