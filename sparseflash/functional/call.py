"""A call whose arguments have been checked: what attention, decoding and context parallelism compute with."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparseflash.functional.arguments import (
    check_bias,
    check_sinks,
    check_slopes,
    checked_backend,
    checked_dropout,
    checked_scale,
    checked_seed,
    checked_softcap,
)
from sparseflash.functional.operands import check_operands, under_autocast
from sparseflash.kernels.layout import Score


class Call(NamedTuple):
    """The arguments of a call but for its mask, with defaults filled in. The names are those of the arguments."""

    q: torch.Tensor  # [B, Hq, N, D], in the dtype of the call
    k: torch.Tensor  # [B, Hkv, M, D]
    v: torch.Tensor  # [B, Hkv, M, Dv]
    scale: float
    softcap: float | None
    alibi_slopes: torch.Tensor | None
    bias: torch.Tensor | None  # [B or 1, Hq or 1, N or 1, M or 1], or of distances [Hq or 1, 2 R + 1]
    sinks: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None  # int64 []; None without dropout
    deterministic: bool
    backend: str

    @classmethod
    def checked(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        seed: int | torch.Tensor | None = None,
        deterministic: bool = False,
        backend: str | None = None,
    ) -> Call:
        """The call, where every argument is what :func:`sparseflash.attention` takes.

        Raises:
            TypeError: an argument of another type, dtypes that differ or are not floating.
            ValueError: shapes, heads or devices that do not match, numbers out of range, slopes that require
                a gradient, an unknown backend.
        """
        q, k, v = under_autocast(q, k, v)
        check_operands(q, k, v)
        backend = checked_backend(backend, q, v)
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
        scale = checked_scale(scale, q.shape[-1])
        if softcap is not None:
            softcap = checked_softcap(softcap, scale)
        if alibi_slopes is not None:
            check_slopes(alibi_slopes, q)
        if bias is not None:
            check_bias(bias, q, k)
        if sinks is not None:
            check_sinks(sinks, q)
        dropout_p = checked_dropout(dropout_p)
        drawn = checked_seed(seed, q) if dropout_p else None
        return cls(q, k, v, scale, softcap, alibi_slopes, bias, sinks, dropout_p, drawn, deterministic, backend)

    def score(self, q_offset: int) -> Score:
        """What the call does to a score, for a mask whose first query stands at ``q_offset``."""
        return Score(self.scale, self.softcap, self.alibi_slopes, q_offset, self.dropout_p, self.seed, self.bias)
