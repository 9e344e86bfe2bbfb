"""The compiled kernel: which library is loaded, and its calls.

Every address that goes there is of a tensor whose shape, dtype, strides and device were looked at here; what a lookup
table says is taken at its word, as on a GPU (``LookupTable.check``).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels import dropout
from sparseflash.kernels.cpu import levels
from sparseflash.kernels.layout import Score, Side, Tiles

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of dQ in float32 that are held at a time, or those of one key head, where dQ itself is of half precision.
HELD = 1 << 25
# Keys of one work item of decoding: a row of more is split.
SPLIT = 2048
# Multiplications below which one thread is as fast as several.
SMALL = 1 << 18
VARIABLE = "SPARSEFLASH_CPU"
PLAIN = "plain"

_pointers = (
    *("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "dq_sum", "delta", "lse2", "turns", "slopes"),
    *("sinks", "row_spans", "row_full", "row_partial", "row_tile", "row_order"),
    *("col_spans", "col_full", "col_partial", "col_tile", "pattern_of", "bits", "seen_keys", "turned", "row_cells"),
    *("col_cells", "lengths", "parts"),
)
_numbers = (
    *("B", "Hq", "Hkv", "N", "M", "D", "V", "BQ", "BK", "nQ", "nK", "slope_b", "slope_h", "pattern_b", "pattern_h"),
    *("q_offset", "kind", "held", "chunk", "chunks", "dropping", "limit", "seed_low", "seed_high", "threads"),
)


class Problem(ctypes.Structure):
    """The struct of the same name in problem.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _pointers),
        *((name, ctypes.c_int64 * 3) for name in ("sq", "sk", "sv", "so", "sdo")),
        *((name, ctypes.c_int64) for name in _numbers),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


class Unusable(Exception):
    """Why there is no compiled kernel here."""


class Library:
    """One build of the kernel, loaded."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise Unusable(f"{path.name} cannot be loaded: {error}") from None
        library.sparseflash_problem_size.restype = ctypes.c_int64
        library.sparseflash_panel.restype = ctypes.c_int64
        if library.sparseflash_problem_size() != ctypes.sizeof(Problem):
            raise Unusable(f"{path.name} is of another version: build it anew")
        self.name, self.panel = name, int(library.sparseflash_panel())
        self.use_threads: Callable[[ctypes.c_void_p | None], None] = library.sparseflash_threads
        self.use_threads(_parallel_for())
        if hasattr(os, "register_at_fork"):
            # Torch's threads are not there in a forked process, and OpenMP waits for them forever.
            os.register_at_fork(after_in_child=lambda: self.use_threads(None))
        self.turn, self.cells = library.sparseflash_turn, library.sparseflash_cells
        self._calls = {}
        for call in ("forward", "backward", "decode"):
            function = getattr(library, f"sparseflash_{call}")
            function.argtypes, function.restype = (ctypes.POINTER(Problem),), ctypes.c_int32
            self._calls[call] = function

    def run(self, call: str, problem: Problem) -> None:
        if self._calls[call](problem):
            raise MemoryError(f"attention on the CPU found no memory for its scratch ({call})")


def _parallel_for() -> ctypes.c_void_p:
    """Torch's own threads, by a C function that it exports and keeps stable since 2.10."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (folder / name).exists():
            return ctypes.cast(ctypes.CDLL(str(folder / name)).torch_parallel_for, ctypes.c_void_p)
    raise Unusable(f"torch's library was not found in {folder}")


def capabilities() -> dict[str, Any]:
    """What this processor has, by torch's names."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"AVX2": levels.LEVELS[0].needs, "AVX512": levels.LEVELS[1].needs}
    return dict.fromkeys(known.get(torch.backends.cpu.get_cpu_capability(), ()), True)


@lru_cache(maxsize=1)
def _loaded() -> Library | Unusable:
    wanted = os.environ.get(VARIABLE, "")
    possible = levels.runnable(capabilities())
    if wanted == PLAIN:
        return Unusable(f"{VARIABLE}={PLAIN} asks for none")
    if wanted:
        possible = tuple(level for level in possible if level.name == wanted)
        if not possible:
            names = [level.name for level in levels.runnable(capabilities())]
            raise ValueError(f"{VARIABLE} must be {PLAIN!r} or one of {names}, which this machine runs; got {wanted!r}")
    if not possible:
        return Unusable(f"there is no build for this processor ({levels.machine()})")
    why = Unusable(
        f"{possible[-1].library} is not there: install with a C++ compiler at hand, or run build.py beside it"
    )
    for level in reversed(possible):
        if level.library.exists():
            try:
                return Library(level.library, level.name)
            except Unusable as error:
                why = error
    return why


def library() -> Library | None:
    """The build that serves this machine, or None where attention runs in torch."""
    found = _loaded()
    return found if isinstance(found, Library) else None


def missing() -> str | None:
    """Why there is none; None if there is."""
    found = _loaded()
    return None if isinstance(found, Library) else str(found)


def serves(q: torch.Tensor, score: Score, q_offset_bound: int = 1 << 30) -> bool:
    """Whether the compiled kernel takes these operands: all but float64."""
    return q.dtype in KINDS and abs(score.q_offset) < q_offset_bound and library() is not None


class _Plan:
    """What the walk needs of tiles beside their bits: the same from the keys' side, and what can be skipped."""

    def __init__(self, library: Library, bits: torch.Tensor, block: tuple[int, int]) -> None:
        bq, bk = block
        tiles = len(bits)
        self.bits = bits.contiguous()
        self.turned = torch.empty((tiles, bk, -(-bq // 32)), dtype=torch.int32)
        self.row_cells, self.col_cells = (
            torch.empty((tiles, -(-side // library.panel)), dtype=torch.int64) for side in block
        )
        number, at = ctypes.c_int64, ctypes.c_void_p
        library.turn(at(self.bits.data_ptr()), at(self.turned.data_ptr()), number(tiles), number(bq), number(bk))
        for cells, tile, lines, lanes in ((self.row_cells, self.turned, bk, bq), (self.col_cells, self.bits, bq, bk)):
            numbers = number(tiles), number(lines), number(lanes)
            library.cells(at(tile.data_ptr()), at(cells.data_ptr()), *numbers)


_plans = WeakTensorKeyDictionary()


def _plan(library: Library, tiles: Tiles, block: tuple[int, int]) -> _Plan:
    known = _plans.get(tiles.bits)
    if known is None or known[0] != block:
        known = _plans[tiles.bits] = block, _Plan(library, tiles.bits.detach(), block)
    found: _Plan = known[1]
    return found


def _strided(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """A problem that is being filled in, and the tensors that it points at."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Side, tiles: Tiles, pattern_of: torch.Tensor,
        block: tuple[int, int], score: Score,
    ) -> None:  # fmt: skip
        found = library()
        assert found is not None, "serves() was asked"
        self.library, self.problem, self.held = found, Problem(), list[torch.Tensor]()
        problem, plan = self.problem, _plan(found, tiles, block)
        batch, q_heads, problem.N, problem.D = q.shape
        problem.B, problem.Hq, problem.Hkv, problem.M, problem.V = batch, q_heads, *k.shape[1:3], v.shape[3]
        problem.BQ, problem.BK = block
        problem.nQ, problem.kind = rows.spans.shape[1], KINDS[q.dtype]
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.operand(name, x)
        for name in ("spans", "full", "partial", "tile", "order"):
            self.point(f"row_{name}", getattr(rows, name))
        for name in ("bits", "turned", "row_cells", "col_cells"):
            self.point(name, getattr(plan, name))
        self.point("seen_keys", tiles.seen_keys)
        patterns = pattern_of.expand(batch, q_heads)
        self.point("pattern_of", patterns, contiguous=False)
        problem.pattern_b, problem.pattern_h = patterns.stride()
        problem.scale, problem.softcap, problem.q_offset = score.scale, score.softcap or 0.0, score.q_offset
        if score.slopes is not None:
            slopes = score.slopes.float().expand(batch, q_heads)
            self.point("slopes", slopes, contiguous=False)
            problem.slope_b, problem.slope_h = slopes.stride()
        problem.limit = dropout.threshold(score.dropout)
        if score.seed is not None:
            seed = int(score.seed)
            problem.dropping, problem.seed_low, problem.seed_high = 1, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
        small = batch * q_heads * q.shape[2] * k.shape[2] * q.shape[3] < SMALL
        problem.threads = 1 if small else torch.get_num_threads()

    def point(self, name: str, x: torch.Tensor, contiguous: bool = True) -> None:
        """Let a field be the address of a tensor, which is kept until the call is over."""
        x = x.contiguous() if contiguous else x
        self.held.append(x)
        setattr(self.problem, name, x.data_ptr())

    def operand(self, name: str, x: torch.Tensor) -> None:
        """A tensor [batch, heads, tokens, dim], read where it lies."""
        x = _strided(x)
        self.point(name, x, contiguous=False)
        getattr(self.problem, {"out": "so", "dout": "sdo"}.get(name, f"s{name}"))[:] = x.stride()[:3]

    def run(self, name: str) -> None:
        self.library.run(name, self.problem)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Side, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
    call.operand("out", out)
    call.point("lse", lse)
    if sinks is not None:
        call.point("sinks", sinks.float())
    call.run("forward")
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, rows: Side, columns: Side, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v (without sinks) in their dtypes."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    problem = call.problem
    for name in ("spans", "full", "partial", "tile"):
        call.point(f"col_{name}", getattr(columns, name))
    problem.nK = columns.spans.shape[1]
    call.operand("out", out)
    call.operand("dout", dout)
    call.point("lse", lse)
    if dlse is not None:
        call.point("dlse", dlse.float())
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        call.point(name, gradient)
    lines = math.prod(q.shape[:3])
    own = torch.empty((2, lines), dtype=torch.float32)
    call.point("delta", own[0])
    call.point("lse2", own[1])
    call.point("turns", torch.zeros(q.shape[0] * q.shape[1] * problem.nQ, dtype=torch.int32))
    heads = q.shape[0] * k.shape[1]
    problem.held = heads
    if q.dtype != torch.float32:
        one = q.shape[2] * q.shape[3] * (q.shape[1] // k.shape[1])
        problem.held = min(heads, max(1, HELD // (4 * one)))
        call.point("dq_sum", torch.empty(problem.held * one, dtype=torch.float32))
    call.run("backward")
    return gradients


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, rows: Side, tiles: Tiles,
    pattern_of: torch.Tensor, block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`forward`, for queries of which number i of a sample stands at its length - n + i."""
    call = _Call(q, k, v, rows, tiles, pattern_of, block, score)
    problem = call.problem
    out, lse = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
    call.operand("out", out)
    call.point("lse", lse)
    if sinks is not None:
        call.point("sinks", sinks.float())
    call.point("lengths", lengths.long())
    problem.chunk = max(1, SPLIT // block[1])
    problem.chunks = -(-(-(-k.shape[2] // block[1])) // problem.chunk)
    call.point("parts", torch.empty(math.prod(q.shape[:3]) * problem.chunks * (v.shape[3] + 2), dtype=torch.float32))
    call.run("decode")
    return out, lse
