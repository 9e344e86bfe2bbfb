"""The largest score of each query, for ``AuxRequest(max_scores=True)``, which the kernels do not return.

Only stored blocks are computed, in chunks, by torch's matrix products. This costs about as much as a plain forward pass
over the same blocks, on any device.

Shape legend: q [B, Hq, N, D], k [B, Hkv, M, D]; n blocks of BQ x BK tokens in a chunk.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as FlexMask

from sparseflash.flex.converting import host_mask
from sparseflash.functional.arguments import checked_scale
from sparseflash.functional.attention import Mask
from sparseflash.functional.operands import under_autocast
from sparseflash.patterns.block_mask import BlockMask as SparseBlockMask
from sparseflash.patterns.tiles import tile_table, unpack

PAIRS_AT_ONCE = 1 << 22


def max_scores(
    q: Tensor,
    k: Tensor,
    mask: SparseBlockMask,
    scale: float | None,
    softcap: float | None,
    slopes: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """The largest of each query's scaled, capped and biased scores over the keys that it sees, [B, Hq, N].

    fp32 (fp64 for fp64 inputs), -inf for a query that sees no key; without a gradient, as in torch.
    """
    q, k = under_autocast(q, k)
    scale = checked_scale(scale, q.shape[-1])
    (bq, bk), (nq, nk), dtype = mask.block, mask.grid_shape, torch.promote_types(q.dtype, torch.float32)
    rows, cols, codes = mask.runs.blocks()
    words = tile_table(mask.tiles, bq, bk)
    best = torch.full((*q.shape[:2], nq, bq), -torch.inf, dtype=dtype, device=q.device)
    step = max(1, PAIRS_AT_ONCE // (bq * bk))
    group = q.shape[1] // k.shape[1]
    with torch.no_grad():
        queries = F.pad(q, (0, 0, 0, nq * bq - q.shape[2])).unflatten(2, (nq, bq))
        keys = F.pad(k, (0, 0, 0, nk * bk - k.shape[2])).unflatten(2, (nk, bk))
        for b, h in product(*map(range, q.shape[:2])):
            of_samples, of_heads = mask.pattern_of.shape
            pattern = mask.pattern_of[b % of_samples, h % of_heads]
            chosen = np.flatnonzero(rows // nq == pattern)
            for some in (chosen[begin : begin + step] for begin in range(0, chosen.size, step)):
                row, col = (torch.from_numpy(x).long().to(q.device) for x in (rows[some] % nq, cols[some]))
                scores = queries[b, h, row].to(dtype) @ keys[b, h // group, col].to(dtype).mT * scale
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                at, key = (torch.arange(side, device=q.device) for side in (bq, bk))
                at, key = (row[:, None] * bq + at)[..., None], (col[:, None] * bk + key)[:, None]
                away = key - at - mask.q_offset
                if slopes is not None:
                    slope = slopes[h] if slopes.dim() == 1 else slopes[b, h]
                    scores = scores - slope.to(dtype) * away.abs()
                if bias is not None and bias.dim() == 2:
                    reach = bias.shape[1] // 2
                    scores = scores + bias[h % bias.shape[0], reach + away.clamp(-reach, reach)]
                elif bias is not None:
                    of_head = bias[b % bias.shape[0], h % bias.shape[1]]
                    scores = scores + of_head[at.clamp(max=of_head.shape[0] - 1), key.clamp(max=of_head.shape[1] - 1)]
                seen = torch.from_numpy(unpack(words[codes[some]], bk)).to(q.device)
                largest = scores.masked_fill(~seen, -torch.inf).amax(-1)
                best[b, h].scatter_reduce_(0, row[:, None].expand(-1, bq), largest, "amax")
    return best.flatten(2)[..., : q.shape[2]]


def largest_scores(query: Tensor, key: Tensor, block_mask: Mask | FlexMask, *rest: Any) -> Tensor:
    """:func:`max_scores` over any mask that ``flex_attention`` takes."""
    return max_scores(query, key, host_mask(block_mask, query, key, "the largest scores"), *rest)
