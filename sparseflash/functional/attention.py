"""The public operation: validate, find the table, dispatch."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias, overload

import torch

from sparseflash.functional import operators as ops
from sparseflash.functional.arguments import (
    canonical_text,
    check_bias,
    check_operands,
    check_sinks,
    check_slopes,
    checked_backend,
    checked_dropout,
    checked_scale,
    checked_seed,
    checked_softcap,
    parsed,
    refuse_mask,
    under_autocast,
)
from sparseflash.kernels.layout import Score
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.compiling import compiled
from sparseflash.patterns.full import full
from sparseflash.patterns.grid import Grid, make_grid
from sparseflash.patterns.pattern import Pattern
from sparseflash.patterns.traced_constant import constant
from sparseflash.tables.lookup import lookup
from sparseflash.tables.padded import kept, padded_table
from sparseflash.tables.table import LookupTable, PackedTable

Mask: TypeAlias = Pattern | str | BlockMask | LookupTable | None


class AtBlock(NamedTuple):
    """A pattern to be compiled at a block of its own, for callers inside this library."""

    pattern: Pattern
    block: tuple[int, int]
    lengths: torch.Tensor | None = None  # int64 [B]: tokens of each sample of a padded batch


BLOCK = (128, 128)  # that patterns are compiled at


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None, dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, sinks: torch.Tensor | None = None, dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: Literal[True], deterministic: bool = False, backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Mask = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention that touches only the blocks of a mask. Differentiable in q, k, v, bias and sinks, also through lse.

    The probability of a key is softmax(s) over the keys that the mask allows, where s is q.k times scale, then capped,
    then biased. Features cost nothing where they are not asked for.

    Args:
        q: [B, Hq, N, D], fp16, bf16 or fp32 (fp64 on the CPU backend), contiguous last dim, any other strides.
        k: [B, Hkv, M, D], Hq a multiple of Hkv (grouped queries).
        v: [B, Hkv, M, Dv].
        mask: a Pattern or its text (compiled for these lengths at block 128, and cached), a BlockMask, a LookupTable,
            or None for dense attention. A mask per head has Hq heads.
        scale: factor on the scores, default ``D ** -0.5``.
        softcap: c > 0 turns a scaled score s into ``c * tanh(s / c)`` (Gemma 2, arXiv 2408.00118).
        alibi_slopes: fp32 [Hq] or [B, Hq]. ``slope * |q_position - k_position|`` is subtracted from capped scores;
            the mask's ``q_offset`` is the position of the first query (ALiBi, arXiv 2108.12409). Gets no gradient.
        bias: added to capped scores, in the blocks of the mask alone; in q's dtype or fp32 (fp64 for fp64). Either of
            pairs, [B or 1, Hq or 1, N or 1, M or 1], where a dim of 1 is broadcast and any strides will do; or of
            distances, [Hq or 1, 2 R + 1]: a query at position p gives key j number ``R + clamp(j - p, -R, R)`` of its
            head, with positions as for ``alibi_slopes`` (T5's buckets spread out, arXiv 1910.10683; Swin's tables,
            arXiv 2103.14030). Gets a gradient in its own shape, summed in fp32 (fp64), equal bit for bit in every run,
            and 0 where the mask has no block. -inf hides a pair as the mask does; inf and NaN spread as in q and k, and
            what lies at hidden pairs does not matter.
        sinks: floating [Hq]. One more logit for every row of a head, which takes its share of the softmax and has no
            value (arXiv 2309.17453, as learned in gpt-oss). Compared with s after cap and bias; gets a gradient. -inf
            is no sink.
        dropout_p: in [0, 1). Each probability becomes 0 with this chance, the others are divided by ``1 - dropout_p``
            (rounded to 24 bits). lse is unaffected.
        seed: of dropout: an int or an int64 tensor without dims, of 64 bits. Equal seeds give equal bits on every
            backend and at every block size: see :func:`sparseflash.reference.dropout_mask`. None draws one at each
            call from torch's default generator on the CPU, which ``torch.manual_seed`` fixes and
            ``torch.utils.checkpoint`` restores. Ignored without dropout.
        return_lse: also return the log-sum-exp (natural log) of each query's scores s, without its sink.
        deterministic: gradients that are equal bit for bit in every run. They are today whatever is asked for; True
            keeps it so in later versions.
        backend: "cpu" or "triton"; None chooses by the device of q.

    Returns:
        out [B, Hq, N, Dv] in q's dtype, and with ``return_lse`` also lse [B, Hq, N] in fp32 (fp64 for fp64). A query
        that sees no key gets output 0, lse -inf and zero gradients. Under ``torch.autocast`` q, k and v are cast first,
        as for torch's scaled_dot_product_attention. An empty batch gives empty results.

    In ``torch.compile(fullgraph=True)`` make a Pattern outside the compiled function. With ``dynamic=True`` one graph
    serves every length: a Pattern's table is looked up when the graph runs, and a LookupTable given as an argument may
    change from call to call, its lengths and block with it. A mask that does not fit is refused when the graph runs.

    Raises:
        TypeError: an argument of another kind, dtypes that differ or are not floating.
        ValueError: shapes, heads, devices or masks that do not fit each other, numbers out of range, slopes that
            require a gradient, an unknown backend.
        NotImplementedError: a second derivative, or one in forward mode. docs/transforms.md lists all transforms.

    Example:
        >>> import torch, sparseflash as sf
        >>> q, k, v = torch.randn(3, 1, 4, 512, 32).unbind(0)
        >>> sf.attention(q, k, v, sf.parse("causal() & local(100)")).shape
        torch.Size([1, 4, 512, 32])
        >>> out, lse = sf.attention(q, k, v, return_lse=True)
        >>> torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), atol=1e-5)
        True

        A sink as heavy as all keys together halves the output; a cap bounds every score:

        >>> key = torch.zeros(1, 4, 1, 32)
        >>> halved = sf.attention(q, key, key + 1, sinks=torch.zeros(4))
        >>> torch.allclose(halved, torch.tensor(0.5))
        True
        >>> _, lse = sf.attention(100 * q, k, v, softcap=5.0, return_lse=True)
        >>> bool(lse.max() <= 5 + torch.tensor(512.0).log())
        True

        A bias that is learned, one number for each head and each distance up to 128, all farther ones sharing two:

        >>> bias = torch.zeros(4, 257, requires_grad=True)
        >>> sf.attention(q, k, v, "causal() & local(200)", bias=bias).sum().backward()
        >>> bias.grad.shape
        torch.Size([4, 257])
    """
    q, k, v = under_autocast(q, k, v)
    check_operands(q, k, v)
    backend = checked_backend(backend, q, v)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    scale = checked_scale(scale, q.shape[-1])
    softcap = checked_softcap(softcap, scale)
    check_slopes(alibi_slopes, q)
    check_bias(bias, q, k)
    check_sinks(sinks, q)
    dropout_p = checked_dropout(dropout_p)
    found, q_offset = _mask_arguments(mask, q, k)
    seed = checked_seed(seed, q) if dropout_p else None
    score = Score(scale, softcap, alibi_slopes, q_offset, dropout_p, seed, bias)
    if not q.shape[0]:
        out, lse = empty_batch(q, k, v, sinks, bias)
    else:
        out, lse = ops.attention(q, k, v, sinks, found, backend, deterministic, score)
    return (out, lse) if return_lse else out


def empty_batch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The results for a batch of no samples: differentiable, with gradients that are empty, or 0 for sinks and bias."""
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).mT
    if bias is not None:
        bias = bias.sum(1)[:, None, None] if bias.dim() == 2 else bias
        scores = scores + bias.to(scores.dtype)
    if sinks is not None:
        scores = scores + sinks[:, None, None].to(scores.dtype)
    lse = scores.sum(-1)
    return scores @ v.repeat_interleave(groups, 1), lse.to(torch.promote_types(q.dtype, torch.float32))


def _mask_arguments(
    mask: Mask | AtBlock | PackedTable, q: torch.Tensor, k: torch.Tensor
) -> tuple[ops.MaskArguments | LookupTable, int]:
    """The mask as the operators take it, and the position of the first query."""
    compiling = torch.compiler.is_compiling()
    if mask is None:
        mask = full()
    elif isinstance(mask, str):
        if compiling:
            return ops.MaskArguments(None, BLOCK, canonical_text(mask)), 0
        mask = parsed(mask)
    if isinstance(mask, Pattern):
        mask = AtBlock(mask, BLOCK)
    if isinstance(mask, AtBlock) and compiling:
        return ops.MaskArguments.named(*mask), 0
    if isinstance(mask, PackedTable):
        if mask.buffer.device != q.device:
            raise ValueError(f"the table lies on {mask.buffer.device}, q on {q.device}: block_mask.to(q.device)")
        return ops.MaskArguments(list(mask), ()), 0
    table = _table(mask, q, k)
    if compiling and table.buffer is not None:
        return ops.MaskArguments.packed(table), 0
    table.check_fits(q, k)
    return (ops.MaskArguments.of(table) if compiling else table), table.q_offset


@lru_cache(maxsize=256)
def _grid(q_len: int, kv_len: int, block: tuple[int, int]) -> Grid:
    return make_grid((q_len, kv_len), block, None)


def _table(mask: AtBlock | BlockMask | LookupTable, q: torch.Tensor, k: torch.Tensor) -> LookupTable:
    if isinstance(mask, LookupTable):
        # Not mask.device: torch.compile reads no property of a constant table; of a packed one, the buffer alone.
        held = mask.pattern_of if mask.buffer is None else mask.buffer
        if held.device != q.device:
            raise ValueError(f"the table lies on {mask.device}, q on {q.device}: sparseflash.lookup(mask, q.device)")
        return mask
    if isinstance(mask, BlockMask):
        return constant(mask, lookup, q.device)
    if isinstance(mask, AtBlock):
        pattern, block, lengths = mask
        if lengths is not None:
            tokens = int(q.shape[2])
            return kept(lengths, (pattern, block, tokens), lambda: padded_table(pattern, block, lengths, tokens))
        return lookup(compiled(pattern, _grid(int(q.shape[2]), int(k.shape[2]), block)), q.device)
    refuse_mask(mask)
