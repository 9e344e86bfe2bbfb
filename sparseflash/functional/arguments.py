"""Checks of the arguments beside q, k and v. An error says what was expected, what came and what to write instead."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from numbers import Real
from typing import Any, NoReturn

import torch

from sparseflash.functional.operands import DTYPES, check_layout
from sparseflash.patterns.described import described
from sparseflash.patterns.parsing import parse
from sparseflash.patterns.pattern import instead
from sparseflash.tables.table import LookupTable

BACKENDS = ("cpu", "triton")
# Kernels hold log2(e) times the scale, log2(e) times the cap, and the scale divided by the cap in float32.
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 2

parsed = lru_cache(maxsize=256)(parse)  # a text may be a mask wherever a Pattern may


def canonical_text(text: str) -> str:
    """A pattern's text as the pattern itself writes it, read once while a graph is traced."""
    return str(parsed(text))


canonical_text._dynamo_marked_constant = True  # type: ignore[attr-defined]  # a constant of the graph


def refuse_mask(mask: Any, takes: str = "a Pattern, its text, a BlockMask, a LookupTable or None") -> NoReturn:
    """Raise TypeError for a value that is not a mask, with the line to write instead; ``takes`` lists valid masks."""
    hint = ""
    if isinstance(mask, torch.Tensor) and mask.is_floating_point():
        given = f"bias=mask{_to_four_dims(mask)}"
        hint = f"; a bias is not a mask: sparseflash.attention(..., {given}) adds one to the scores"
        if mask.dim() == 2:
            hint += "; if it is 0 where a query sees a key, write BlockMask.from_dense((mask == 0).cpu().numpy())"
    elif isinstance(mask, torch.Tensor) and mask.dim() > 2:
        hint = "; for a mask per sample or per head, combine patterns: patterns.per_sample(...), patterns.per_head(...)"
    elif isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        hint = (
            "; for a bool tensor [q_len, kv_len], true where a query sees a key, write "
            "BlockMask.from_dense(mask.cpu().numpy()); for padding, use lengths= of the modules"
        )
    elif isinstance(mask, torch.Tensor):
        hint = (
            "; if it is 0 where a query does not see a key [q_len, kv_len], write "
            "BlockMask.from_dense((mask != 0).cpu().numpy())"
        )
    elif any(base.__module__ == "torch.nn.attention.flex_attention" for base in type(mask).__mro__):
        hint = "; for a FlexAttention block mask, write sparseflash.integrations.flex.from_flex(block_mask)"
    elif callable(mask) and _arguments_of(mask) == 4:
        hint = (
            "; for a FlexAttention mask_mod, write sparseflash.integrations.flex.from_flex(sparseflash.flex."
            "create_block_mask(mask_mod, B, H, q_len, kv_len))"
        )
    elif isinstance(mask, LookupTable):  # modules do not keep one
        hint = "; a table belongs to one batch: pass it to the call, module(x, mask=table)"
    elif (words := instead(mask)) is not None:
        hint = f"; {words}"
    raise TypeError(f"mask must be {takes}, got {described(mask)}{hint}")


def _arguments_of(function: Any) -> int | None:
    code = getattr(function, "__code__", None)
    return None if code is None else int(code.co_argcount)


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
    if scale > HUGE:
        raise ValueError(f"scale must be at most {HUGE:.3g}, for float32's sake, got {scale!r}; multiply q instead")
    return float(scale)


def checked_softcap(softcap: float, scale: float) -> float:
    if isinstance(softcap, bool) or not isinstance(softcap, Real):
        raise TypeError(f"softcap must be a number or None, got {described(softcap)}")
    if not (TINY <= softcap <= HUGE and scale <= softcap * HUGE):
        raise ValueError(
            f"softcap must be positive, and not tiny or huge for float32, got {softcap!r}; None leaves scores uncapped"
        )
    return float(softcap)


def check_slopes(slopes: torch.Tensor, q: torch.Tensor) -> None:
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


def check_bias(bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
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


def check_sinks(sinks: torch.Tensor, q: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor) or sinks.dtype not in DTYPES:
        got = sinks.dtype if isinstance(sinks, torch.Tensor) else type(sinks).__name__
        raise TypeError(f"sinks must be a floating tensor, got {got}")
    check_layout("sinks", sinks)
    if sinks.shape != (q.shape[1],):
        raise ValueError(
            f"sinks must be [{q.shape[1]}], one per query head of q {tuple(q.shape)}, got {tuple(sinks.shape)}"
        )
    if sinks.device != q.device:
        raise ValueError(f"sinks must lie on {q.device} with q, got {sinks.device}")


def checked_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    if type(dropout_p) is not float and (isinstance(dropout_p, bool) or not isinstance(dropout_p, Real)):
        raise TypeError(f"{name} must be a number, got {described(dropout_p)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {described(dropout_p)}")
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


def check_size(name: str, number: int, least: int = 1) -> None:
    """Raise unless an argument that counts something is an int of at least ``least``."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name} must be an int, got {number!r}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")


def check_counts(name: str, counts: torch.Tensor, like: torch.Tensor, owner: str) -> None:
    """Raise unless ``counts`` has one int32 or int64 a sample, [B], and lies where ``like`` [B, ...] does."""
    if not isinstance(counts, torch.Tensor) or counts.dtype not in (torch.int32, torch.int64):
        got = counts.dtype if isinstance(counts, torch.Tensor) else type(counts).__name__
        raise TypeError(f"{name} must be a tensor of int32 or int64, got {got}")
    if counts.shape != (like.shape[0],):
        raise ValueError(f"{name} must be [{like.shape[0]}], one per sample of {owner}, got {tuple(counts.shape)}")
    if counts.device != like.device:
        raise ValueError(
            f"{name} must lie on {like.device} with {owner}, got {counts.device}; {name}.to({str(like.device)!r})"
        )


def checked_lengths(lengths: torch.Tensor | int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Lengths of decoding as a tensor [B] on q's device."""
    if isinstance(lengths, torch.Tensor):
        check_counts("lengths", lengths, q, "q")
        return lengths
    if isinstance(lengths, bool) or not isinstance(lengths, int):
        raise TypeError(f"lengths must be a tensor of ints [{q.shape[0]}] or an int, got {described(lengths)}")
    new, capacity = q.shape[2], k.shape[2]
    if not new <= lengths <= capacity:
        raise ValueError(
            f"lengths counts the {new} new tokens and fits the cache: {new} to {capacity}, got {lengths} "
            f"(q {tuple(q.shape)}, k {tuple(k.shape)})"
        )
    return torch.full((q.shape[0],), lengths, dtype=torch.int32, device=q.device)


def check_no_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> None:
    """Raise where decoding, which has no gradient, would have to record one."""
    if not torch.is_grad_enabled():
        return
    operands = {"q": q, "k": k, "v": v, "sinks": sinks}
    names = ", ".join(name for name, x in operands.items() if x is not None and x.requires_grad)
    if names:
        raise ValueError(
            f"decode has no gradient, but {names} would record one: call it under torch.no_grad(), "
            "or train with sparseflash.attention"
        )
