"""The public operation: validate, find the table, dispatch."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias, overload

import torch

from sparseflash import ops
from sparseflash.kernels.layout import Score
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.constant import constant
from sparseflash.patterns.full import full
from sparseflash.patterns.pattern import Pattern
from sparseflash.tables import LookupTable, lookup

Mask: TypeAlias = Pattern | BlockMask | LookupTable | None


class AtBlock(NamedTuple):
    """A pattern to be compiled at a block of its own, for callers inside this library."""

    pattern: Pattern
    block: tuple[int, int]


BLOCK = (128, 128)  # that patterns are compiled at
MOST_TOKENS = (1 << 31) - 1024  # positions and those just past the end are int32 in kernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
    return_lse: Literal[False] = False, deterministic: bool = False, backend: str | None = None,
) -> torch.Tensor: ...  # fmt: skip
@overload
def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None, *,
    scale: float | None = None, softcap: float | None = None, alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None, dropout_p: float = 0.0, seed: int | torch.Tensor | None = None,
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
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | torch.Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention that touches only the blocks of a mask. Differentiable in q, k, v and sinks, also through lse.

    The probability of a key is softmax(s) over the keys that the mask allows, where s is q.k times scale, then capped,
    then biased. Features cost nothing where they are not asked for.

    Args:
        q: [B, Hq, N, D], fp16, bf16 or fp32 (fp64 on the CPU backend), contiguous last dim, any other strides.
        k: [B, Hkv, M, D], Hq a multiple of Hkv (grouped queries).
        v: [B, Hkv, M, Dv].
        mask: a Pattern (compiled for these lengths at block 128, and cached), a BlockMask, a LookupTable, or None
            for dense attention. A mask per head has Hq heads.
        scale: factor on the scores, default ``D ** -0.5``.
        softcap: c > 0 turns a scaled score s into ``c * tanh(s / c)`` (Gemma 2, arXiv 2408.00118).
        alibi_slopes: fp32 [Hq] or [B, Hq]. ``slope * |q_position - k_position|`` is subtracted from capped scores;
            the mask's ``q_offset`` is the position of the first query (ALiBi, arXiv 2108.12409). Gets no gradient.
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
        that sees no key gets output 0, lse -inf and zero gradients.

    In ``torch.compile(fullgraph=True)`` make a Pattern outside the compiled function. With ``dynamic=True`` one graph
    serves every length: a Pattern's table is looked up when the graph runs, and a LookupTable given as an argument may
    change from call to call, its lengths and block with it. A mask that does not fit is refused when the graph runs.

    Raises:
        TypeError: an argument of another kind, dtypes that differ or are not floating.
        ValueError: shapes, heads, devices or masks that do not fit each other, numbers out of range, slopes that
            require a gradient, an unknown backend.
        NotImplementedError: a second derivative, or ``torch.func.vmap``.

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
    """
    _check_operands(q, k, v)
    backend = _checked_backend(backend, q, v)
    if not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be True or False, got {deterministic!r}")
    scale = _checked_scale(scale, q.shape[-1])
    softcap = _checked_softcap(softcap, scale)
    _check_slopes(alibi_slopes, q)
    _check_sinks(sinks, q)
    dropout_p = _checked_dropout(dropout_p)
    found, q_offset = _mask_arguments(mask, q, k)
    score = Score(scale, softcap, alibi_slopes, q_offset, dropout_p, _seed(seed, q) if dropout_p else None)
    out, lse = ops.attention(q, k, v, sinks, found, backend, deterministic, score)
    return (out, lse) if return_lse else out


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{name} must be [batch, heads, tokens, dim], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    shapes = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must lie on one device, got {q.device}, {k.device}, {v.device}")
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ValueError(f"q, k and v must have one batch size; {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ValueError(f"k and v must have equal heads and tokens; {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k must have one head dim; {shapes}")
    if q.shape[2] > MOST_TOKENS or k.shape[2] > MOST_TOKENS:
        raise ValueError(f"sequences have at most {MOST_TOKENS:,} tokens; {shapes}")
    if 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"no dimension may be 0; {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads: {q.shape[1]} % {k.shape[1]} != 0; {shapes}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"the last dim of {name} must be contiguous, got strides {x.stride()}; call {name}.contiguous()"
            )


def _checked_backend(backend: str | None, q: torch.Tensor, v: torch.Tensor) -> str:
    if backend is None:
        backend = "cpu" if q.device.type == "cpu" else "triton"
    if backend not in ops.BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, ops.BACKENDS))} or None, got {backend!r}")
    if backend == "cpu" and q.device.type != "cpu":
        raise ValueError(f"backend 'cpu' takes tensors on the CPU; q is on {q.device}")
    if backend == "triton":
        if q.dtype == torch.float64:
            raise TypeError("backend 'triton' takes float16, bfloat16 or float32; float64 runs on backend 'cpu'")
        if max(q.shape[-1], v.shape[-1]) > 256:
            raise ValueError(f"backend 'triton' takes head dims up to 256, got {q.shape[-1]} and {v.shape[-1]}")
        if q.device.type != "cuda" and not _interpreting():
            raise ValueError(f"backend 'triton' takes tensors on a GPU; q is on {q.device}")
    return backend


def _interpreting() -> bool:
    """Whether Triton's interpreter runs kernels on CPU tensors."""
    import os

    return os.environ.get("TRITON_INTERPRET") == "1"


def _checked_scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(dim)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale!r}; negate q instead")
    if scale > (most := torch.finfo(torch.float32).max / 2):  # kernels hold log2(e) times the scale in float32
        raise ValueError(f"scale must be at most {most:.3g}, for float32's sake, got {scale!r}; multiply q instead")
    return float(scale)


def _checked_softcap(softcap: float | None, scale: float) -> float | None:
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise TypeError(f"softcap must be a number or None, got {softcap!r}")
    # Kernels hold log2(e) times the cap, and the scale divided by it, in float32.
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
    if not (smallest <= softcap <= largest and scale <= softcap * largest):
        raise ValueError(
            f"softcap must be positive, and not tiny or huge for float32, got {softcap!r}; None leaves scores uncapped"
        )
    return float(softcap)


def _check_slopes(slopes: torch.Tensor | None, q: torch.Tensor) -> None:
    if slopes is None:
        return
    if not isinstance(slopes, torch.Tensor) or slopes.dtype != torch.float32:
        got = slopes.dtype if isinstance(slopes, torch.Tensor) else type(slopes).__name__
        raise TypeError(f"alibi_slopes must be a float32 tensor, got {got}")
    B, Hq = q.shape[:2]
    if slopes.shape not in ((Hq,), (B, Hq)):
        raise ValueError(
            f"alibi_slopes must be [{Hq}] or [{B}, {Hq}] for q {tuple(q.shape)}, got {tuple(slopes.shape)}"
        )
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes must lie on {q.device} with q, got {slopes.device}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes get no gradient, but require one; pass alibi_slopes.detach()")


def _check_sinks(sinks: torch.Tensor | None, q: torch.Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor) or sinks.dtype not in DTYPES:
        got = sinks.dtype if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise TypeError(f"sinks must be a floating tensor, got {got}")
    if sinks.shape != (q.shape[1],):
        raise ValueError(
            f"sinks must be [{q.shape[1]}], one a query head of q {tuple(q.shape)}, got {tuple(sinks.shape)}"
        )
    if sinks.device != q.device:
        raise ValueError(f"sinks must lie on {q.device} with q, got {sinks.device}")


def _checked_dropout(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number, got {dropout_p!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {dropout_p!r}")
    return float(dropout_p)


def _seed(seed: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
    """The seed as an int64 tensor without dims: a run-time argument also of a compiled graph."""
    if seed is None:
        return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64)
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise TypeError(f"seed must be an int64 tensor without dims, got {seed.dtype} of shape {tuple(seed.shape)}")
        if seed.device not in (q.device, torch.device("cpu")):
            raise ValueError(f"seed must lie on {q.device} with q or on the CPU, got {seed.device}")
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {seed!r}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits with a sign, got {seed!r}")
    return torch.tensor(seed, dtype=torch.int64)


def _mask_arguments(mask: Mask | AtBlock, q: torch.Tensor, k: torch.Tensor) -> tuple[ops.MaskArguments, int]:
    """The mask as the operators take it, and the position of the first query."""
    if mask is None:
        mask = full()
    if isinstance(mask, Pattern):
        mask = AtBlock(mask, BLOCK)
    compiling = torch.compiler.is_compiling()
    if isinstance(mask, AtBlock) and compiling:
        return ops.MaskArguments.named(*mask), 0
    table = _table(mask, q, k)
    if compiling and table.buffer is not None:
        return ops.MaskArguments.packed(table), 0
    table.check_fits(q, k)
    return ops.MaskArguments.of(table), table.q_offset


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
        return lookup(mask.pattern.compile((int(q.shape[2]), int(k.shape[2])), block=mask.block), q.device)
    raise TypeError(f"mask must be a Pattern, BlockMask, LookupTable or None, got {mask!r}")
