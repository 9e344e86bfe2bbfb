"""Padded batches: lengths of samples, or masks of padding, and their tables.

Shape legend: B samples, N tokens of the longest one, C = width of the residual stream.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._guards import active_fake_mode
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.patterns.beside import Beside
from sparseflash.patterns.composed import Composed
from sparseflash.patterns.grid import is_int, make_grid
from sparseflash.patterns.packed import Packed
from sparseflash.patterns.pattern import Binary, Not, Pattern
from sparseflash.patterns.stacked import Stacked, per_sample
from sparseflash.tables.device import capturing, lasting
from sparseflash.tables.shortened import shortened
from sparseflash.tables.table import LookupTable

Lengths: TypeAlias = Tensor | Sequence[int] | NDArray[Any]

Made = TypeVar("Made")

KEPT = 16  # results cached per tensor


@dataclass(frozen=True)
class Padding:
    """The positions of tokens in a batch [B, N, C], and the permutation that moves the tokens of each sample first."""

    lengths: Tensor  # int64 [B]
    outside: Tensor  # bool [B, N, 1]: positions past the length
    order: Tensor | None  # int64 [B * N]: permutation of the flat batch, tokens of a sample first; None: identity
    back: Tensor | None  # int64 [B * N]: the inverse

    @classmethod
    def of(cls, lengths: Lengths | None, key_padding_mask: Tensor | None, x: Tensor) -> Padding | None:
        """The padding of x [B, N, C] from the arguments of a module; None if both are None.

        Raises:
            TypeError: lengths that are not ints, a mask that is not a tensor of booleans.
            ValueError: both given, shapes that do not match x, or lengths outside 0 to N.
        """
        if lengths is None and key_padding_mask is None:
            return None
        if lengths is not None and key_padding_mask is not None:
            raise ValueError("give lengths or key_padding_mask, not both: they say the same thing")
        if key_padding_mask is not None:
            _check_mask(key_padding_mask, x)
            return kept(key_padding_mask, ("padding", x.device), lambda: cls._masked(key_padding_mask.to(x.device)))
        given, tokens = _as_tensor(lengths, x), x.shape[1]
        key = "padding", tokens, x.device
        return kept(given, key, lambda: cls._ended(given.to(x.device).long().clamp(0, tokens), tokens))

    @classmethod
    def _ended(cls, lengths: Tensor, tokens: int) -> Padding:
        outside = torch.arange(tokens, device=lengths.device)[:, None] >= lengths[:, None, None]
        return cls(lengths, outside, None, None)

    @classmethod
    def _masked(cls, is_padding: Tensor) -> Padding:
        samples, tokens = is_padding.shape
        order = is_padding.int().argsort(dim=1, stable=True)
        first = torch.arange(samples, device=is_padding.device)[:, None] * tokens
        ended = cls._ended((~is_padding).sum(1), tokens)
        return cls(ended.lengths, ended.outside, (order + first).flatten(), (order.argsort(dim=1) + first).flatten())

    def enter(self, x: Tensor) -> Tensor:
        """The batch with the tokens of each sample first and zeros after them, [B, N, C]."""
        return _reordered(x, self.order).masked_fill(self.outside, 0)

    def leave(self, x: Tensor) -> Tensor:
        """[B, N, C] with tokens at their original positions, and zeros elsewhere."""
        return _reordered(x.masked_fill(self.outside, 0), self.back)


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    # index_select on rows: its gradient is deterministic on every device, unlike that of gather.
    return x if order is None else x.flatten(0, 1).index_select(0, order).view_as(x)


def _check_mask(mask: Tensor, x: Tensor) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"key_padding_mask must be a bool tensor [B, N], True where padding is, got {got}; "
            "of a tokenizer's attention_mask (1 for tokens): key_padding_mask=attention_mask == 0"
        )
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask must be [B, N] = {list(x.shape[:2])} for x {tuple(x.shape)}, got {tuple(mask.shape)}"
        )


def _as_tensor(lengths: Any, x: Tensor) -> Tensor:
    """Lengths as an integer tensor [B]; values on the host are checked."""
    samples, tokens = x.shape[:2]
    if isinstance(lengths, Tensor):
        if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
            hint = "; a mask of padding is key_padding_mask=" if lengths.dtype == torch.bool else ""
            raise TypeError(f"lengths must be ints, one per sample, got {lengths.dtype}{hint}")
        if lengths.shape != (samples,):
            raise ValueError(
                f"lengths must be [{samples}], one per sample of x {tuple(x.shape)}, got {tuple(lengths.shape)}"
            )
        traced = torch.compiler.is_compiling() or active_fake_mode() is not None
        if not traced and (lengths.device.type == "cpu" or os.environ.get("SPARSEFLASH_DEBUG") == "1"):
            _check_values(lengths.tolist(), tokens)
        return lengths
    numbers = lengths.tolist() if isinstance(lengths, np.ndarray) else lengths
    if not isinstance(numbers, Sequence) or isinstance(numbers, str) or not all(map(is_int, numbers)):
        raise TypeError(
            f"lengths must be an int tensor [{samples}] or a sequence of ints, one per sample, got {lengths!r}"
        )
    if torch.compiler.is_compiling():
        raise TypeError(
            "lengths in torch.compile must be a tensor, because the numbers of a list are constants of a graph: "
            "lengths=torch.tensor(lengths), made outside"
        )
    if len(numbers) != samples:
        raise ValueError(f"lengths must be {samples} ints, one per sample of x {tuple(x.shape)}, got {len(numbers)}")
    _check_values(numbers, tokens)
    return _listed(tuple(map(int, numbers)))


def _check_values(numbers: Sequence[int], tokens: int) -> None:
    for sample, number in enumerate(numbers):
        if not 0 <= number <= tokens:
            raise ValueError(
                f"lengths must be 0 to {tokens}, the tokens of x; sample {sample} has lengths[{sample}] = {number}"
            )


@lru_cache(maxsize=16)
@lasting
def _listed(numbers: tuple[int, ...]) -> Tensor:
    """One tensor for equal lists, so that the layers of a model share its tables."""
    return torch.tensor(numbers, dtype=torch.int64)


def padded_table(pattern: Pattern, block: tuple[int, int], lengths: Tensor, tokens: int) -> LookupTable:
    """The table of a pattern for samples of these lengths, int64 [B] within 0 to `tokens`, padded to `tokens`.

    A sample sees the same keys as alone. Only patterns that depend on the sequence length (`random_blocks`, the last
    tokens of `beside`) need the lengths on the host.
    """
    if depends_on_length(pattern):
        grids = [make_grid(max(length, 1), block, None) for length in lengths.tolist()]
        pattern = per_sample(*map(pattern.at, grids))
    with torch.inference_mode(False), torch.no_grad():
        return shortened(pattern.compile(tokens, block), lengths)


def depends_on_length(pattern: Pattern) -> bool:
    """Whether :meth:`Pattern.at` of a part of the pattern may depend on the length."""
    match pattern:
        case Composed():
            return depends_on_length(pattern.expression())
        case Binary(left, right):
            return depends_on_length(left) or depends_on_length(right)
        case Not(inner):
            return depends_on_length(inner)
        case Stacked(parts):
            return any(map(depends_on_length, parts))
        case Packed():
            return False  # each part has a fixed length
        case Beside(inner):
            return pattern.known_size is None and (pattern.after > 0 or depends_on_length(inner))
        case _:
            return type(pattern).at is not Pattern.at


# By tensor of a user: its version counter, and the results computed for this version.
_kept = WeakTensorKeyDictionary()


def kept(of: Tensor, key: Hashable, make: Callable[[], Made]) -> Made:
    """``make()``, cached while the tensor lives unchanged, so that the layers of a model share the result.

    Not in graphs: torch.compile may change a tensor without its version counter, and CUDA graphs replay old values.
    """
    if torch.compiler.is_compiling() or active_fake_mode() is not None or of.is_inference() or capturing(of.device):
        return make()
    known: tuple[int, dict[Hashable, Any]] | None = _kept.get(of)
    if known is None or known[0] != of._version:
        known = _kept[of] = of._version, {}
    made = known[1]
    if key not in made:
        if len(made) >= KEPT:
            made.clear()
        with torch.inference_mode(False), torch.no_grad():
            made[key] = make()
    found: Made = made[key]
    return found
