"""What a model says about its batch, as one small tensor: padding, packed sequences, causal or not, sliding window.

Transformers hands a mask function to whoever draws the mask. Ours draws none: it asks that function O(N) questions and
writes down, for every key, where its sequence begins; ``placing.py`` adds what positions say. The answer is a tensor
of four dims, because models pass such a mask on untouched, also through ``generate`` and ``torch.compile``; it lies on
the host, where tables are made.

A mask function can say more than this description holds. So its answers at both ends of every query's stretch of keys
are compared with the description, and what does not agree is refused when the mask is used.

Shape legend: B samples, N new queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflash.integrations.transformers.sequences import Piece

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# The first ints of every row; then follow M origins.
MAGIC, CAUSAL, WINDOW, FIRST_QUERY, SEEN, FAULT, HEADER = range(7)
MAGIC_NUMBER = 0x5BA5CF1A  # no mask of anyone else begins with it
PADDING = -(1 << 31)  # in place of an origin
# What FAULT says: data decide it, which a graph that is being traced cannot ask, so the error waits for the reader.
FAITHFUL, ANOTHER_MASK, KEYS_MISSING, JUMP, PACKED_BEHIND_A_CACHE, LENGTHS = range(6)
_ALONE = (
    "if they are one sequence of their own, count its positions from 0; if they are one rank's part of a longer one, "
    "block_sparse would not see the others' tokens: sparseflash.distributed.context_parallel_attention does"
)
FAULTS = {
    ANOTHER_MASK: "block_sparse knows causal, bidirectional and sliding-window models, padding and packed sequences, "
    "but this model asks for another mask (blocks of image tokens, for example): "
    'use attn_implementation="eager" or "sdpa"',
    KEYS_MISSING: f"position_ids begin beyond 0, but there is no cache with the tokens before them; {_ALONE}",
    JUMP: "position_ids of a packed row begin again at 0 for every sequence, but these go on at another position; "
    f"{_ALONE}",
    PACKED_BEHIND_A_CACHE: "packed rows (position_ids that begin again, cu_seq_lens_q) need an empty cache, but this "
    "one holds tokens already: give them in one call, or pass use_cache=False",
    LENGTHS: "cu_seq_lens_q and cu_seq_lens_k must be equal, rise from 0 to the number of tokens of all rows together, "
    "and let no sequence go on from one row into the next",
}


@dataclass(frozen=True)
class Description:
    """A batch's mask. Keys stand at 0 to M - 1, query i at ``first_query + i``."""

    causal: bool
    window: int | None  # causal: the newest `window` keys, the query's own included; else: keys up to `window` away
    first_query: int
    samples: tuple[tuple[Piece, ...], ...]  # one entry if all samples are alike


def describe(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    *,
    mask_function: MaskFunction,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **unused: Any,
) -> Tensor:
    """The description of a batch, int32 [B, 1, 1, HEADER + M]; called by Transformers as a mask function.

    Raises:
        ValueError: a mask that is known not to fit before it is looked at.
    """
    if use_vmap:
        raise ValueError(
            "block_sparse takes no extra mask functions (or_mask_function, and_mask_function): say it in the pattern, "
            'or use attn_implementation="eager" or "sdpa"'
        )
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise ValueError(
            f"block_sparse does not know chunked attention (attention_chunk_size={local_size}): "
            'use attn_implementation="eager" or "sdpa"'
        )
    query = torch.arange(q_length, device=device) + q_offset
    sample = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((1, 1), dtype=torch.long, device=device)

    def allowed(k: Tensor) -> Tensor:
        """[B, N]: may each query see key k [B or 1, N], where there is such a key?"""
        inside = (k >= kv_offset) & (k < kv_offset + kv_length)
        answer = mask_function(sample, head, query[None], k.clamp(kv_offset, kv_offset + kv_length - 1))
        return (answer & inside).expand(batch_size, q_length)

    start = torch.full((batch_size, q_length), kv_offset, device=device)
    stop = start + kv_length
    # Only whole sequences are packed; one begins where a query does not see its predecessor. A window of one token
    # shows no query its predecessor, and says nothing.
    if q_length == kv_length and local_size != 1:
        begins = ~allowed(query[None] - 1)
        start = torch.where(begins, query, kv_offset).cummax(1).values
        after = torch.where(begins, query, kv_offset + kv_length).flip(1).cummin(1).values.flip(1)
        stop = torch.cat([after[:, 1:], stop[:, :1]], 1)
    causal = ~(allowed(query[None] + 1) & (query + 1 < stop)).any()
    low, high = start, torch.where(causal, query + 1, stop)
    if local_size is not None:
        low = torch.maximum(start, query - local_size + causal.long())
        high = torch.minimum(high, query + local_size + 1)
    ends = allowed(low) & allowed(high - 1) & ~(allowed(low - 1) | allowed(high))

    begin = start if q_length == kv_length else torch.zeros_like(start[:, :1])
    live = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    if attention_mask is not None:
        # A cache may have room for more keys than there are, and may have dropped the oldest.
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        everything = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        live = everything[:, kv_offset : kv_offset + kv_length]
        begin = torch.maximum(begin, everything.long().argmax(1, keepdim=True))
    origin = torch.where(live, begin - kv_offset, PADDING)

    fault = torch.where(ends.all(), FAITHFUL, ANOTHER_MASK)
    header = [MAGIC_NUMBER, causal, local_size or 0, query[0] - kv_offset, query[0], fault]
    row = torch.stack([torch.as_tensor(number, device=device).long() for number in header])
    described = torch.cat([row.expand(batch_size, -1), origin], 1).int()
    return described[:, None, None].cpu()


def read(mask: Tensor, q_len: int, kv_len: int) -> Description:
    """The description in a tensor that :func:`describe` made, for q [.., q_len, ..] and k [.., kv_len, ..].

    Keys past the newest query's position are no longer spoken of: a static cache has room there.

    Raises:
        ValueError: another kind of mask, one for other lengths, or one that the description does not do justice to.
    """
    rows = mask.flatten(0, -2).cpu().numpy()  # hooks that spread a model over devices move masks too
    if mask.dim() != 4 or rows.shape[1] < HEADER or rows[0, MAGIC] != MAGIC_NUMBER:
        raise ValueError(
            "block_sparse takes the 2-D attention_mask of a tokenizer (1 for tokens, 0 for padding), got a mask of "
            f"shape {tuple(mask.shape)}; say who sees whom in the pattern"
        )
    if rows.shape[1] - HEADER != kv_len:
        raise ValueError(f"the mask is for {rows.shape[1] - HEADER} keys, the model has {kv_len}")
    return _read(rows.tobytes(), len(rows), q_len)


@lru_cache(maxsize=16)  # of few batches at a time; its keys are as long as they are
def _read(ints: bytes, samples: int, q_len: int) -> Description:
    rows = np.frombuffer(ints, np.int32).reshape(samples, -1)
    header = rows[0, :HEADER].tolist()
    causal, first, keys = bool(header[CAUSAL]), header[FIRST_QUERY], header[FIRST_QUERY] + q_len
    if fault := int(rows[:, FAULT].max()):
        raise ValueError(FAULTS[fault])
    there = rows.shape[1] - HEADER
    if not causal and keys != there:
        raise ValueError(
            f"a pattern is about the tokens of one sequence, but here {q_len} queries look at {there} keys of another "
            'one (cross-attention): use attn_implementation="eager" or "sdpa"'
        )
    pieces = [_pieces(row) for row in rows[:, HEADER : HEADER + keys]]
    if all(piece == pieces[0] for piece in pieces):
        del pieces[1:]
    return Description(causal, header[WINDOW] or None, first, tuple(pieces))


def _pieces(origin: NDArray[np.int32]) -> tuple[Piece, ...]:
    """Stretches of equal origins, padding left out."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(origin)) + 1, [origin.size]])
    stretches = zip(edges[:-1].tolist(), edges[1:].tolist(), origin[edges[:-1]].tolist(), strict=True)
    return tuple(piece for piece in stretches if piece[2] != PADDING)
