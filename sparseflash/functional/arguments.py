"""What attention and decoding ask of their arguments, in errors that say what to write instead.

The usual case passes through as few checks as there can be: a call's host time is some tens of microseconds.
"""

from __future__ import annotations

import math
import os
from functools import lru_cache
from numbers import Real
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from sparseflash.functional.transforms import PLAIN_TYPES
from sparseflash.patterns.described import described
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import instead
from sparseflash.tables.table import LookupTable

MOST_TOKENS = (1 << 31) - 1024  # positions and those just past the end are int32 in kernels
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("cpu", "triton")


def under_autocast(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The operands in the dtype that ``torch.autocast`` asks for, as scaled_dot_product_attention takes them.

    float64 stays, and so does everything where autocast is off.
    """
    first = operands[0]
    if not isinstance(first, torch.Tensor) or not torch.is_autocast_enabled(first.device.type):
        return operands
    dtype = torch.get_autocast_dtype(first.device.type)
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in operands
    )


parsed = lru_cache(maxsize=256)(parse)  # a text may be a mask wherever a Pattern may


def canonical_text(text: str) -> str:
    """A pattern's text as the pattern itself writes it, read once while a graph is traced."""
    return str(parsed(text))


canonical_text._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a constant of the graph


def refuse_mask(mask: Any, takes: str = "a Pattern, its text, a BlockMask, a LookupTable or None") -> NoReturn:
    """Raise TypeError for what is no mask, with the line to write instead; ``takes`` says what is one here."""
    hint = ""
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        given = f"bias=mask{_to_four_dims(mask)}"
        hint = f"; biases are no masks: sparseflash.attention(..., {given}) adds one to the scores"
        if mask.dim() == 2:
            hint += "; of one that is 0 where a query sees a key, give BlockMask.from_dense((mask == 0).cpu().numpy())"
    elif isinstance(mask, torch.Tensor) and mask.dim() > 2:
        hint = "; for a mask of each sample or head, patterns.per_sample(...) and patterns.per_head(...) of patterns"
    elif isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        hint = (
            "; of a bool tensor [q_len, kv_len], true where a query sees a key, give "
            "BlockMask.from_dense(mask.cpu().numpy()); for padding, lengths= of the modules"
        )
    elif isinstance(mask, torch.Tensor):
        hint = (
            "; of one [q_len, kv_len] that is 0 where a query does not see a key, give "
            "BlockMask.from_dense((mask != 0).cpu().numpy())"
        )
    elif any(base.__module__ == "torch.nn.attention.flex_attention" for base in type(mask).__mro__):
        hint = "; of a FlexAttention block mask, give sparseflash.integrations.flex.from_flex(block_mask)"
    elif callable(mask) and _arguments_of(mask) == 4:
        hint = (
            "; of a FlexAttention mask_mod, give sparseflash.integrations.flex.from_flex(sparseflash.flex."
            "create_block_mask(mask_mod, B, H, q_len, kv_len))"
        )
    elif isinstance(mask, LookupTable):  # which a module does not keep
        hint = "; a table belongs to one batch: give it to the call, module(x, mask=table)"
    elif (words := instead(mask)) is not None:
        hint = f"; {words}"
    raise TypeError(f"mask must be {takes}, got {described(mask)}{hint}")


def _arguments_of(function: Any) -> int | None:
    code = getattr(function, "__code__", None)
    return None if code is None else int(code.co_argcount)


def _shared_out(function: Any) -> bool:
    """Whether a function is what torch's context_parallel puts in place of scaled_dot_product_attention."""
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.tensor.experimental")


_SDPA = None if _shared_out(F.scaled_dot_product_attention) else F.scaled_dot_product_attention


def check_whole() -> None:
    """Raise inside of torch's ``context_parallel``, where each rank holds a part of what attention is about.

    That context replaces ``scaled_dot_product_attention`` and nothing else, so ours would take the part for the whole.
    """
    if F.scaled_dot_product_attention is not _SDPA and _shared_out(F.scaled_dot_product_attention):
        raise ValueError(
            "inside of torch's context_parallel each rank holds a part of the tokens, and attention there would be "
            "about that part alone: leave that context, cut q, k and v with sparseflash.distributed.Sharding, and call "
            "sparseflash.distributed.context_parallel_attention(q, k, v, mask, mesh)"
        )


# What operands that passed had in common with those to come: most calls are like one before.
_passed: set[tuple[Any, ...]] = set()
MOST_PASSED = 4096


def check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless these are q, k and v of attention."""
    check_whole()
    if torch.compiler.is_compiling() or not (_is_plain(q) and _is_plain(k) and _is_plain(v)):
        _check_operands(q, k, v)
        return
    # Written out: a loop takes half as long again.
    key = (
        *(q.dtype, q.shape, q.stride(), q.device, k.dtype, k.shape, k.stride(), k.device),
        *(v.dtype, v.shape, v.stride(), v.device),
    )
    if key in _passed:
        return
    _check_operands(q, k, v)
    if len(_passed) >= MOST_PASSED:
        _passed.clear()
    _passed.add(key)


def _is_plain(x: Any) -> bool:
    return type(x) in PLAIN_TYPES and x.layout is torch.strided and not x.is_nested


def _check_operands(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        check_layout(name, x)
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
    if 0 in q.shape[1:] or 0 in k.shape[1:] or 0 in v.shape[1:]:
        raise ValueError(f"no dimension but the batch may be 0; {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads: {q.shape[1]} % {k.shape[1]} != 0; {shapes}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1 and x.shape[3] > 1:
            raise ValueError(
                f"the last dim of {name} must be contiguous, got strides {x.stride()}; call {name}.contiguous()"
            )


def check_layout(name: str, x: torch.Tensor) -> None:
    """Raise for tensors whose numbers do not lie in one place: nested, sparse and distributed ones."""
    if x.layout is torch.strided and not x.is_nested and type(x).__name__ != "DTensor":
        return
    if x.is_nested:
        raise ValueError(
            f"{name} is a nested tensor: pack its samples into one sequence, [1, heads, all tokens, dim], and let "
            "patterns.documents(lengths) keep them apart; or pad them and give SparseAttention their lengths="
        )
    if type(x).__name__ == "DTensor":
        raise ValueError(
            f"{name} is a DTensor: where heads or samples are sharded, call attention on the shards, "
            f"{name}.to_local(); where tokens are, call sparseflash.distributed.context_parallel_attention"
        )
    raise ValueError(f"{name} must be a dense tensor, got layout {x.layout}; {name}.to_dense() makes one")


def checked_backend(backend: str | None, q: torch.Tensor, v: torch.Tensor) -> str:
    if backend is None:
        if q.device.type == "cpu":
            return "cpu"
        backend = "triton"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))} or None, got {backend!r}")
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
    return os.environ.get("TRITON_INTERPRET") == "1"


def checked_scale(scale: float | None, dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(dim)
    if isinstance(scale, torch.Tensor):
        raise TypeError("scale must be a number or None, got a tensor; a learned one goes into q: q * scale, scale=1.0")
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, got {described(scale)}")
    if not 0 <= scale < math.inf:
        raise ValueError(f"scale must be finite and not negative, got {scale!r}; negate q instead")
    if scale > (most := torch.finfo(torch.float32).max / 2):  # kernels hold log2(e) times the scale in float32
        raise ValueError(f"scale must be at most {most:.3g}, for float32's sake, got {scale!r}; multiply q instead")
    return float(scale)


def checked_softcap(softcap: float | None, scale: float) -> float | None:
    if softcap is None:
        return None
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise TypeError(f"softcap must be a number or None, got {described(softcap)}")
    # Kernels hold log2(e) times the cap, and the scale divided by it, in float32.
    smallest, largest = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2
    if not (smallest <= softcap <= largest and scale <= softcap * largest):
        raise ValueError(
            f"softcap must be positive, and not tiny or huge for float32, got {softcap!r}; None leaves scores uncapped"
        )
    return float(softcap)


def check_slopes(slopes: torch.Tensor | None, q: torch.Tensor) -> None:
    if slopes is None:
        return
    if not isinstance(slopes, torch.Tensor) or slopes.dtype != torch.float32:
        got = slopes.dtype if isinstance(slopes, torch.Tensor) else type(slopes).__name__
        raise TypeError(f"alibi_slopes must be a float32 tensor, got {got}")
    check_layout("alibi_slopes", slopes)
    B, Hq = q.shape[:2]
    if slopes.shape not in ((Hq,), (B, Hq)):
        raise ValueError(
            f"alibi_slopes must be [{Hq}] or [{B}, {Hq}] for q {tuple(q.shape)}, got {tuple(slopes.shape)}"
        )
    if slopes.device != q.device:
        raise ValueError(f"alibi_slopes must lie on {q.device} with q, got {slopes.device}")
    if slopes.requires_grad:
        raise ValueError("alibi_slopes get no gradient, but require one; pass alibi_slopes.detach()")


def check_bias(bias: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> None:
    if bias is None:
        return
    if not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias must be a tensor or None, got {described(bias)}")
    if bias.dtype == torch.bool:
        raise TypeError(
            "bias must be a floating tensor, got torch.bool; a mask is given as mask: of a bool tensor [q_len, kv_len] "
            "that is true where a query sees a key, BlockMask.from_dense(x.cpu().numpy())"
        )
    check_layout("bias", bias)
    if bias.dtype != q.dtype and (bias.dtype != torch.float32 or q.dtype == torch.float64):
        takes = str(q.dtype) if q.dtype in (torch.float32, torch.float64) else f"{q.dtype} or torch.float32"
        raise TypeError(f"bias must be {takes} for q of {q.dtype}, got {bias.dtype}; give bias.to(q.dtype)")
    B, Hq, N = q.shape[:3]
    M, shape = k.shape[2], tuple(bias.shape)
    if bias.dim() == 4:
        fits = all(have in (1, size) for have, size in zip(shape, (B, Hq, N, M), strict=True))
        hint = ""
    else:
        fits = bias.dim() == 2 and shape[0] in (1, Hq) and shape[1] % 2 == 1
        hint = "" if bias.dim() > 3 else f"; one of pairs or keys has four dims: bias{_to_four_dims(bias)}"
    if not fits:
        b, h, n, m = ("1" if size == 1 else f"{size} or 1" for size in (B, Hq, N, M))
        raise ValueError(
            f"bias must be [{b}, {h}, {n}, {m}], or of distances [{h}, 2 R + 1], an odd width, for q {tuple(q.shape)} "
            f"and k {tuple(k.shape)}; got {shape}{hint}"
        )
    if bias.device != q.device:
        raise ValueError(f"bias must lie on {q.device} with q, got {bias.device}; give bias.to(q.device)")


def _to_four_dims(x: torch.Tensor) -> str:
    """The index that makes x one of four dims, the missing ones leading."""
    return f"[{', '.join(['None'] * (4 - x.dim()))}]" if x.dim() < 4 else ""


def check_sinks(sinks: torch.Tensor | None, q: torch.Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, torch.Tensor) or sinks.dtype not in DTYPES:
        got = sinks.dtype if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise TypeError(f"sinks must be a floating tensor, got {got}")
    check_layout("sinks", sinks)
    if sinks.shape != (q.shape[1],):
        raise ValueError(
            f"sinks must be [{q.shape[1]}], one a query head of q {tuple(q.shape)}, got {tuple(sinks.shape)}"
        )
    if sinks.device != q.device:
        raise ValueError(f"sinks must lie on {q.device} with q, got {sinks.device}")


def checked_dropout(dropout_p: float) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, Real):
        raise TypeError(f"dropout_p must be a number, got {described(dropout_p)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and below 1, got {described(dropout_p)}")
    return float(dropout_p)


def checked_seed(seed: int | torch.Tensor | None, q: torch.Tensor) -> torch.Tensor:
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
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {described(seed)}")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed must fit in 64 bits with a sign, got {described(seed)}")
    return torch.tensor(seed, dtype=torch.int64)
