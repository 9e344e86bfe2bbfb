"""The transformer block around sparse attention.

Shape legend: B samples, N tokens, C = width of the residual stream, M = width of the MLP.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.functional.arguments import check_size, checked_dropout
from sparseflash.functional.attention import Mask
from sparseflash.nn.attention import SparseAttention
from sparseflash.nn.checks import Router, check_input
from sparseflash.tables.padded import Lengths, Padding


class SparseTransformerBlock(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream.

    ``x + attention(norm(x))``, then ``x + mlp_out(activation(mlp_in(norm(x))))``. With ``mlp="swiglu"`` (Shazeer
    2020, https://arxiv.org/abs/2002.05202) the activation is ``silu(mlp_gate(x)) * mlp_in(x)``.

    | state dict key            | shape                             | there if                                    |
    |---------------------------|-----------------------------------|---------------------------------------------|
    | ``attention_norm.weight`` | [C]                               | always; ``.bias`` too with ``norm="layer"`` |
    | ``attention.*``           | those of :class:`SparseAttention` | always                                      |
    | ``mlp_norm.weight``       | [C]                               | always; ``.bias`` too with ``norm="layer"`` |
    | ``mlp_in.weight``         | [M, C]                            | always                                      |
    | ``mlp_gate.weight``       | [M, C]                            | ``mlp="swiglu"``                            |
    | ``mlp_out.weight``        | [C, M]                            | always                                      |
    | ``mlp_in.bias``           | [M]                               | ``bias=True``                               |
    | ``mlp_gate.bias``         | [M]                               | ``bias=True`` and ``mlp="swiglu"``          |
    | ``mlp_out.bias``          | [C]                               | ``bias=True``                               |

    Args:
        attention: the attention of the block, which has its width.
        mlp: "gelu" or "swiglu".
        mlp_width: M; default 4 C for gelu. For swiglu 8 C / 3, rounded up to a multiple of 8: about as many weights.
        norm: "rms" (``nn.RMSNorm``) or "layer" (``nn.LayerNorm``).
        bias: whether the linear maps of the MLP have biases.
        dropout: probability in [0, 1) that an element of either added term becomes 0 in training.

    Raises:
        TypeError: attention is not a SparseAttention, or mlp_width is not an int.
        ValueError: an unknown mlp or norm, or a number out of range.

    Example:
        >>> import torch, sparseflash as sf
        >>> block = sf.SparseTransformerBlock(sf.SparseAttention(64, 4, "causal() & local(100)"), mlp="swiglu")
        >>> block(torch.randn(2, 300, 64)).shape
        torch.Size([2, 300, 64])
    """

    def __init__(
        self,
        attention: SparseAttention,
        *,
        mlp: Literal["gelu", "swiglu"] = "gelu",
        mlp_width: int | None = None,
        norm: Literal["rms", "layer"] = "rms",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(attention, SparseAttention):
            raise TypeError(
                f"attention must be a SparseAttention, got {type(attention).__name__}: "
                "SparseTransformerBlock(SparseAttention(width, heads, mask))"
            )
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp must be 'gelu' or 'swiglu', got {mlp!r}")
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
        width = attention.width
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else -(-width // 3) * 8
        check_size("mlp_width", mlp_width)
        self.dropout = checked_dropout(dropout, "dropout")
        self.attention_norm, self.mlp_norm = (
            nn.RMSNorm(width, eps=1e-6) if norm == "rms" else nn.LayerNorm(width) for _ in range(2)
        )
        self.attention = attention
        self.mlp_in = nn.Linear(width, mlp_width, bias=bias)
        self.mlp_gate = nn.Linear(width, mlp_width, bias=bias) if mlp == "swiglu" else None
        self.mlp_out = nn.Linear(mlp_width, width, bias=bias)

    def forward(
        self,
        x: Tensor,
        mask: Mask | str | Router = None,
        *,
        lengths: Lengths | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """[B, N, C] -> [B, N, C].

        Args and errors are those of :meth:`SparseAttention.forward`. In a padded batch the output of padding is 0, so
        that blocks follow each other as they are, and a sum over tokens is one over those that are there.

        Example:
            >>> import torch, sparseflash as sf
            >>> block = sf.SparseTransformerBlock(sf.SparseAttention(64, 4, "local(100)"))
            >>> lengths = torch.tensor([300, 170])
            >>> mean = block(torch.randn(2, 300, 64), lengths=lengths).sum(1) / lengths[:, None]
            >>> mean.shape
            torch.Size([2, 64])
        """
        check_input(x, self.attention.width, self.attention.q_proj)
        padding = Padding.of(lengths, key_padding_mask, x)
        if padding is not None:
            return padding.leave(self._mix(padding.enter(x), mask, padding.lengths))
        return self._mix(x, mask, None)

    def _mix(self, x: Tensor, mask: Mask | str | Router, lengths: Tensor | None) -> Tensor:
        attended = self.attention(self.attention_norm(x), mask, lengths=lengths)
        x = x + F.dropout(attended, self.dropout, self.training)
        normed = self.mlp_norm(x)
        hidden = self.mlp_in(normed)
        hidden = F.gelu(hidden) if self.mlp_gate is None else F.silu(self.mlp_gate(normed)) * hidden
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)
