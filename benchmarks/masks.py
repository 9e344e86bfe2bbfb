"""The masks of the benchmarks: patterns sized for a length, and the same for FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.ordering import token_order

Mod = Callable[[Any, Any, Any, Any], Any]  # FlexAttention's mask_mod(b, h, q, k)


@dataclass(frozen=True)
class Mask:
    """A pattern for a number of tokens, and the mask_mod that means the same; None where it has none that is short."""

    pattern: Callable[[int], Pattern]
    mod: Callable[[int], Mod] | None = None
    longest: int = 1 << 24  # tokens, past which it stores more than 100 million blocks


def side(tokens: int) -> int:
    """Height and width of the square image with so many pixels, or the largest that is no larger than that."""
    return 1 << (isqrt(tokens).bit_length() - 1)


def lengths(tokens: int) -> list[int]:
    """Random document lengths near 1,000 that cover the sequence."""
    drawn = np.random.default_rng(0).integers(500, 1501, size=tokens // 500 + 1)
    return [int(n) for n in drawn[: int(np.searchsorted(np.cumsum(drawn), tokens)) + 1]]


def mixed_lengths(tokens: int) -> list[int]:
    """Random document lengths from 64 to 8,192 that cover the sequence, as many near one length as near its double."""
    drawn = np.exp2(np.random.default_rng(0).uniform(6, 13, size=tokens // 64 + 1)).astype(int)
    return [int(n) for n in drawn[: int(np.searchsorted(np.cumsum(drawn), tokens)) + 1]]


def _documents_mod(cut: Callable[[int], list[int]]) -> Callable[[int], Mod]:
    def mod(tokens: int) -> Mod:
        number = torch.repeat_interleave(torch.tensor(cut(tokens)))[:tokens]
        return lambda b, h, q, k: number[q] == number[k]

    return mod


def _power(x: Any) -> Any:
    return x & (x - 1) == 0


def _local(window: int) -> Mod:
    return lambda b, h, q, k: (q - k).abs() <= window


def _bar(b: Any, h: Any, q: Any, k: Any) -> Any:
    near, jump, always = (q - k).abs() <= 1024, _power((q // 128) ^ (k // 128)), (q < 64) | (k < 64)
    return (k <= q) & (near | jump | always)


def _squares(radius: int) -> Callable[[int], Mod]:
    def mod(tokens: int) -> Mod:
        w = side(tokens)
        return lambda b, h, q, k: ((q // w - k // w).abs() <= radius) & ((q % w - k % w).abs() <= radius)

    return mod


def _cross(tokens: int) -> Mod:
    w = side(tokens)
    return lambda b, h, q, k: (q // w == k // w) | (q % w == k % w)


# Strides grow with the length, so that a row keeps at most 64 blocks where the pattern allows it.
MASKS: dict[str, Mask] = {
    "full()": Mask(lambda n: P.full(), lambda n: lambda b, h, q, k: q >= 0),
    "causal()": Mask(lambda n: P.causal(), lambda n: lambda b, h, q, k: k <= q),
    "local(1024)": Mask(lambda n: P.local(1024), lambda n: _local(1024)),
    "dilated(64, 16)": Mask(
        lambda n: P.dilated(64, 16), lambda n: lambda b, h, q, k: ((q - k).abs() <= 1024) & ((q - k) % 16 == 0)
    ),
    "strided(n / 8192, unit=128)": Mask(
        lambda n: P.strided(max(n // 8192, 1), unit=128),
        lambda n: lambda b, h, q, k: (q // 128 - k // 128) % max(n // 8192, 1) == 0,
    ),
    "strided(n / 32)": Mask(
        lambda n: P.strided(n // 32), lambda n: lambda b, h, q, k: (q - k) % (n // 32) == 0
    ),
    "fixed(sqrt(n / 128), 1, unit=128)": Mask(
        lambda n: P.fixed(isqrt(n // 128), 1, unit=128),
        lambda n: lambda b, h, q, k: (q // 128 // isqrt(n // 128) == k // 128 // isqrt(n // 128))
        | (k // 128 % isqrt(n // 128) == isqrt(n // 128) - 1),
    ),
    "butterfly(unit=128)": Mask(
        lambda n: P.butterfly(unit=128), lambda n: lambda b, h, q, k: _power((q // 128) ^ (k // 128))
    ),
    "global_tokens(64)": Mask(lambda n: P.global_tokens(64), lambda n: lambda b, h, q, k: (q < 64) | (k < 64)),
    "random_blocks(8)": Mask(lambda n: P.random_blocks(8)),
    "documents(random, near 1000)": Mask(lambda n: P.documents(lengths(n)), _documents_mod(lengths)),
    "causal() & documents(random)": Mask(lambda n: P.causal() & P.documents(lengths(n))),
    "prefix(1000)": Mask(lambda n: P.prefix(1000), lambda n: lambda b, h, q, k: (k <= q) | (k < 1000)),
    "log_sparse()": Mask(lambda n: P.log_sparse(), lambda n: lambda b, h, q, k: _power((q - k).abs())),
    "star()": Mask(
        lambda n: P.star(), lambda n: lambda b, h, q, k: ((q - k).abs() <= 1) | (q == 0) | (k == 0)
    ),
    "streaming(4, 1024)": Mask(
        lambda n: P.streaming(4, 1024), lambda n: lambda b, h, q, k: (k <= q) & ((k < 4) | (q - k < 1024))
    ),
    "bigbird()": Mask(lambda n: P.bigbird()),
    "longformer(512)": Mask(
        lambda n: P.longformer(512), lambda n: lambda b, h, q, k: ((q - k).abs() <= 256) | (q == 0) | (k == 0)
    ),
    "causal() & (local(1024) | butterfly(unit=128) | global_tokens(64))": Mask(
        lambda n: P.causal() & (P.local(1024) | P.butterfly(unit=128) | P.global_tokens(64)), lambda n: _bar
    ),
    "neighborhood((s, s), 8, 'morton')": Mask(lambda n: P.neighborhood((side(n), side(n)), 8, "morton")),
    "neighborhood((s, s), 4)": Mask(lambda n: P.neighborhood((side(n), side(n)), 4), _squares(4)),
    "axial((s, s), 'morton')": Mask(lambda n: P.axial((side(n), side(n)), "morton"), longest=1 << 20),
    "axial((s, s))": Mask(lambda n: P.axial((side(n), side(n))), _cross, longest=1 << 18),
}  # fmt: skip

# The masks that attention on a CPU is timed on; a length is the square of a power of two.
CPU_MASKS: dict[str, Mask] = {
    "local(512)": Mask(lambda n: P.local(512), lambda n: _local(512)),
    "butterfly(unit=128)": MASKS["butterfly(unit=128)"],
    "local(128) | butterfly(unit=128)": Mask(
        lambda n: P.local(128) | P.butterfly(unit=128),
        lambda n: lambda b, h, q, k: ((q - k).abs() <= 128) | _power((q // 128) ^ (k // 128)),
    ),
    "causal() & local(1024)": Mask(
        lambda n: P.causal() & P.local(1024), lambda n: lambda b, h, q, k: (k <= q) & (q - k <= 1024)
    ),
    "documents(random, near 1000)": MASKS["documents(random, near 1000)"],
    "bigbird()": MASKS["bigbird()"],
    "neighborhood((s, s), 4)": MASKS["neighborhood((s, s), 4)"],
    "causal()": MASKS["causal()"],
    "full()": MASKS["full()"],
}  # fmt: skip


def random_cells(density: float, unit: int, tokens: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which cells see which: so many of each row, drawn anew for each row; at least one."""
    cells = -(-tokens // unit)
    draw = np.random.default_rng(0).random((cells, cells)).argsort(axis=1)
    return draw < max(round(density * cells), 1)


def random_mask(density: float, unit: int) -> Mask:
    """Random blocks of which a row stores this share."""

    def mod(tokens: int) -> Mod:
        table = torch.tensor(random_cells(density, unit, tokens))
        return lambda b, h, q, k: table[q // unit, k // unit]

    return Mask(lambda n: P.from_blocks(random_cells(density, unit, n), unit=unit), mod, longest=1 << 18)


def _bigbird_mod(tokens: int) -> Mod:
    first = np.arange(0, tokens, 64)
    drawn = torch.tensor(P.random_blocks(3, unit=64, count=len(first)).allows(first[:, None], first))

    def mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        i, j = q // 64, k // 64
        return ((i - j).abs() <= 1) | (i < 2) | (j < 2) | drawn[i, j]

    return mod


def _morton_mod(tokens: int) -> Mod:
    pixels = torch.tensor(token_order((side(tokens), side(tokens)), "morton")[0])
    y, x = pixels // side(tokens), pixels % side(tokens)
    return lambda b, h, q, k: ((y[q] - y[k]).abs() <= 8) & ((x[q] - x[k]).abs() <= 8)


DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
# The masks that attention on a GPU is timed on; a length is the square of a power of two. A random mask's cells are as
# large as the blocks it is measured with.
GPU_MASKS: dict[str, Mask] = {
    "full()": MASKS["full()"],
    "causal()": MASKS["causal()"],
    "local(1024)": MASKS["local(1024)"],
    "causal() & local(4096)": Mask(
        lambda n: P.causal() & P.local(4096), lambda n: lambda b, h, q, k: (k <= q) & (q - k <= 4096)
    ),
    "documents(random, 64 to 8192)": Mask(lambda n: P.documents(mixed_lengths(n)), _documents_mod(mixed_lengths)),
    "butterfly(unit=128)": MASKS["butterfly(unit=128)"],
    "local(1024) | butterfly(unit=128)": Mask(
        lambda n: P.local(1024) | P.butterfly(unit=128),
        lambda n: lambda b, h, q, k: ((q - k).abs() <= 1024) | _power((q // 128) ^ (k // 128)),
    ),
    "bigbird()": Mask(lambda n: P.bigbird(), _bigbird_mod),
    "longformer(512, 64)": Mask(
        lambda n: P.longformer(512, 64), lambda n: lambda b, h, q, k: ((q - k).abs() <= 256) | (q < 64) | (k < 64)
    ),
    "neighborhood((s, s), 8, 'morton')": Mask(MASKS["neighborhood((s, s), 8, 'morton')"].pattern, _morton_mod),
    **{f"random({d}, unit={u})": random_mask(d, u) for u in (128, 64) for d in DENSITIES},
}  # fmt: skip
