"""Modules: multi-head attention over a mask, and the transformer block around it.

Shape legend: B samples, N tokens, C = width of the residual stream, H query heads and G key heads of size D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseflash.functional import AtBlock, Mask, attention
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.constant import constant
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import Pattern
from sparseflash.rotary import Rotary, Rotary1d, Rotary2d, rotate
from sparseflash.tables import lasting, unless_fake

Router: TypeAlias = Callable[[Tensor, Tensor], Mask]


class SparseAttention(nn.Module):
    """Self-attention with projections: ``out_proj(attention(q_proj(x), k_proj(x), v_proj(x)))``, over a mask.

    Works in ``torch.compile(fullgraph=True)`` and under autocast. Masks and position tables are made when a length is
    first seen and shared by all modules that ask for equal ones; they are no part of the state:

    | state dict key                   | shape      | there if       |
    |----------------------------------|------------|----------------|
    | ``q_proj.weight``                | [H * D, C] | always         |
    | ``k_proj.weight``                | [G * D, C] | always         |
    | ``v_proj.weight``                | [G * D, C] | always         |
    | ``out_proj.weight``              | [C, H * D] | always         |
    | ``q_proj.bias``                  | [H * D]    | ``bias=True``  |
    | ``k_proj.bias``, ``v_proj.bias`` | [G * D]    | ``bias=True``  |
    | ``out_proj.bias``                | [C]        | ``bias=True``  |
    | ``sinks``                        | [H]        | ``sinks=True`` |

    Args:
        width: C.
        heads: H.
        mask: who sees whom. A Pattern, or its text; a BlockMask for one length; a router, which is called with q
            [B, H, N, D] and k [B, G, N, D], rotated, and returns what :func:`sparseflash.attention` takes as a mask;
            or None for dense attention.
        kv_heads: G, of which H is a multiple (grouped queries); default H.
        head_dim: D; default C / H.
        block: (BQ, BK) or one number for both, at which a Pattern is compiled.
        bias: whether the four projections have biases.
        rotary: positions that turn q and k: a :class:`sparseflash.rotary.Rotary1d` or
            :class:`sparseflash.rotary.Rotary2d`; None leaves them.
        sinks: one learned logit a head that takes a share of the softmax, at first 0 (gpt-oss).
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        alibi: subtract :func:`alibi_slopes` times the distance from scores.
        dropout: chance in [0, 1) with which a probability becomes 0 in training.

    Raises:
        TypeError: an argument of another kind.
        ValueError: numbers that do not fit each other, a text that is no pattern.

    Example:
        >>> import torch, sparseflash as sf
        >>> from functools import partial
        >>> from sparseflash.rotary import Rotary1d
        >>> x = torch.randn(2, 300, 64)
        >>> layer = sf.SparseAttention(64, 4, "causal() & local(100)", kv_heads=2, rotary=Rotary1d(), sinks=True)
        >>> layer(x).shape
        torch.Size([2, 300, 64])
        >>> routed = sf.SparseAttention(64, 4, partial(sf.routing.topk_table, k_blocks=4, block=16))
        >>> routed(x).shape
        torch.Size([2, 300, 64])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mask: Pattern | str | BlockMask | Router | None = None,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        block: int | tuple[int, int] = 128,
        bias: bool = False,
        rotary: Rotary | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        alibi: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, number in (("width", width), ("heads", heads), ("kv_heads", kv_heads)):
            _check_size(name, number)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}")
        if head_dim is None:
            if width % heads:
                raise ValueError(f"width must be a multiple of heads, got {width} and {heads}; or give head_dim")
            head_dim = width // heads
        _check_size("head_dim", head_dim)
        if rotary is not None:
            if not isinstance(rotary, Rotary1d | Rotary2d):
                raise TypeError(f"rotary must be a Rotary1d, a Rotary2d or None, got {rotary!r}")
            rotary.check_head_dim(head_dim)
        mask = parse(mask) if isinstance(mask, str) else mask
        if not (mask is None or isinstance(mask, Pattern | BlockMask) or callable(mask)):
            raise TypeError(f"mask must be a Pattern, its text, a BlockMask, a router or None, got {mask!r}")
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.mask, self.rotary = mask, rotary
        self.block = (block, block) if isinstance(block, int) else block
        self.softcap, self.alibi, self.dropout = softcap, alibi, _checked_dropout(dropout)
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * head_dim, width, bias=bias)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """Attend among the tokens of x.

        Args:
            x: [B, N, C].
            mask: what :func:`sparseflash.attention` takes, for this call in place of the module's own.

        Returns:
            [B, N, C].

        Raises:
            ValueError: x of another shape, or a mask for another length.
        """
        if x.dim() != 3 or x.shape[2] != self.width:
            raise ValueError(f"x must be [batch, tokens, width={self.width}], got {tuple(x.shape)}")
        q, k, v = (
            projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        if self.rotary is not None:
            cos, sin = self._rotary_table(self.rotary, x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attention(
            q, k, v, self._mask(q, k) if mask is None else mask,
            softcap=self.softcap,
            # A trace cannot ask its constants whether they require a gradient, but their aliases.
            alibi_slopes=_slopes_on(self.heads, x.device).detach() if self.alibi else None,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        mixed: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return mixed

    def extra_repr(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads} over {self.kv_heads}"
        return f"width={self.width}, heads={heads}, head_dim={self.head_dim}, mask={self.mask}, rotary={self.rotary}"

    def _rotary_table(self, rotary: Rotary, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(rotary, Rotary1d) and torch.compiler.is_compiling():  # one graph for every length
            return rotary.traced_table(x.shape[1], self.head_dim, x.device)
        tokens = range(x.shape[1]).stop  # an image has one length: range() makes a compiled graph decide on it
        return constant(rotary, _rotary_table, tokens, self.head_dim, x.device)

    def _mask(self, q: Tensor, k: Tensor) -> Any:
        if isinstance(self.mask, Pattern):
            return AtBlock(self.mask, self.block)
        if self.mask is None or isinstance(self.mask, BlockMask):
            return self.mask
        return self.mask(q, k)


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
        attention: how tokens mix; its width is that of the block.
        mlp: "gelu" or "swiglu".
        mlp_width: M; default 4 C for gelu, and for swiglu 8 C / 3 rounded up to a multiple of 8, which has about as
            many weights.
        norm: "rms" (``nn.RMSNorm``) or "layer" (``nn.LayerNorm``).
        bias: whether the linear maps of the MLP have biases.
        dropout: chance in [0, 1) with which an element of either added term becomes 0 in training.

    Raises:
        TypeError: attention is no SparseAttention, mlp_width no int.
        ValueError: an unknown mlp or norm, a number out of range.

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
            raise TypeError(f"attention must be a SparseAttention, got {type(attention).__name__}")
        if mlp not in ("gelu", "swiglu"):
            raise ValueError(f"mlp must be 'gelu' or 'swiglu', got {mlp!r}")
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm must be 'rms' or 'layer', got {norm!r}")
        width = attention.width
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else -(-width // 3) * 8
        _check_size("mlp_width", mlp_width)
        self.dropout = _checked_dropout(dropout)
        self.attention_norm, self.mlp_norm = (
            nn.RMSNorm(width, eps=1e-6) if norm == "rms" else nn.LayerNorm(width) for _ in range(2)
        )
        self.attention = attention
        self.mlp_in = nn.Linear(width, mlp_width, bias=bias)
        self.mlp_gate = nn.Linear(width, mlp_width, bias=bias) if mlp == "swiglu" else None
        self.mlp_out = nn.Linear(mlp_width, width, bias=bias)

    def forward(self, x: Tensor, mask: Mask = None) -> Tensor:
        """[B, N, C] -> [B, N, C]; mask, if given, in place of the attention's own."""
        x = x + F.dropout(self.attention(self.attention_norm(x), mask), self.dropout, self.training)
        normed = self.mlp_norm(x)
        hidden = self.mlp_in(normed)
        hidden = F.gelu(hidden) if self.mlp_gate is None else F.silu(self.mlp_gate(normed)) * hidden
        return x + F.dropout(self.mlp_out(hidden), self.dropout, self.training)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi (Press et al. 2021, https://arxiv.org/abs/2108.12409), fp32 [heads].

    For a power of two they are ``2 ** (-8 * i / heads)``, i from 1; otherwise those of the power of two below, and
    then every other one of the next power of two.

    Example:
        >>> alibi_slopes(4).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625]
        >>> alibi_slopes(6).tolist()
        [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    _check_size("heads", heads)
    whole = 1 << heads.bit_length() - 1
    first = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2 ** (-4 * i / whole) for i in range(1, 2 * whole, 2)]
    return torch.tensor([*first, *between[: heads - whole]], dtype=torch.float32)


def _check_size(name: str, number: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int, got {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")


def _checked_dropout(dropout: float) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout must be a number, got {dropout!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout!r}")
    return float(dropout)


def _rotary_table(rotary: Rotary, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return unless_fake(_rotary_table_on)(rotary, tokens, head_dim, device)


def _slopes_on(heads: int, device: torch.device) -> Tensor:
    return unless_fake(_cached_slopes)(heads, device)


@lru_cache(maxsize=64)
@lasting
def _rotary_table_on(rotary: Rotary, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rotary.table(tokens, head_dim)
    return cos.to(device), sin.to(device)


@lru_cache(maxsize=64)
@lasting
def _cached_slopes(heads: int, device: torch.device) -> Tensor:
    return alibi_slopes(heads).to(device)


# What torch.compiler.assume_constant_result sets: a compiled graph computes this once, while tracing.
_slopes_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
