"""Softcap, ALiBi and dropout on a CPU: what happens to scores before the softmax, and to probabilities after it.

Shape legend: H key heads, G query heads that share one, R block rows, X queries a row, E entries a row, L keys of
them, BQ x BK tokens a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sparseflash.kernels import dropout
from sparseflash.kernels.layout import Score

LOG2_E = 1 / math.log(2)


@dataclass(frozen=True)
class Where:
    """Which scores a batch [H, G, R, X, L] holds."""

    heads: torch.Tensor  # int64 [H, G] flat (sample, query head)
    rows: torch.Tensor  # int64 [R] block rows
    cols: torch.Tensor  # int64 [R or 1, E] key blocks


class Shaping:
    """The features of a score for the batches of one call."""

    def __init__(self, score: Score, batch: int, q_heads: int, block: tuple[int, int]) -> None:
        self.score, self.block = score, block
        # Products are multiplied by this before they come here: a score is to be in base 2 in the end.
        self.factor = score.scale * (1.0 if score.featured else LOG2_E)
        self.limit = dropout.threshold(score.dropout)
        self.slopes = None if score.slopes is None else score.slopes.expand(batch, q_heads).reshape(-1)
        # What dropout's survivors are multiplied by.
        self.retained = 1.0 if score.seed is None else dropout.ONE / self.limit

    def largest(self, product: float, tokens: int) -> float:
        """A bound of scores, on their way too, from one of products; for so many queries and keys."""
        bound = product * max(1.0, self.score.scale)
        if self.slopes is not None:
            bound += float(self.slopes.abs().max()) * (tokens + abs(self.score.q_offset))
        return 2 * bound  # more than log2(e)

    def scores(self, products: torch.Tensor, where: Where, bent: bool = False) -> torch.Tensor | None:
        """Products [H, G, R, X, L] times `factor` to scores in base 2, in place; if `bent`, the derivative unless 1."""
        bend = None
        if self.score.softcap is not None:
            products.div_(self.score.softcap).tanh_()
            bend = 1 - products.square() if bent else None
            products.mul_(self.score.softcap)
        if self.slopes is not None:
            queries = self._queries(where, products) + self.score.q_offset
            distance = (queries.unsqueeze(-1) - self._keys(where, products)).abs()
            slopes = self.slopes[where.heads][..., None, None, None].to(products.dtype)
            products.addcmul_(slopes, distance.to(products.dtype), value=-1)
        products.mul_(LOG2_E)
        return bend

    def drop(self, p: torch.Tensor, where: Where) -> None:
        """Make probabilities [H, G, R, X, L] 0 where dropout does."""
        if (dropped := self.dropped(p, where)) is not None:
            p.masked_fill_(dropped, 0)

    def dropped(self, scores: torch.Tensor, where: Where) -> torch.Tensor | None:
        """Which probabilities [H, G, R, X, L] dropout makes 0; None without dropout."""
        if self.score.seed is None:
            return None
        keys = dropout.row_keys(self.score.seed, where.heads[..., None, None], self._queries(where, scores))
        return ~dropout.kept(keys.unsqueeze(-1), self._keys(where, scores), self.limit)

    def _queries(self, where: Where, scores: torch.Tensor) -> torch.Tensor:
        """Indices [R, X] of the queries of scores [..., X, L]."""
        return (where.rows.unsqueeze(-1) * self.block[0] + torch.arange(self.block[0]))[:, : scores.shape[-2]]

    def _keys(self, where: Where, scores: torch.Tensor) -> torch.Tensor:
        """Indices [R or 1, 1, L] of the keys of scores [..., X, L]."""
        tokens = where.cols.unsqueeze(-1) * self.block[1] + torch.arange(self.block[1])
        return tokens.flatten(1)[:, None, : scores.shape[-1]]
