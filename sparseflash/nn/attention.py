"""Multi-head attention over a mask, as a module.

Shape legend: B samples, N tokens, C = width of the residual stream, H query heads and G key heads of size D.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseflash.functional.arguments import check_size, checked_dropout
from sparseflash.functional.attention import AtBlock, Mask, attention
from sparseflash.nn.checks import (
    Router,
    check_input,
    checked_answer,
    checked_block,
    checked_mask,
)
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.full import full
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.traced_constant import constant
from sparseflash.rotary import Rotary, Rotary1d, rotate
from sparseflash.tables.device import per_device, unless_fake
from sparseflash.tables.padded import Lengths, Padding, kept
from sparseflash.tables.shortened import shortened
from sparseflash.tables.table import LookupTable

DENSE = full()


class SparseAttention(nn.Module):
    """Self-attention with projections: ``out_proj(attention(q_proj(x), k_proj(x), v_proj(x)))``, over a mask.

    Works in ``torch.compile(fullgraph=True)`` and under autocast. Masks and position tables are made at the first call
    with a new length and shared between modules. They are not part of the state:

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
        mask: a Pattern or its text; a BlockMask for one length; a router, which is called with the rotated q
            [B, H, N, D] and k [B, G, N, D] and returns a mask for :func:`sparseflash.attention`; or None for dense
            attention.
        kv_heads: G, a divisor of H (grouped queries); default H.
        head_dim: D; default C / H.
        block: block size at which a Pattern is compiled: (BQ, BK) or one number for both.
        bias: whether the four projections have biases.
        rotary: rotary positions of q and k: a :class:`sparseflash.rotary.Rotary1d`,
            :class:`sparseflash.rotary.Rotary2d`, :class:`sparseflash.rotary.Rotary3d` or
            :class:`sparseflash.rotary.PackedRotary`; or None.
        sinks: one learned logit per head that takes a share of the softmax, initially 0 (gpt-oss).
        softcap: scores s become ``softcap * tanh(s / softcap)`` (Gemma 2).
        alibi: subtract :func:`alibi_slopes` times the distance from scores.
        dropout: probability in [0, 1) that an attention probability becomes 0 in training.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: sizes that do not match, or text that is not a pattern.

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
            check_size(name, number)
        if heads % kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got heads={heads} and kv_heads={kv_heads}")
        if head_dim is None:
            if width % heads:
                raise ValueError(f"width must be a multiple of heads, got {width} and {heads}; or give head_dim")
            head_dim = width // heads
        check_size("head_dim", head_dim)
        if rotary is not None:
            if not isinstance(rotary, Rotary):
                raise TypeError(f"rotary must be a Rotary1d, Rotary2d, Rotary3d, PackedRotary or None, got {rotary!r}")
            rotary.check_head_dim(head_dim)
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.mask, self.rotary, self.block = checked_mask(mask), rotary, checked_block(block)
        self.softcap, self.alibi, self.dropout = softcap, alibi, checked_dropout(dropout, "dropout")
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.out_proj = nn.Linear(heads * head_dim, width, bias=bias)
        self.sinks = nn.Parameter(torch.zeros(heads)) if sinks else None

    def forward(
        self,
        x: Tensor,
        mask: Mask | str | Router = None,
        *,
        lengths: Lengths | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend among the tokens of x.

        In a padded batch, the output of a sample's tokens equals that of the sample alone, and the output of its
        padding is 0. Values in the padding, even NaN, have no effect and get no gradient. A sample may be empty. New
        lengths compile nothing. They cost a table on the device, which the layers of a model share if they get the same
        tensor.

        Args:
            x: [B, N, C].
            mask: a mask for this call in place of the module's own; it may also be a LookupTable.
            lengths: ints [B], a tensor or a sequence: sample b has ``lengths[b]`` tokens, followed by padding. Values
                outside 0 to N raise if the tensor is on the CPU. On a GPU they are clamped, because checking would wait
                for it (``SPARSEFLASH_DEBUG=1`` checks).
            key_padding_mask: instead of lengths, bool [B, N], True at padding, as in ``nn.MultiheadAttention``. Padding
                may be anywhere: the tokens are moved together for the call, and positions count tokens only.

        Returns:
            [B, N, C].

        Raises:
            TypeError: x, mask, lengths or key_padding_mask of the wrong type or dtype.
            ValueError: x of another shape; a mask for another length; both lengths and key_padding_mask, or one that
                does not match x; or one of them with a router, a LookupTable or, in torch.compile, a BlockMask.

        Example:
            >>> import torch, sparseflash as sf
            >>> layer, x = sf.SparseAttention(64, 4, "local(100)"), torch.randn(2, 300, 64)
            >>> out = layer(x, lengths=[300, 170])
            >>> torch.allclose(out[1:, :170], layer(x[1:, :170]), atol=1e-5)
            True
        """
        check_input(x, self.width, self.q_proj)
        padding = Padding.of(lengths, key_padding_mask, x)
        if padding is not None:
            return padding.leave(self._attend(padding.enter(x), mask, padding.lengths))
        return self._attend(x, mask, None)

    def _attend(self, x: Tensor, mask: Mask | str | Router, lengths: Tensor | None) -> Tensor:
        q, k, v = (
            projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projected in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        if self.rotary is not None:
            cos, sin = self._rotary_table(self.rotary, x)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = attention(
            q, k, v, self._mask(q, k, mask, lengths),
            softcap=self.softcap,
            # A trace cannot ask a constant whether it requires a gradient; it can ask an alias.
            alibi_slopes=_slopes_on(self.heads, x.device).detach() if self.alibi else None,
            sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        mixed: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return mixed

    def extra_repr(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads} over {self.kv_heads}"
        options = {"softcap": None, "alibi": False, "dropout": 0.0}
        chosen = [f"{name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) != usual]
        return ", ".join(
            [
                *(f"width={self.width}", f"heads={heads}", f"head_dim={self.head_dim}", f"mask={self.mask}"),
                *(f"block={self.block}", f"rotary={self.rotary}", f"sinks={self.sinks is not None}", *chosen),
            ]
        )

    def _rotary_table(self, rotary: Rotary, x: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(rotary, Rotary1d) and torch.compiler.is_compiling():  # one graph for every length
            return rotary.traced_table(x.shape[1], self.head_dim, x.device)
        tokens = range(x.shape[1]).stop  # an image has one length: range() makes a compiled graph decide on it
        return constant(rotary, _rotary_table, tokens, self.head_dim, x.device)

    def _mask(self, q: Tensor, k: Tensor, given: Mask | str | Router, lengths: Tensor | None) -> Any:
        """The mask for attention, cut to the lengths if there are any."""
        mask: Any = given if isinstance(given, LookupTable) else self.mask if given is None else checked_mask(given)
        if isinstance(mask, Pattern) or (mask is None and lengths is not None):
            return AtBlock(DENSE if mask is None else mask, self.block, lengths)
        if callable(mask):
            if lengths is not None:
                raise ValueError(
                    "a router chooses blocks by their content, including padding, and takes no lengths or "
                    "key_padding_mask: give the module a Pattern, or route samples of one length together"
                )
            return checked_answer(mask(q, k))
        if lengths is None or mask is None:
            return mask
        if isinstance(mask, LookupTable):
            raise ValueError(
                "lengths and key_padding_mask cut a Pattern or a BlockMask, not a LookupTable: give the mask that the "
                "table was made from, or leave them out if the table already masks the padding"
            )
        if torch.compiler.is_compiling():
            raise ValueError(
                "in torch.compile, lengths and key_padding_mask cut a Pattern, not a BlockMask: give the module "
                "the pattern that the mask was compiled from, and block="
            )
        if mask.shape != (q.shape[2], k.shape[2]):
            return mask  # attention says what does not fit
        return kept(lengths, mask, lambda: shortened(mask, lengths))


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
    check_size("heads", heads)
    whole = 1 << heads.bit_length() - 1
    first = [2 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2 ** (-4 * i / whole) for i in range(1, 2 * whole, 2)]
    return torch.tensor([*first, *between[: heads - whole]], dtype=torch.float32)


def _rotary_table(rotary: Rotary, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return unless_fake(_rotary_table_on)(rotary, tokens, head_dim, device)


def _slopes_on(heads: int, device: torch.device) -> Tensor:
    return unless_fake(_cached_slopes)(heads, device)


@per_device(maxsize=64)
def _rotary_table_on(rotary: Rotary, tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rotary.table(tokens, head_dim)
    return cos.to(device), sin.to(device)


@per_device(maxsize=64)
def _cached_slopes(heads: int, device: torch.device) -> Tensor:
    return alibi_slopes(heads).to(device)


# What torch.compiler.assume_constant_result sets: a compiled graph computes this once, while tracing.
_slopes_on._dynamo_marked_constant = True  # type: ignore[attr-defined]
