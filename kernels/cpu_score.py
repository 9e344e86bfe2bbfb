"""Softcap, ALiBi and dropout on a CPU: what happens to scores before the softmax, and to probabilities after it.

Shape legend as in cpu: H heads, R block rows, E entries a row, BQ x BK tokens a block.
"""

from __future__ import annotations

import torch

from sparseflash.kernels import dropout
from sparseflash.kernels.layout import Score


class Shaping:
    """The features of a score for the steps of one call."""

    def __init__(self, score: Score, batch: int, q_heads: int, block: tuple[int, int]) -> None:
        self.score, self.block = score, block
        self.limit = dropout.threshold(score.dropout)
        self.slopes = None if score.slopes is None else score.slopes.expand(batch, q_heads).reshape(-1)
        # What dropout's survivors are multiplied by.
        self.retained = 1.0 if score.seed is None else dropout.ONE / self.limit

    def scores(
        self, products: torch.Tensor, heads: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, bent: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scaled products [H, R, BQ, E * BK] to scores, in place; if `bent`, also the derivative, unless it is 1."""
        bend = None
        if self.score.softcap is not None:
            products.div_(self.score.softcap).tanh_()
            bend = 1 - products.square() if bent else None
            products.mul_(self.score.softcap)
        if self.slopes is not None:
            queries = self._tokens(rows, 0) + self.score.q_offset
            distance = (queries.unsqueeze(-1) - self._tokens(cols, 1).flatten(1).unsqueeze(1)).abs()
            slopes = self.slopes[heads, None, None, None].to(products.dtype)
            products.addcmul_(slopes, distance.to(products.dtype), value=-1)
        return products, bend

    def dropped(self, heads: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor | None:
        """Which probabilities [H, R, BQ, E * BK] dropout makes 0; None without dropout."""
        if self.score.seed is None:
            return None
        keys = dropout.row_keys(self.score.seed, heads[:, None, None], self._tokens(rows, 0))
        return ~dropout.kept(keys.unsqueeze(-1), self._tokens(cols, 1).flatten(1).unsqueeze(1), self.limit)

    def _tokens(self, blocks: torch.Tensor, axis: int) -> torch.Tensor:
        """Block indices [...] to the indices of their tokens [..., BQ or BK]."""
        return blocks.unsqueeze(-1) * self.block[axis] + torch.arange(self.block[axis])
