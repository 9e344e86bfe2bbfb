"""Describe a batch's mask in one small tensor: padding, packed sequences, causal or not, windows, chunks.

Transformers calls a mask interface with a mask function. Ours does not materialise the mask: it evaluates the function
at O(N) pairs and records, for every key, where its sequence begins; ``placing.py`` adds what positions imply. The
result has four dims, because models pass such a mask on unchanged, also through ``generate`` and ``torch.compile``; it
is on the host, where tables are built.

A mask function can be more general than this description. So its values at both ends of every query's stretch of keys,
and at one more key per query, are compared with the description. If they differ (blocks of image tokens), the mask is
evaluated for every pair and its bits follow the description (``drawing.py``). A traced graph
cannot branch on that, so there the mask is marked, and refused when it is used.

Shape legend: B samples, H heads or 1, N new queries, M keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflash.integrations.transformers.drawing import bits_of, drawn, pair_by_pair, with_bits
from sparseflash.integrations.transformers.sequences import Piece

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

# Indices of the first ints of every row, which M origins follow.
MAGIC, CAUSAL, WINDOW, CHUNK, FIRST_QUERY, SEEN, CROSSING, FAULT, HEADER = range(9)
MAGIC_NUMBER = 0x5BA5CF1A  # marks our descriptions among masks
PADDING = -(1 << 31)  # in place of an origin
OWN_KEYS = -(1 << 31)  # in place of CROSSING: the keys are those of the queries' own sequence
# Values of FAULT: they depend on data, on which a traced graph cannot raise, so `read` raises the error.
FAITHFUL, ANOTHER_MASK, KEYS_MISSING, JUMP, PACKED_BEHIND_A_CACHE, LENGTHS, ADDS = range(7)
_ALONE = (
    "if they are a complete sequence, count its positions from 0; if they are one rank's part of a longer one, "
    "block_sparse would not see the other ranks' tokens: use sparseflash.distributed.context_parallel_attention"
)
FAULTS = {
    ANOTHER_MASK: "a compiled block_sparse supports causal, bidirectional, chunked and sliding-window models, padding "
    "and packed sequences, but this model has another mask (blocks of image tokens, for example): call it without "
    'torch.compile, or use attn_implementation="eager" or "sdpa"',
    KEYS_MISSING: f"position_ids begin beyond 0, but there is no cache with the tokens before them; {_ALONE}",
    JUMP: f"position_ids of a packed row restart at 0 for every sequence, but these jump to another position; {_ALONE}",
    PACKED_BEHIND_A_CACHE: "packed rows (position_ids that restart, cu_seq_lens_q) need an empty cache, but this "
    "one holds tokens already: give them in one call, or pass use_cache=False",
    LENGTHS: "cu_seq_lens_q and cu_seq_lens_k must be equal, not decrease, and run from 0 to the number of tokens of "
    "all rows, and no sequence may continue from one row into the next",
    ADDS: "block_sparse takes a 4-D attention_mask of booleans, or of 0 and -inf, but this one adds other numbers to "
    'the scores: use attn_implementation="eager" or "sdpa"',
}


@dataclass(frozen=True)
class Description:
    """A batch's mask. Keys are at positions 0 to M - 1, query i at ``first_query + i``."""

    causal: bool
    window: int | None  # causal: the newest `window` keys, the query's own included; else: keys up to `window` away
    first_query: int
    samples: tuple[tuple[Piece, ...], ...]  # one entry if all samples are equal
    chunk: int | None = None  # tokens per chunk: a query sees its own chunk, counted from the sequence's origin
    drawn: tuple[tuple[bytes, ...], ...] = ()  # bits [N, M] of each head of each sample, if the rules do not suffice
    crossing: tuple[int, ...] = ()  # in cross-attention: the position of the first query, of each sample

    def keys(self, q_len: int, kv_len: int) -> int:
        """How many of ``kv_len`` keys the mask covers: a static cache has room past the newest query."""
        return self.first_query + q_len if self.causal else kv_len


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
    """The description of a batch, int32 [B, 1, 1, HEADER + M]; Transformers calls it as its mask interface.

    If the mask was evaluated for every pair, [B, 1, 1 + R, HEADER + M]: R rows of bits follow.
    """
    query = torch.arange(q_length, device=device) + q_offset
    sample = torch.arange(batch_size, device=device)[:, None].expand(-1, q_length)
    head = torch.zeros((), dtype=torch.long, device=device)
    ask = pair_by_pair(mask_function) if use_vmap else mask_function
    last = kv_offset + kv_length - 1

    def allowed(k: Tensor) -> Tensor:
        """[B, N]: whether each query may see key k [B or 1, N]; False if there is no such key."""
        k = k.expand(batch_size, -1)
        answer = ask(sample, head, query.expand(batch_size, -1), k.clamp(kv_offset, last))
        return (answer & (k >= kv_offset) & (k <= last)).expand(batch_size, q_length)

    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    chunk, window = (local_size, None) if chunked else (None, local_size)
    start = torch.full((batch_size, q_length), kv_offset, device=device)
    stop = start + kv_length
    # Only whole sequences are packed; one begins where a query does not see the token before it. With a window of one
    # token no query does, so nothing can be concluded.
    if q_length == kv_length and local_size != 1:
        begins = ~allowed(query[None] - 1)
        if chunk:  # a chunk begins like this too, but with a whole chunk before it
            newest = torch.where(begins, query, kv_offset).cummax(1).values
            begins &= query - torch.nn.functional.pad(newest[:, :-1], (1, 0), value=kv_offset) != chunk
        start = torch.where(begins, query, kv_offset).cummax(1).values
        after = torch.where(begins, query, kv_offset + kv_length).flip(1).cummin(1).values.flip(1)
        stop = torch.cat([after[:, 1:], stop[:, :1]], 1)

    first = torch.zeros_like(start[:, :1])  # first token of each row
    live = torch.ones((batch_size, kv_length), dtype=torch.bool, device=device)
    if attention_mask is not None:
        # A cache may have room for more keys than there are, and may have dropped the oldest.
        missing = max(kv_offset + kv_length - attention_mask.shape[-1], 0)
        everything = torch.nn.functional.pad(attention_mask.bool(), (0, missing))
        live = everything[:, kv_offset : kv_offset + kv_length]
        first = everything.long().argmax(1, keepdim=True)
    begin = torch.maximum(start, first) if q_length == kv_length else first

    causal = ~(allowed(query[None] + 1) & (query + 1 < stop)).any()
    low, high = start, torch.where(causal, query + 1, stop)
    if chunk:
        low = torch.maximum(start, begin + (query - begin).div(chunk, rounding_mode="floor") * chunk)
    if window is not None:
        low = torch.maximum(start, query - window + causal.long())
        high = torch.minimum(high, query + window + 1)
    picked = (query * 7919 + 13) % kv_length + kv_offset
    ends = allowed(low) & allowed(high - 1) & ~(allowed(low - 1) | allowed(high))
    ends &= allowed(picked[None]) == ((picked >= low) & (picked < high))

    def written(begin: Tensor, causal: Tensor | int, window: int, chunk: int, fault: Tensor | int) -> Tensor:
        header = [MAGIC_NUMBER, causal, window, chunk, query[0] - kv_offset, query[0], OWN_KEYS, fault]
        row = torch.stack([torch.as_tensor(number, device=device).long() for number in header])
        origin = torch.where(live, begin - kv_offset, PADDING)
        return torch.cat([row.expand(batch_size, -1), origin], 1).int()[:, None, None].cpu()

    described = written(begin, causal, window or 0, chunk or 0, torch.where(ends.all(), FAITHFUL, ANOTHER_MASK))
    if torch.compiler.is_compiling() or described[0, 0, 0, FAULT] == FAITHFUL:
        return described
    keys = torch.arange(kv_length, device=device) + kv_offset
    return with_bits(written(first, 0, 0, 0, FAITHFUL), drawn(mask_function, batch_size, query, keys, use_vmap))


def of_drawn(mask: Tensor, batch: int, q_len: int, kv_len: int) -> Tensor:
    """The description of a 4-D mask: bool [B or 1, H or 1, N or 1, M], or floating with 0 for True and -inf for False.

    Rows are taken as whole sequences, with the last query aligned with the last key.

    Raises:
        ValueError: a mask with other values or of another shape.
    """
    sizes = ((1, batch), mask.shape[1:2], (1, q_len), (kv_len,))
    if not (mask.dtype == torch.bool or mask.is_floating_point()) or mask.dim() != 4:
        raise ValueError(_NOT_A_MASK.format(dtype=mask.dtype, shape=tuple(mask.shape)))
    if any(size not in among for size, among in zip(mask.shape, sizes, strict=True)):
        raise ValueError(
            f"a 4-D attention_mask of {batch} samples, {q_len} queries and {kv_len} keys is [{batch} or 1, heads or 1, "
            f"{q_len} or 1, {kv_len}], got {list(mask.shape)}"
        )
    fault = torch.tensor(FAITHFUL)
    if mask.is_floating_point():
        kept = mask == 0
        fault = torch.where((kept | (mask <= torch.finfo(mask.dtype).min / 2)).all(), FAITHFUL, ADDS).cpu()
        mask = kept
    numbers = (MAGIC_NUMBER, 0, 0, 0, kv_len - q_len, kv_len - q_len, OWN_KEYS)
    header = torch.cat([torch.tensor(numbers), fault.reshape(1), torch.zeros(kv_len, dtype=torch.long)]).int()
    return with_bits(header.expand(batch, 1, 1, -1), mask.expand(batch, -1, q_len, -1))


_NOT_A_MASK = (
    "block_sparse takes the 2-D attention_mask of a tokenizer (1 for tokens, 0 for padding) or a 4-D one of booleans, "
    "got {dtype} of shape {shape}; any other mask goes into the pattern"
)


def read(mask: Tensor, q_len: int, kv_len: int) -> Description:
    """Decode a tensor that :func:`describe` made, for q [.., q_len, ..] and k [.., kv_len, ..].

    Raises:
        ValueError: another kind of mask, one for other lengths, or one that is marked with a fault.
    """
    rows = mask.cpu().numpy()  # hooks that distribute a model over devices move masks too
    if mask.dim() != 4 or rows.shape[-1] < HEADER or rows[0, 0, 0, MAGIC] != MAGIC_NUMBER:
        raise ValueError(_NOT_A_MASK.format(dtype=mask.dtype, shape=tuple(mask.shape)))
    if rows.shape[-1] - HEADER != kv_len:
        raise ValueError(f"the mask is for {rows.shape[-1] - HEADER} keys, the model has {kv_len}")
    return _read(rows.tobytes(), rows.shape, q_len)


@lru_cache(maxsize=16)  # small: the keys are as long as the batches
def _read(ints: bytes, shape: tuple[int, ...], q_len: int) -> Description:
    everything = np.frombuffer(ints, np.int32).reshape(shape)
    rows, there = everything[:, 0, 0], shape[-1] - HEADER
    header = rows[0, :HEADER].tolist()
    if fault := int(rows[:, FAULT].max()):
        raise ValueError(FAULTS[fault])
    told = Description(bool(header[CAUSAL]), header[WINDOW] or None, header[FIRST_QUERY], (), header[CHUNK] or None)
    keys = told.keys(q_len, there)
    samples = [_pieces(row) for row in rows[:, HEADER : HEADER + keys]]
    bits = bits_of(everything, q_len * there)
    crossing = [] if header[CROSSING] == OWN_KEYS else rows[:, CROSSING].tolist()
    if all(one == several[0] for several in (samples, bits, crossing) for one in several):
        del samples[1:], bits[1:], crossing[1:]
    return replace(told, samples=tuple(samples), drawn=tuple(bits), crossing=tuple(crossing))


def _pieces(origin: NDArray[np.int32]) -> tuple[Piece, ...]:
    """Stretches of equal origins, without padding."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(origin)) + 1, [origin.size]])
    stretches = zip(edges[:-1].tolist(), edges[1:].tolist(), origin[edges[:-1]].tolist(), strict=True)
    return tuple(piece for piece in stretches if piece[2] != PADDING)
