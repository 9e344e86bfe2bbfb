"""The compiled kernel: which library is loaded, and its calls.

Every address that goes there is of a tensor whose shape, dtype, strides and device were looked at here; what a lookup
table says is taken at its word, as on a GPU (``LookupTable.check``).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import ref

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels import dropout
from sparseflash.kernels.cpu import build, levels
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


_Strides = ctypes.c_int64 * 3


class Problem(ctypes.Structure):
    """The struct of the same name in problem.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _pointers),
        *((name, _Strides) for name in ("sq", "sk", "sv", "so", "sdo")),
        *((name, ctypes.c_int64) for name in _numbers),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


class UnusableError(Exception):
    """Why there is no compiled kernel here."""


class Library:
    """One build of the kernel, loaded."""

    def __init__(self, path: Path, name: str) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UnusableError(f"{path.name} cannot be loaded: {error}") from None
        library.sparseflash_problem_size.restype = ctypes.c_int64
        library.sparseflash_panel.restype = ctypes.c_int64
        if library.sparseflash_problem_size() != ctypes.sizeof(Problem):
            raise UnusableError(f"{path.name} is of another version: build it anew")
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
    raise UnusableError(f"torch's library was not found in {folder}")


def capabilities() -> dict[str, Any]:
    """What this processor has, by torch's names."""
    if hasattr(torch.cpu, "get_capabilities"):
        return dict(torch.cpu.get_capabilities())
    known = {"AVX2": levels.LEVELS[0].needs, "AVX512": levels.LEVELS[1].needs}
    return dict.fromkeys(known.get(torch.backends.cpu.get_cpu_capability(), ()), True)


@lru_cache(maxsize=1)
def _best() -> tuple[Library | UnusableError, str | None]:
    """What serves this machine, and why nothing better does."""
    wanted = os.environ.get(VARIABLE, "")
    possible = levels.runnable(capabilities(), wanted)
    if wanted == PLAIN:
        return UnusableError(f"{VARIABLE}={PLAIN} asks for none"), None
    if wanted:
        names = [level.name for level in possible]
        if wanted not in names:
            raise ValueError(f"{VARIABLE} must be {PLAIN!r} or one of {names}, which this machine runs; got {wanted!r}")
        try:
            asked = possible[names.index(wanted)]
            return _load(asked), None if asked is possible[-1] else f"{VARIABLE}={wanted} asks for it"
        except UnusableError as error:
            raise ValueError(f"{VARIABLE}={wanted} asks for what cannot serve: {error}") from None
    if not possible:
        return UnusableError(f"there is no build for this processor ({levels.machine()})"), None
    why: str | None = None
    for level in reversed(possible):
        try:
            return _load(level), why
        except UnusableError as error:
            why = why or str(error)
    return UnusableError(why), None


def _load(level: levels.Level) -> Library:
    """A level's library, if it is of the sources that lie here: one of others would be called with other arguments."""
    if not level.library.exists():
        raise UnusableError(f"{level.library} is not there")
    if not build.current(level):
        raise UnusableError(f"{level.library} is of other sources than those beside it")
    return Library(level.library, level.name)


# What stands in for the best one, while `using` says so.
_chosen: list[Library | UnusableError] = []


def _found() -> Library | UnusableError:
    return _chosen[-1] if _chosen else _best()[0]


@contextmanager
def using(chosen: Library | None) -> Iterator[None]:
    """Let a build of choice serve all calls inside, or torch for None: to test and to compare builds."""
    _chosen.append(UnusableError("torch was asked for") if chosen is None else chosen)
    try:
        yield
    finally:
        _chosen.pop()


def library() -> Library | None:
    """The build that serves this machine, or None where attention runs in torch."""
    found = _found()
    return found if isinstance(found, Library) else None


def missing() -> str | None:
    """Why there is none; None if there is."""
    found = _found()
    return None if isinstance(found, Library) else str(found)


def lesser() -> str | None:
    """Why it is not the best that this processor runs; None if it is, or if there is none."""
    return None if _chosen else _best()[1]


def serves(q: torch.Tensor, score: Score) -> bool:
    """Whether the compiled kernel takes these operands: all but float64, and positions that are no int32."""
    return q.dtype in KINDS and abs(score.q_offset) < 1 << 30 and library() is not None


class _Plan:
    """What the walk needs of a table, but for tensors that a call brings: the fields of a problem that it fills.

    Beside what lies in a table these are its tiles from the keys' side, and what of them can be skipped.
    """

    def __init__(
        self, library: Library, rows: Side, columns: Side | None, tiles: Tiles, pattern_of: torch.Tensor,
        block: tuple[int, int],
    ) -> None:  # fmt: skip
        bits = tiles.bits.detach().contiguous()
        bq, bk = block
        count = len(bits)
        # Of what the kernel is about to read by number: how many block columns there are at least, and block rows.
        self.most_cols, self.most_rows = _most(rows, count), 0 if columns is None else _most(columns, count)
        self.samples, self.heads = pattern_of.shape
        if pattern_of.min() < 0 or pattern_of.max() >= len(rows.spans):
            raise ValueError("the table names patterns that it does not have: its check() says where")
        turned = torch.empty((count, bk, -(-bq // 32)), dtype=torch.int32)
        row_cells, col_cells = (torch.empty((count, -(-side // library.panel)), dtype=torch.int64) for side in block)
        number, at = ctypes.c_int64, ctypes.c_void_p
        library.turn(at(bits.data_ptr()), at(turned.data_ptr()), number(count), number(bq), number(bk))
        for cells, tile, lines, lanes in ((row_cells, turned, bk, bq), (col_cells, bits, bq, bk)):
            numbers = number(count), number(lines), number(lanes)
            library.cells(at(tile.data_ptr()), at(cells.data_ptr()), *numbers)
        fields = {"bits": bits, "turned": turned, "row_cells": row_cells, "col_cells": col_cells}
        fields |= {"seen_keys": tiles.seen_keys, "pattern_of": pattern_of}
        fields |= {f"row_{name}": getattr(rows, name) for name in ("spans", "full", "partial", "tile", "order")}
        steps = (0 if self.samples == 1 else self.heads), (0 if self.heads == 1 else 1)
        self.problem = Problem(BQ=bq, BK=bk, nQ=rows.spans.shape[1], pattern_b=steps[0], pattern_h=steps[1])
        if columns is not None:
            fields |= {f"col_{name}": getattr(columns, name) for name in ("spans", "full", "partial", "tile")}
            self.problem.nK = columns.spans.shape[1]
        # Aliases: the key of the plan must not be kept alive by it.
        self.held = {name: x.detach().contiguous() for name, x in fields.items()}
        for name, x in self.held.items():
            setattr(self.problem, name, x.data_ptr())


def _most(side: Side, tiles: int) -> int:
    """One more than the largest block number that a side names, all of which it is looked at whether they are there."""
    spans, lists = side.spans.numpy().reshape(-1, 4), (side.full.numpy(), side.partial.numpy(), side.tile.numpy())
    most = 0
    for first, numbers in ((0, lists[:1]), (2, lists[1:])):
        start, stop = spans[:, first].astype(np.int64), spans[:, first + 1].astype(np.int64)
        if not ((start >= 0) & (start <= stop)).all() or stop.max(initial=0) > min(map(len, numbers)):
            raise ValueError("the table names entries that it does not have: its check() says where")
        met = np.zeros(len(numbers[0]) + 1, np.int64)  # lines may share entries; what is in none may be anything
        np.add.at(met, start, 1)
        np.add.at(met, stop, -1)
        for named in numbers:
            meant = named[met[:-1].cumsum() > 0] if len(named) == len(numbers[0]) else named[: stop.max(initial=0)]
            if meant.size and (meant.min() < 0 or (named is lists[2] and meant.max() >= tiles)):
                raise ValueError("the table names blocks or tiles that it does not have: its check() says where")
            if named is not lists[2]:
                most = max(most, int(meant.max(initial=-1)) + 1)
    order = side.order.numpy()
    if order.size and (order.min() < 0 or order.max() >= side.spans.shape[1]):
        raise ValueError("the table's order names rows that it does not have: its check() says where")
    return most


# For the spans of a table's rows, or of its columns in the backward: what else the plan was made of, and the plan.
_plans = WeakTensorKeyDictionary()


def _plan(
    library: Library, rows: Side, columns: Side | None, tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int]
) -> _Plan:
    spans = rows.spans if columns is None else columns.spans
    others = *rows[:5], *(columns or ())[1:4], *tiles, pattern_of
    known = _plans.get(spans)
    if known is not None:
        key, were, plan = known
        if key == (block, library.panel) and all(that() is x for that, x in zip(were, others, strict=True)):
            return cast(_Plan, plan)
    plan = _Plan(library, rows, columns, tiles, pattern_of, block)
    _plans[spans] = (block, library.panel), [ref(x) for x in others], plan
    return plan


class _Call:
    """A problem that is being filled in, and the tensors that it points at."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, score: Score, decoding: bool = False
    ) -> None:
        self.problem, self.held = Problem.from_buffer_copy(plan.problem), list[torch.Tensor]()
        problem = self.problem
        batch, q_heads, N, D = q.shape
        if (
            not (k.shape[0] == batch == v.shape[0] and k.shape[1:3] == v.shape[1:3] and k.shape[3] == D)
            or not (q.dtype == k.dtype == v.dtype and q_heads % k.shape[1] == 0)
            or (not decoding and plan.most_cols > -(-k.shape[2] // problem.BK))
            or not (plan.samples in (1, batch) and plan.heads in (1, q_heads))
        ):
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}, {k.dtype}, {v.dtype}"
            raise ValueError(f"operands do not fit each other, or the table: {shapes}")
        problem.N, problem.D = N, D
        problem.B, problem.Hq, problem.Hkv, problem.M, problem.V = batch, q_heads, *k.shape[1:3], v.shape[3]
        problem.kind = KINDS[q.dtype]
        for name, x in (("q", q), ("k", k), ("v", v)):
            self.operand(name, f"s{name}", x)
        problem.scale, problem.softcap, problem.q_offset = score.scale, score.softcap or 0.0, score.q_offset
        if score.slopes is not None:
            slopes = score.slopes.float().expand(batch, q_heads)
            problem.slope_b, problem.slope_h = slopes.stride()
            self.point("slopes", slopes)
        if score.seed is not None:
            seed = int(score.seed)
            problem.dropping, problem.seed_low, problem.seed_high = 1, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
            problem.limit = dropout.threshold(score.dropout)
        small = batch * q_heads * N * k.shape[2] * D < SMALL
        problem.threads = 1 if small else torch.get_num_threads()

    def results(
        self, q: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for out and lse, whose share the sinks take."""
        out, lse = _empty((*q.shape[:3], v.shape[3]), q.dtype), _empty(q.shape[:3])
        self.operand("out", "so", out)
        self.point("lse", lse)
        if sinks is not None:
            self.check(sinks, "sinks", q.shape[1:2], sinks.dtype)
            self.point("sinks", sinks.float().contiguous())
        return out, lse

    def check(self, x: torch.Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise ValueError unless a tensor is of this shape and dtype."""
        if tuple(x.shape) != tuple(shape) or x.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {tuple(shape)}, got {x.dtype} {tuple(x.shape)}")

    def point(self, name: str, x: torch.Tensor) -> None:
        """Let a field be the address of a tensor, which is kept until the call is over."""
        self.held.append(x)
        setattr(self.problem, name, x.data_ptr())

    def operand(self, name: str, strides: str, x: torch.Tensor) -> None:
        """A tensor [batch, heads, tokens, dim], read where it lies."""
        *steps, last = x.stride()
        if last != 1:
            x = x.contiguous()
            steps = list(x.stride()[:3])
        setattr(self.problem, strides, _Strides(*steps))
        self.point(name, x)


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)  # whatever the default device is


_CPU = torch.device("cpu")


def _served() -> Library:
    found = library()
    assert found is not None, "serves() was asked"
    return found


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: Side, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32."""
    build = _served()
    call = _Call(q, k, v, _plan(build, rows, None, tiles, pattern_of, block), score)
    if call.problem.nQ * block[0] - q.shape[2] not in range(block[0]):
        raise ValueError(f"the table is not for {q.shape[2]} queries")
    out, lse = call.results(q, v, sinks)
    build.run("forward", call.problem)
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, rows: Side, columns: Side, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v (without sinks) in their dtypes."""
    build = _served()
    plan = _plan(build, rows, columns, tiles, pattern_of, block)
    call = _Call(q, k, v, plan, score)
    problem = call.problem
    shape = *q.shape[:3], v.shape[3]
    if (
        problem.nQ * block[0] - q.shape[2] not in range(block[0])
        or plan.most_rows > problem.nQ
        or (problem.nK * block[1] - k.shape[2] not in range(block[1]))
    ):
        raise ValueError(f"the table is not for {q.shape[2]} queries and {k.shape[2]} keys")
    call.check(out, "out", shape, q.dtype)
    call.check(dout, "dout", shape, q.dtype)
    call.check(lse, "lse", shape[:3], torch.float32)
    call.operand("out", "so", out)
    call.operand("dout", "sdo", dout)
    call.point("lse", lse.contiguous())
    if dlse is not None:
        call.check(dlse, "dlse", shape[:3], dlse.dtype)
        call.point("dlse", dlse.float().contiguous())
    gradients = _empty(q.shape, q.dtype), _empty(k.shape, k.dtype), _empty(v.shape, v.dtype)
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        call.point(name, gradient)
    lines = math.prod(q.shape[:3])
    call.point("delta", _empty((lines,)))
    call.point("lse2", _empty((lines,)))
    call.point("turns", _empty((q.shape[0] * q.shape[1] * problem.nQ,), torch.int32).zero_())
    heads = q.shape[0] * k.shape[1]
    problem.held = heads
    if q.dtype != torch.float32:
        one = q.shape[2] * q.shape[3] * (q.shape[1] // k.shape[1])
        problem.held = min(heads, max(1, HELD // (4 * one)))
        call.point("dq_sum", _empty((problem.held * one,)))
    build.run("backward", problem)
    return gradients


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, rows: Side, tiles: Tiles,
    pattern_of: torch.Tensor, block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`forward`, for queries of which number i of a sample stands at its length - n + i."""
    build = _served()
    plan = _plan(build, rows, None, tiles, pattern_of, block)
    call = _Call(q, k, v, plan, score, decoding=True)
    problem = call.problem
    if problem.nQ * block[0] < k.shape[2]:
        raise ValueError(f"the table is not for {k.shape[2]} tokens")
    call.check(lengths, "lengths", q.shape[:1], lengths.dtype)
    out, lse = call.results(q, v, sinks)
    call.point("lengths", lengths.long().contiguous())
    problem.chunk = max(1, SPLIT // block[1])
    # A table may be for more tokens than the cache has room for: no row has more entries than there are columns.
    problem.chunks = max(1, -(-plan.most_cols // problem.chunk))
    call.point("parts", _empty((math.prod(q.shape[:3]), problem.chunks, v.shape[3] + 2)))
    build.run("decode", problem)
    return out, lse
