"""Patterns of cross-attention, over (tokens of the decoder, tokens of the encoder).

Transformers does not pass the positions of the queries to cross-attention: with a cache they are the newest tokens of a
sequence that only self-attention sees. The self-attention of the same layer runs first, with a description of the
decoder's batch, which has the number of earlier tokens and the start of each sequence. So positions on both sides are
counted from the first token of their sequence. Without such a description the call is refused; nothing is guessed.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from sparseflash.integrations.transformers.masks import CROSSING, read

WITHOUT = 'or leave "cross" out of block_sparse_pattern'


class Queries(NamedTuple):
    """The description, q_len and kv_len of a layer's self-attention."""

    mask: Tensor
    batch: int
    q_len: int
    kv_len: int


def across(module: nn.Module, mask: Tensor, queries: Queries | None, batch: int, q_len: int, kv_len: int) -> Tensor:
    """The description of the encoder's tokens, [B, 1, 1, HEADER + M], with the position of the first query in it.

    Raises:
        ValueError: the positions of the queries are unknown; packed rows on either side; a mask that hides more than
            padding.
    """
    name = type(module).__name__
    if queries is None or (queries.batch, queries.q_len) != (batch, q_len):
        raise ValueError(
            f"{name} has a pattern for cross-attention, but the positions of its {q_len} queries are unknown (they "
            "come from self-attention of the same layer, unless that is compiled, has a 4-D mask with a cache, or runs "
            f"later): call the model without torch.compile, with use_cache=False, {WITHOUT}"
        )
    keys, own = read(mask, q_len, kv_len), read(queries.mask, queries.q_len, queries.kv_len)
    if keys.drawn or keys.causal or keys.window or keys.chunk:
        raise ValueError(
            f"{name} has a pattern for cross-attention, and a mask that hides more of the encoder's tokens than "
            f"padding: give a 2-D attention_mask, {WITHOUT}"
        )
    origins = [{origin for _, _, origin in pieces} for pieces in (*keys.samples, *own.samples)]
    if any(len(several) > 1 for several in origins):
        raise ValueError(
            f"{name} has a pattern for cross-attention, but the rows are packed, and which sequences of decoder and "
            f"encoder belong together is unknown: give one sequence per row, {WITHOUT}"
        )
    first = [own.first_query - max(origin, default=0) for origin in origins[len(keys.samples) :]]
    placed = mask.expand(batch, -1, -1, -1).clone()
    placed[..., CROSSING] = mask.new_tensor(first)[:, None, None]
    return placed
