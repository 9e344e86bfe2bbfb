"""Errors quote the argument, say what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P

HUGE = torch.zeros(1, 1, 1, 16).expand(1, 1, (1 << 31) - 1023, 16)


def qkv(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {name: torch.zeros(1, 2, 32, 16) for name in "qkv"}
    return base | changes


ATTENTION: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "rank",
        qkv(q=torch.zeros(2, 32, 16)),
        ValueError,
        r"q must be \[batch, heads, tokens, dim\], got shape \(2, 32, 16\)",
    ),
    ("not a tensor", qkv(k=np.zeros((1, 2, 32, 16))), TypeError, "k must be a tensor, got ndarray"),
    ("int dtype", qkv(v=torch.zeros(1, 2, 32, 16, dtype=torch.int64)), TypeError, "v must be float16.*got torch.int64"),
    ("mixed dtypes", qkv(k=torch.zeros(1, 2, 32, 16).half()), TypeError, "one dtype, got torch.float32, torch.float16"),
    ("devices", qkv(k=torch.zeros(1, 2, 32, 16, device="meta")), ValueError, "one device, got cpu, meta"),
    ("head counts", qkv(q=torch.zeros(1, 3, 32, 16)), ValueError, "multiple of key heads: 3 % 2"),
    ("k and v heads", qkv(v=torch.zeros(1, 1, 32, 16)), ValueError, "k and v must have equal heads"),
    ("batch", qkv(q=torch.zeros(2, 2, 32, 16)), ValueError, "one batch size"),
    ("head dim", qkv(q=torch.zeros(1, 2, 32, 8)), ValueError, "one head dim"),
    ("empty", qkv(q=torch.zeros(1, 2, 0, 16)), ValueError, "no dimension but the batch may be 0"),
    ("strides", qkv(q=torch.zeros(1, 2, 16, 32).mT), ValueError, r"last dim of q must be contiguous.*q.contiguous\(\)"),
    ("backend", qkv(backend="cuda"), ValueError, "'cpu', 'triton' or None, got 'cuda'"),
    ("NaN scale", qkv(scale=float("nan")), ValueError, "scale must be finite and not negative, got nan"),
    ("negative scale", qkv(scale=-1.0), ValueError, "got -1.0; negate q instead"),
    ("scale type", qkv(scale="big"), TypeError, "scale must be a number or None, got 'big'"),
    (
        "mask type",
        qkv(mask=torch.ones(32, 32)),
        TypeError,
        "mask must be a Pattern, its text, a BlockMask, a LookupTable or None",
    ),
    (
        "lengths",
        qkv(mask=P.causal().compile(64)),
        ValueError,
        r"for \(q_len, kv_len\) = \(64, 64\), q and k have \(32, 32\)",
    ),
    ("tokens", {"q": HUGE, "k": HUGE, "v": HUGE}, ValueError, "at most 2,147,482,624 tokens; got q"),
    ("heads", qkv(mask=P.per_head(*[P.causal()] * 3)), ValueError, "for 3 query heads, q has 2"),
    ("table lengths", qkv(mask=sf.lookup(P.full().compile((8, 32)))), ValueError, "= \\(8, 32\\)"),
    ("table device", qkv(mask=sf.lookup(P.full().compile(32), "meta")), ValueError, "table lies on meta, q on cpu"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), [c[1:] for c in ATTENTION], ids=[c[0] for c in ATTENTION])
def test_attention(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sf.attention(**arguments)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="'triton' takes tensors on a GPU; q is on cpu"):
        sf.attention(**qkv(backend="triton"))


@dataclass
class Unfrozen(P.Pattern):
    """A user's first try."""

    width: int

    def allows(self, q: Any, k: Any) -> Any:
        return abs(q - k) < self.width


def test_a_users_pattern_needs_one_method() -> None:
    @dataclass(frozen=True)
    class Narrow(P.Pattern):
        width: int

        def allows(self, q: Any, k: Any) -> Any:
            return abs(q - k) < self.width

    assert Narrow(3).compile(50, block=16) == P.local(2).compile(50, block=16)
    assert str(Narrow(3) & P.causal()) == "Narrow(3) & causal()"


def test_cached_masks_cannot_be_changed() -> None:
    mask = P.causal().compile(64, block=32)
    for array in (mask.tiles, mask.pattern_of, mask.runs.start, mask.runs.stop, mask.runs.code):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_many_global_tokens_cost_no_more_than_the_grid() -> None:
    assert P.global_tokens(1 << 39).compile(1024).density == 1


PATTERNS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: P.local(-1), ValueError, "local: window must be at least 0, got window=-1"),
    (lambda: P.local(2.5), TypeError, "local: window must be an int, got 2.5"),  # type: ignore[arg-type]
    (lambda: P.local(sys.maxsize), ValueError, r"local: window must be at most 2\*\*40"),
    (lambda: P.axial((100_000, 100_000)), ValueError, "more than 2\\*\\*28 places"),
    (lambda: P.causal().compile(1 << 50), ValueError, "at most 2\\*\\*40"),
    (lambda: P.causal().compile(64, q_offset=1 << 62), ValueError, "q_offset must be at most"),
    (lambda: P.axial(64), TypeError, "shape must be"),  # type: ignore[arg-type]
    (lambda: P.documents(5), TypeError, "lengths must be ints"),  # type: ignore[arg-type]
    (lambda: Unfrozen(3).compile(8), TypeError, "Unfrozen must be a frozen dataclass"),
    (lambda: P.strided(0), ValueError, "strided: stride must be at least 1"),
    (lambda: P.butterfly(unit=0), ValueError, "butterfly: unit must be at least 1"),
    (lambda: P.butterfly(max_stride=0), ValueError, "max_stride must be at least 1"),
    (lambda: P.global_tokens(-2), ValueError, "tokens must be at least 0"),
    (lambda: P.global_tokens("12"), TypeError, "must be an int, got '12'"),  # type: ignore[arg-type]
    (lambda: P.where(3), TypeError, "where: fn must be callable"),  # type: ignore[arg-type]
    (lambda: P.from_blocks(np.zeros(3)), TypeError, "array must be 2-D"),
    (lambda: P.from_blocks(np.zeros((2, 2), object)), TypeError, "booleans or numbers, got object"),
    (lambda: P.per_head(3), TypeError, "operand 0 is 3"),  # type: ignore[arg-type]
    (lambda: P.causal() | 3, TypeError, "unsupported operand"),  # type: ignore[operator]
    (lambda: P.causal().compile(0), ValueError, "at least 1 and .*, got seq_len=0"),
    (lambda: P.causal().compile(True), TypeError, "must be an int or a pair"),
    (lambda: P.causal().compile((1, 2, 3)), TypeError, "must be an int or a pair"),  # type: ignore[arg-type]
    (lambda: P.causal().compile(64, block=48), ValueError, "16, 32, 64, 128, 256; got block=48"),
    (lambda: P.causal().compile(64, q_offset=0.5), TypeError, "q_offset must be an int"),  # type: ignore[arg-type]
    (
        lambda: P.where(lambda q, k: np.array(1)).compile(8),
        TypeError,
        "must give booleans for arrays of positions, got int64",
    ),
    (lambda: P.where(lambda q, k: (q > 3)[..., 0]).compile(64, block=16), ValueError, r"got \(\d+, 16\)"),
    (lambda: P.from_blocks(np.array([[np.nan]])), ValueError, "holds NaN"),
    (lambda: P.documents(cu_seqlens=[0, 3, 2]), ValueError, "cu_seqlens must not fall, got 2 after 3 at entry 2"),
    (lambda: P.documents([3], 4), TypeError, "kv_lengths must be ints, one per document, got 4"),  # type: ignore[arg-type]
    (lambda: P.documents([3], [4], cu_seqlens_k=[0, 4]), TypeError, "either kv_lengths or cu_seqlens_k"),
    (lambda: P.documents([3], ids=[0, 0]), TypeError, "one of lengths, cu_seqlens and ids"),
    (lambda: P.documents(), TypeError, "one of lengths, cu_seqlens and ids"),
    (lambda: P.documents(None, [3], ids=[0]), TypeError, "no kv_lengths beside ids"),
    (lambda: P.documents(ids=[0.5]), TypeError, "ids must be ints, one per token, got float64"),  # type: ignore[arg-type]
    (lambda: P.documents(ids=[True, False]), TypeError, "ids must be ints, one per token, got bool"),
    (lambda: P.documents(ids=3), TypeError, "ids must be ints"),  # type: ignore[arg-type]
    (lambda: P.documents(ids=[]), ValueError, r"\[tokens\] or \[samples, tokens\], got shape \[0\]"),
    (lambda: P.documents(ids=np.zeros((1, 1, 3), int)), ValueError, r"got shape \[1, 1, 3\]"),
    (lambda: P.documents(ids=[[1, 2], [1]]), ValueError, "ids must be as many for each sample; pad them"),
    (lambda: P.documents(ids=[4, 5, 4]), ValueError, "id 4 comes again at token 2; for ids in any order use"),
    (lambda: P.documents([3], causal=1), TypeError, "causal must be True or False, got 1"),  # type: ignore[arg-type]
    (lambda: sf.parse(" | ".join(["causal()"] * 500)), ValueError, "a chain of 499 operators"),
    (lambda: P.causal().compile(64).to_scipy(1), ValueError, "pattern must be 0 to 0, got 1"),
    (
        lambda: P.where(lambda q, k: np.ones(3, bool)).compile(8),
        ValueError,
        "must give the broadcast shape of its positions",
    ),
    (
        lambda: P.from_blocks(np.eye(3), unit=4).compile(13),
        ValueError,
        "3 x 3 cells of 4 tokens cover positions up to 11",
    ),
    (
        lambda: P.causal().compile(64) | P.causal().compile(65),
        ValueError,
        "combine when lengths, blocks and offsets are equal",
    ),
    (lambda: P.causal().compile(64) | 1, TypeError, "unsupported operand"),  # type: ignore[operator]
    (
        lambda: P.per_head(P.full(), P.full()).compile(8) | P.per_head(*[P.full()] * 3).compile(8),
        ValueError,
        "do not combine",
    ),
    (lambda: sf.lookup(P.causal()), TypeError, "lookup takes a BlockMask"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "kind", "message"), PATTERNS, ids=[c[2] for c in PATTERNS])
def test_patterns(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_picture_needs_a_known_suffix_and_leaves_nothing(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot write 'm\.xyz'"):
        P.causal().compile(64).plot(tmp_path / "m.xyz")
    assert not list(tmp_path.iterdir())
