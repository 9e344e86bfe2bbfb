"""Patterns of cross-attention, over (tokens of the decoder, tokens of the encoder).

A layer's cross-attention is not told the positions of its queries: with a cache they are the newest tokens of a
sequence that only self-attention sees. The self-attention of the same layer runs first, with a description of the
decoder's batch that tells how many tokens came before and where each sequence begins. Both sides then count from the
first token of their sequence. Without such a description the call is refused.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from sparseflash.integrations.transformers.masks import CROSSING, read

WITHOUT = 'or leave "cross" out of block_sparse_pattern'


class Queries(NamedTuple):
    """What a layer's self-attention was told about the queries: its description, q_len and kv_len."""

    mask: Tensor
    batch: int
    q_len: int
    kv_len: int


def across(module: nn.Module, mask: Tensor, queries: Queries | None, batch: int, q_len: int, kv_len: int) -> Tensor:
    """The description of the encoder's tokens, [B, 1, 1, HEADER + M], with the position of the first query in it.

    Raises:
        ValueError: unknown positions of the queries; packed rows on either side; a mask that hides more than padding.
    """
    name = type(module).__name__
    if queries is None or (queries.batch, queries.q_len) != (batch, q_len):
        raise ValueError(
            f"{name} has a pattern for cross-attention, but nothing says at which positions its {q_len} queries stand "
            "(self-attention of the same layer does, unless it is compiled, has a 4-D mask behind a cache, or comes "
            f"later): call the model without torch.compile, with use_cache=False, {WITHOUT}"
        )
    keys, own = read(mask, q_len, kv_len), read(queries.mask, queries.q_len, queries.kv_len)
    if keys.drawn or keys.causal or keys.window or keys.chunk:
        raise ValueError(
            f"{name} has a pattern for cross-attention, and a mask that says more of the encoder's tokens than which "
            f"are padding: give a 2-D attention_mask, {WITHOUT}"
        )
    origins = [{origin for _, _, origin in pieces} for pieces in (*keys.samples, *own.samples)]
    if any(len(several) > 1 for several in origins):
        raise ValueError(
            f"{name} has a pattern for cross-attention, but the rows are packed, and nothing says which sequences of "
            f"decoder and encoder belong together: give one a row, {WITHOUT}"
        )
    first = [own.first_query - max(origin, default=0) for origin in origins[len(keys.samples) :]]
    placed = mask.expand(batch, -1, -1, -1).clone()
    placed[..., CROSSING] = mask.new_tensor(first)[:, None, None]
    return placed
