"""What attention must do at least, how fast a card can do it, and what the FlashAttention paper says it moves.

Nothing here is measured. Useful work counts the pairs of a query and a key that the mask allows, not the rest of the
blocks that a kernel goes through with them: waste in PARTIAL blocks shows as a lower share.

Shape legend: N queries, M keys, D and Dv head dims; Hq query heads, Hkv key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Pass = Literal["fwd", "bwd"]
PASSES: tuple[Pass, ...] = ("fwd", "bwd")


@dataclass(frozen=True)
class Rates:
    """What a card does in a second, measured on it: see `benchmarks.gpu.rates`.

    Attributes:
        matrix: floating-point operations of a large product.
        exponentials: exp2 in fp32.
        bytes: read and written by a copy.
    """

    matrix: float
    exponentials: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What one call of attention must do.

    Attributes:
        operations: floating-point operations of its matrix products.
        exponentials: probabilities that it computes.
        bytes: operands and results, each read or written once.
    """

    operations: float
    exponentials: float
    bytes: float

    def floor(self, rates: Rates) -> tuple[float, str]:
        """Seconds below which no kernel gets on this card, and what sets them."""
        needs = {
            "matrix": self.operations / rates.matrix,
            "exponentials": self.exponentials / rates.exponentials,
            "bytes": self.bytes / rates.bytes,
        }
        bound = max(needs, key=needs.__getitem__)
        return needs[bound], bound


def attention_work(
    which: Pass, pairs: float, batch: int, heads: int, kv_heads: int, seq_len: int, head_dim: int, itemsize: int
) -> Work:
    """The work of one pass of self-attention with Dv = D, of which each head allows so many pairs.

    Two products forward: 4 D operations a pair. Five backward: S and dP again, then dV, dK and dQ, 10 D a pair; as in
    the FlashAttention papers, recomputing S counts, and each probability is recomputed once.
    """
    operands = batch * (heads + 2 * kv_heads) * seq_len * head_dim * itemsize  # q, k, v, or their gradients
    result = batch * heads * seq_len * head_dim * itemsize  # out, or dout
    lse = batch * heads * seq_len * 4
    all_pairs = batch * heads * pairs
    if which == "fwd":
        return Work(4 * head_dim * all_pairs, all_pairs, operands + result + lse)
    return Work(10 * head_dim * all_pairs, all_pairs, 2 * operands + 2 * result + lse)


def io_elements(seq_len: int, head_dim: int, density: float, on_chip: float) -> float:
    """Elements that block-sparse FlashAttention moves between memory and chip, for one head.

    N d + N^2 d^2 s / M with the constants left at 1: Dao et al. (2022), "FlashAttention", arXiv 2205.14135, Proposition
    4; with s = 1 the second bound of its Theorem 2. s is the share of blocks that are stored, M the elements that fit
    on the chip, at least d and at most N d.
    """
    return seq_len * head_dim + seq_len**2 * head_dim**2 * density / on_chip


def dense_io_elements(seq_len: int, head_dim: int) -> float:
    """Elements that attention moves which writes its scores out: N d + N^2, the first bound of Theorem 2."""
    return seq_len * head_dim + seq_len**2


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The e of y = c x^e by least squares on logarithms; None for fewer than two distinct x."""
    if len(set(x)) < 2:
        return None
    return float(np.polynomial.Polynomial.fit(np.log(x), np.log(y), 1).convert().coef[1])
