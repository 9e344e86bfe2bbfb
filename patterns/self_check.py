"""A check of the methods of a pattern: its compiled masks must agree with ``allows``."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

from sparseflash.patterns.comparison import compare
from sparseflash.patterns.pattern import Pattern

LENGTHS = (1, 64, (100, 37), (33, 150), 200)
BLOCKS = (16, (32, 16), (16, 64), 64)
OFFSETS = (None, 0, 7)


def check(
    pattern: Pattern,
    lengths: Iterable[int | tuple[int, int]] = LENGTHS,
    blocks: Sequence[int | tuple[int, int]] = BLOCKS,
    offsets: Sequence[int | None] = OFFSETS,
) -> None:
    """Compile a pattern at many sizes and compare every pair of tokens with ``allows``.

    Run it on your own patterns before you use them: ``candidates`` that omit a block, or ``keys`` that are equal for
    different tiles, give a wrong mask without an error. With the environment variable ``SPARSEFLASH_DEBUG=1``, every
    compilation compares a sample of pairs.

    Args:
        pattern: the pattern to check.
        lengths: tokens, or (q_len, kv_len). Keep them small, because every pair is compared.
        blocks: tokens per block side, or (BQ, BK).
        offsets: positions of the first query; None is ``kv_len - q_len``.

    Raises:
        TypeError: pattern is not a Pattern.
        ValueError: names the first pair that differs and the method that seems to be wrong; or the pattern cannot have
            one of the lengths.

    Example:
        >>> from sparseflash import patterns as P
        >>> P.check(P.causal() & (P.local(20) | P.butterfly(unit=16)))
    """
    if not isinstance(pattern, Pattern):
        raise TypeError(f"check takes a pattern, got {type(pattern).__name__}")
    twin = copy.copy(pattern)
    if twin != pattern or hash(twin) != hash(pattern):
        raise ValueError(f"{pattern}: a copy is not equal to it, or has another hash: its fields must be comparable")
    for length in lengths:
        for block in blocks:
            for offset in offsets:
                mask = pattern.compile(length, block=block, q_offset=offset)
                compare(pattern, mask)
                mask.check()
