"""Functions that run on the host and cause a graph break when a compiled function calls them.

A separate module, imported only while a graph is traced: ``torch.compiler.disable`` imports the compiler, which takes
seconds.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparseflash.flex.block_mask import BlockMask as FlexBlockMask
from sparseflash.flex.converting import all_pairs as _all_pairs
from sparseflash.flex.converting import from_torch
from sparseflash.flex.making import make
from sparseflash.flex.max_scores import largest_scores as _largest_scores
from sparseflash.flex.scoring import Scored
from sparseflash.flex.scoring import scored as _scored
from sparseflash.patterns.block_mask import BlockMask

_REASON = (
    "sparseflash builds a block mask on the host, outside of graphs: call {} outside of the compiled function and "
    "pass the result in, or leave out fullgraph=True"
)
_ALIBI = (
    "alibi_slopes without a block_mask, for unequal numbers of queries and keys, need a mask built on the host, "
    "outside of graphs: create block_mask=create_block_mask(noop_mask, None, None, q_len, kv_len) outside of the "
    "compiled function, or leave out fullgraph=True"
)
_MAX = (
    "the largest scores are computed from the mask on the host, outside of graphs: request AuxRequest(max_scores=True) "
    "outside of the compiled function, or leave out fullgraph=True"
)
_SCORE = (
    "a score_mod is recognised on the host, outside of graphs: use softcap= or alibi_slopes= of flex_attention, mask "
    "in the block mask, or leave out fullgraph=True"
)
_convert = "sparseflash.integrations.flex.from_flex"
made: Callable[..., FlexBlockMask] = torch.compiler.disable(make, reason=_REASON.format("create_block_mask"))
converted: Callable[..., BlockMask] = torch.compiler.disable(from_torch, reason=_REASON.format(_convert))
all_pairs: Callable[..., BlockMask] = torch.compiler.disable(_all_pairs, reason=_ALIBI)
scored: Callable[..., Scored] = torch.compiler.disable(_scored, reason=_SCORE)
largest_scores: Callable[..., torch.Tensor] = torch.compiler.disable(_largest_scores, reason=_MAX)
