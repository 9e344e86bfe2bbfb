"""Packed rows from what models pass to their attention: ``position_ids`` that restart, and ``cu_seq_lens_q``.

Transformers detects packed sequences when it creates masks, and only without a cache and without an attention_mask;
FlashAttention detects them in the attention. So do we: the description of a batch is restricted to the sequences that
positions or lengths define, whatever the mask. All of it is tensor arithmetic, which compiled graphs support; an error
is recorded in the description as a fault, which its reader raises.

Shape legend: B samples, N new queries, M keys, S sequences of all rows together.
"""

from __future__ import annotations

from weakref import ReferenceType, ref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sparseflash.integrations.transformers.masks import (
    ANOTHER_MASK,
    FAULT,
    FIRST_QUERY,
    HEADER,
    JUMP,
    KEYS_MISSING,
    LENGTHS,
    PACKED_BEHIND_A_CACHE,
    PADDING,
    SEEN,
)

# Some models count positions from 1, RoBERTa and its relatives from 2.
LARGEST_FIRST = 2
# All layers of a forward pass share one description and one set of positions: they are combined once.
_placed: WeakIdKeyDictionary = WeakIdKeyDictionary()


def placed(
    mask: Tensor,
    batch: int,
    q_len: int,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
) -> Tensor:
    """The description ``mask`` [B or 1, H, 1 + R, HEADER + M] restricted to the sequences of positions and lengths.

    Args:
        mask: as :func:`describe` makes it.
        batch: B.
        q_len: N.
        position_ids: [B or 1, N]; ignored in any other shape (several axes of an image). Where they do not increase by
            1, a sequence begins. Rows with padding are not changed, since positions of padding are arbitrary.
        cu_seq_lens_q: int [S + 1], where each sequence begins in the concatenated rows, and the end of the last.
        cu_seq_lens_k: equal to ``cu_seq_lens_q``.
    """
    lengths = cu_seq_lens_q if cu_seq_lens_q is not None else cu_seq_lens_k
    positions = _of_tokens(position_ids, batch, q_len)
    if lengths is None and (positions is None or (q_len == 1 and mask.shape[-1] - HEADER > 1)):
        return mask
    told = (positions, lengths, cu_seq_lens_k)
    if torch.compiler.is_compiling():
        return _placed_anew(mask, batch, q_len, *told)
    known = _placed.get(mask)
    if known is None or not known[0].holds(told, batch, q_len):
        _placed[mask] = known = (_Key(told, batch, q_len), _placed_anew(mask, batch, q_len, *told))
    answer: Tensor = known[1]
    return answer


class _Key:
    """Tensors by identity and version, without keeping them alive."""

    def __init__(self, told: tuple[Tensor | None, ...], batch: int, q_len: int) -> None:
        self.shape = batch, q_len
        self.seen: list[tuple[ReferenceType[Tensor], int] | None] = [
            None if x is None else (ref(x), _version(x)) for x in told
        ]

    def holds(self, told: tuple[Tensor | None, ...], batch: int, q_len: int) -> bool:
        return self.shape == (batch, q_len) and all(
            (x is None) if old is None else (x is not None and old[0]() is x and old[1] == _version(x))
            for old, x in zip(self.seen, told, strict=True)
        )


def _version(x: Tensor) -> int:
    return -1 if x.is_inference() else x._version


def _of_tokens(position_ids: Tensor | None, batch: int, q_len: int) -> Tensor | None:
    if position_ids is None or position_ids.is_floating_point() or position_ids.dim() > 2:
        return None
    if position_ids.shape[-1] != q_len or (position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch)):
        return None
    return position_ids


def _placed_anew(
    mask: Tensor, batch: int, q_len: int, positions: Tensor | None, lengths: Tensor | None, others: Tensor | None
) -> Tensor:
    rows = mask[:, 0, 0].cpu()
    header, origin = rows[:, :HEADER].expand(batch, -1), rows[:, HEADER:].expand(batch, -1)
    first, seen, fault = (header[:, i : i + 1] for i in (FIRST_QUERY, SEEN, FAULT))
    token, key = torch.arange(q_len), torch.arange(origin.shape[1])
    start = torch.zeros((batch, q_len), dtype=torch.long)
    if positions is not None:
        at = positions.cpu().long().expand(batch, -1)
        padded = ((origin == PADDING) & (key < first + q_len)).any(1, keepdim=True)
        jumps = torch.nn.functional.pad(at.diff(dim=1) != 1, (1, 0)) & ~padded
        start = torch.where(jumps, token, 0).cummax(1).values
        # Later faults are more specific, and replace earlier ones.
        fault = _blame(fault, jumps & (first > 0), PACKED_BEHIND_A_CACHE)
        fault = _blame(fault, jumps & (at != 0) & (at != at[:, :1]), JUMP)
        fault = _blame(fault, (at[:, :1] > LARGEST_FIRST) & (seen == 0) & ~padded, KEYS_MISSING)
    if lengths is not None:
        ends, tokens = lengths.cpu().long(), batch * q_len
        begin = ends[torch.searchsorted(ends, torch.arange(tokens), right=True).sub(1).clamp(0)].view(batch, q_len)
        begin = begin - torch.arange(batch)[:, None] * q_len
        wrong = (ends[0] != 0) | (ends[-1] != tokens) | (ends.diff() < 0).any() | (begin < 0).any()
        if others is not None and others is not lengths:
            same = others.shape == lengths.shape
            wrong = wrong | (others.cpu() != lengths.cpu()).any() if same else torch.ones_like(wrong)
        start = torch.maximum(start, begin.clamp(0))
        fault = _blame(fault, (start > 0) & (first > 0), PACKED_BEHIND_A_CACHE)
        fault = _blame(fault, wrong.expand(batch, 1), LENGTHS)
    # Query i and key i are the same token only with an empty cache; a static cache has room past the last one.
    narrowed = torch.maximum(origin, start[:, key.clamp(max=q_len - 1)])
    origin = torch.where((origin == PADDING) | (first > 0), origin, narrowed)
    narrow = torch.cat([header[:, :FAULT], fault, origin], 1).int()[:, None, None]
    if mask.shape[2] == 1:
        return narrow
    drawn = mask[:, :, 1:].cpu()  # the bits of pairs are not changed
    return torch.cat([narrow.expand(-1, drawn.shape[1], -1, -1), drawn.expand(batch, -1, -1, -1)], 2)


def _blame(fault: Tensor, wrong: Tensor, number: int) -> Tensor:
    """[B, 1]: ``number`` for samples in which anything is wrong, except those marked ANOTHER_MASK before."""
    return torch.where(wrong.any(1, keepdim=True) & (fault != ANOTHER_MASK), number, fault)
