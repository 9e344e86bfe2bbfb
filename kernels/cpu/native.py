"""The compiled kernel: which library is loaded, and its calls.

Every address that goes there is of a tensor whose shape, dtype, strides and device were looked at here; what a lookup
table says is taken at its word, as on a GPU (``LookupTable.check``).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from operator import is_
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from sparseflash.kernels import bias as biases
from sparseflash.kernels import dropout
from sparseflash.kernels.cpu import build, levels
from sparseflash.kernels.layout import BlockLists, Results, Score, Tiles

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of dQ in float32 that are held at a time, or those of one key head, where dQ itself is of half precision.
HELD = 1 << 25
# Bytes of a bias's gradient by distance that are held at a time, each block column with its own.
SUMS = 1 << 26
# Keys of one work item of decoding: a row of more is split.
SPLIT = 2048
# Multiplications below which one thread is as fast as several.
SMALL = 1 << 18
# Kinds of operands that a table's plan remembers.
FORMS = 64
VARIABLE = "SPARSEFLASH_CPU"
PLAIN = "plain"
LOG2_E = 1.4426950408889634

# Of `layout.BlockLists`, the fields that the kernel reads.
LISTS = ("ranges", "full_indices", "partial_indices", "partial_tiles")

_pointers = (
    *("q", "k", "v", "out", "lse", "dout", "dlse", "dq", "dk", "dv", "dq_sum", "delta", "lse2", "turns", "slopes"),
    *("sinks", "bias", "bias_sums", *(f"row_{name}" for name in LISTS), "row_order"),
    *(*(f"col_{name}" for name in LISTS), "pattern_of", "bits", "seen_keys", "turned", "row_cells"),
    *("col_cells", "lengths", "parts"),
)
_numbers = (
    *("B", "Hq", "Hkv", "N", "M", "D", "V", "BQ", "BK", "nQ", "nK", "slope_b", "slope_h", "pattern_b", "pattern_h"),
    *("q_offset", "bias_b", "bias_h", "bias_n", "bias_m", "reach", "bias_samples", "bias_heads", "bias_rows"),
    *("first_col", "cols", "kind", "held", "chunk", "chunks", "dropping", "limit", "seed_low", "seed_high", "threads"),
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
        for call in ("forward", "backward", "decode", "bias_gradient"):
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
    """What the walks need of a table: the fields of a problem that do not depend on a call's tensors.

    Beside what lies in a table these are its tiles from the keys' side, and what of them can be skipped. Both passes
    share it; block columns are looked at when the first gradient asks for them.
    """

    def __init__(
        self, library: Library, rows: BlockLists, tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int]
    ) -> None:
        bits = tiles.bits.detach().contiguous()
        bq, bk = block
        count = len(bits)
        # The least number of block columns and block rows that the kernel's indices imply.
        self.most_cols, self.most_rows = _most(rows, count), 0
        self.samples, self.heads = pattern_of.shape
        if pattern_of.min() < 0 or pattern_of.max() >= len(rows.ranges):
            raise ValueError("the table names patterns that it does not have: its check() says where")
        turned = torch.empty((count, bk, -(-bq // 32)), dtype=torch.int32)
        row_cells, col_cells = (torch.empty((count, -(-side // library.panel)), dtype=torch.int64) for side in block)
        number, at = ctypes.c_int64, ctypes.c_void_p
        library.turn(at(bits.data_ptr()), at(turned.data_ptr()), number(count), number(bq), number(bk))
        for cells, tile, lines, lanes in ((row_cells, turned, bk, bq), (col_cells, bits, bq, bk)):
            numbers = number(count), number(lines), number(lanes)
            library.cells(at(tile.data_ptr()), at(cells.data_ptr()), *numbers)
        steps = (0 if self.samples == 1 else self.heads), (0 if self.heads == 1 else 1)
        self.problem = Problem(BQ=bq, BK=bk, nQ=rows.ranges.shape[1], pattern_b=steps[0], pattern_h=steps[1])
        self.held, self.forms = dict[str, torch.Tensor](), dict[Hashable, _Form]()
        self.point(
            {"bits": bits, "turned": turned, "row_cells": row_cells, "col_cells": col_cells}
            | {"seen_keys": tiles.seen_keys, "pattern_of": pattern_of}
            | {f"row_{name}": getattr(rows, name) for name in (*LISTS, "order")}
        )
        # What it was made of must not be kept alive by it.
        self._made_for, self._columns = (library, block), list[ref[torch.Tensor]]()
        self._made_of = [ref(x) for x in (*rows[:5], *tiles, pattern_of)]

    def point(self, fields: Mapping[str, torch.Tensor]) -> None:
        """Let fields be the addresses of tensors, of aliases that are kept."""
        for name, x in fields.items():
            self.held[name] = x.detach().contiguous()
            setattr(self.problem, name, self.held[name].data_ptr())

    def is_of(
        self, library: Library, rows: BlockLists, tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int]
    ) -> bool:
        """Whether it was made of these very tensors."""
        return self._made_for == (library, block) and _all_are(self._made_of, (*rows[:5], *tiles, pattern_of))

    def beside(self, columns: BlockLists) -> _Plan:
        """The plan that knows these block columns too."""
        if self._columns and _all_are(self._columns, columns[:4]):
            return self
        both = copy(self)  # another thread may be reading this one
        both.problem, both.held, both.forms = Problem.from_buffer_copy(self.problem), dict(self.held), {}
        both.most_rows = _most(columns, len(self.held["bits"]))
        both.problem.nK = columns.ranges.shape[1]
        both.point({f"col_{name}": getattr(columns, name) for name in LISTS})
        both._columns = [ref(x) for x in columns[:4]]
        return both

    def form(self, call: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score) -> _Form:
        """Of a call's operands what was looked at once, for all calls that are alike."""
        key = (
            *(call, q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype),
            *(score.scale, score.softcap, score.q_offset),
        )
        found = self.forms.get(key)
        if found is None:
            if len(self.forms) >= FORMS:
                self.forms.clear()
            found = self.forms[key] = _Form(self, call, q, k, v, score)
        return found


def _all_are(kept: Sequence[ref[torch.Tensor]], tensors: Sequence[torch.Tensor]) -> bool:
    return all(map(is_, [that() for that in kept], tensors))


def _most(side: BlockLists, tiles: int) -> int:
    """One more than the largest block number in these lists, after checking that all entries exist."""
    ranges = side.ranges.numpy().reshape(-1, 4)
    lists = [part.numpy() for part in (side.full_indices, side.partial_indices, side.partial_tiles)]
    most = 0
    for first, numbers in ((0, lists[:1]), (2, lists[1:])):
        start, stop = ranges[:, first].astype(np.int64), ranges[:, first + 1].astype(np.int64)
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
    if order.size and (order.min() < 0 or order.max() >= side.ranges.shape[1]):
        raise ValueError("the table's order names rows that it does not have: its check() says where")
    return most


# For the ranges of a table's rows.
_plans = WeakTensorKeyDictionary()


def _plan(
    library: Library,
    rows: BlockLists,
    columns: BlockLists | None,
    tiles: Tiles,
    pattern_of: torch.Tensor,
    block: tuple[int, int],
) -> _Plan:
    known: _Plan | None = _plans.get(rows.ranges)
    if known is None or not known.is_of(library, rows, tiles, pattern_of, block):
        known = _plans[rows.ranges] = _Plan(library, rows, tiles, pattern_of, block)
    if columns is None:
        return known
    both = known.beside(columns)
    if both is not known:
        _plans[rows.ranges] = both
    return both


class _Form:
    """What calls on operands of equal shapes, strides and dtypes have in common: a problem without their addresses."""

    def __init__(self, plan: _Plan, call: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score) -> None:
        self.problem = problem = Problem.from_buffer_copy(plan.problem)
        batch, q_heads, N, D = q.shape
        kv_heads, M, V = *k.shape[1:3], v.shape[3]
        bq, bk = problem.BQ, problem.BK
        if (
            not (k.shape[0] == batch == v.shape[0] and k.shape[1:3] == v.shape[1:3] and k.shape[3] == D)
            or not (q.dtype == k.dtype == v.dtype and q_heads % kv_heads == 0)
            or (call != "decode" and plan.most_cols > -(-M // bk))
            or not (plan.samples in (1, batch) and plan.heads in (1, q_heads))
        ):
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype}, {k.dtype}, {v.dtype}"
            raise ValueError(f"operands do not fit each other, or the table: {shapes}")
        if call == "decode" and problem.nQ * bq < M:
            raise ValueError(f"the table is not for {M} tokens")
        if call == "forward" and problem.nQ * bq - N not in range(bq):
            raise ValueError(f"the table is not for {N} queries")
        if call in ("backward", "bias_gradient") and (
            problem.nQ * bq - N not in range(bq) or plan.most_rows > problem.nQ or problem.nK * bk - M not in range(bk)
        ):
            raise ValueError(f"the table is not for {N} queries and {M} keys")
        self.out, self.lse, self.lines = (batch, q_heads, N, V), (batch, q_heads, N), batch * q_heads * N
        problem.B, problem.Hq, problem.Hkv, problem.N, problem.M = batch, q_heads, kv_heads, N, M
        problem.D, problem.V, problem.kind = D, V, KINDS[q.dtype]
        problem.sq, problem.sk, problem.sv = (_Strides(*x.stride()[:3]) for x in (q, k, v))
        problem.so = problem.sdo = _Strides(q_heads * N * V, N * V, V)
        problem.scale, problem.softcap, problem.q_offset = score.scale, score.softcap or 0.0, score.q_offset
        self.work = self.lines * M * D
        # Of dQ in float32, one key head and as many of them as are held at a time.
        self.one, problem.held = N * D * (q_heads // kv_heads), batch * kv_heads
        if q.dtype != torch.float32:
            problem.held = min(problem.held, max(1, HELD // (4 * self.one)))


class _Call:
    """A problem that is being filled in, and the tensors that it points at."""

    def __init__(self, call: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: _Plan, score: Score) -> None:
        q, k, v = _last_dim_dense(q), _last_dim_dense(k), _last_dim_dense(v)
        self.plan, self.form = plan, plan.form(call, q, k, v, score)
        self.problem, self.held = Problem.from_buffer_copy(self.form.problem), list[torch.Tensor]()
        problem = self.problem
        self.point("q", q)
        self.point("k", k)
        self.point("v", v)
        if score.slopes is not None:
            slopes = score.slopes.float().expand(q.shape[:2])
            problem.slope_b, problem.slope_h = slopes.stride()
            self.point("slopes", slopes)
        if score.bias is not None:
            self.take_bias(score.bias, q, k)
        if score.seed is not None:
            seed = int(score.seed)
            problem.dropping, problem.seed_low, problem.seed_high = 1, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
            problem.limit = dropout.threshold(score.dropout)
        problem.threads = 1 if self.form.work < SMALL else torch.get_num_threads()

    def take_bias(self, bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> None:
        """Let it be read where it lies, in fp32."""
        problem = self.problem
        sizes = (*q.shape[:3], k.shape[2]) if bias.dim() == 4 else (q.shape[1], bias.shape[1])
        if any(have not in (1, size) for have, size in zip(bias.shape, sizes, strict=True)):
            raise ValueError(f"bias does not fit the operands: {tuple(bias.shape)}, which must be {sizes} or 1")
        for dim, stride in enumerate(bias.stride()):
            if stride == 0:  # as expanded tensors have: they would be copied whole
                bias = bias.narrow(dim, 0, 1)
        whole = bias.float()
        steps = [0 if size == 1 else step for size, step in zip(whole.shape, whole.stride(), strict=True)]
        problem.reach = -1
        if whole.dim() == 4:
            problem.bias_b, problem.bias_h, problem.bias_n, problem.bias_m = steps
        else:
            whole = whole.contiguous()
            problem.bias_h, problem.reach = 0 if whole.shape[0] == 1 else whole.shape[1], whole.shape[1] // 2
        self.point("bias", whole)

    def results(self, q: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for out and lse, whose share the sinks take."""
        out, lse = _empty(self.form.out, q.dtype), _empty(self.form.lse)
        self.point("out", out)
        self.point("lse", lse)
        if sinks is not None:
            self.check(sinks, "sinks", q.shape[1:2], sinks.dtype)
            self.point("sinks", sinks.float().contiguous())
        return out, lse

    def check(self, x: torch.Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Raise ValueError unless a tensor is of this shape and dtype."""
        if x.shape != shape or x.dtype != dtype:
            raise ValueError(f"{name} must be {dtype} {tuple(shape)}, got {x.dtype} {tuple(x.shape)}")

    def point(self, name: str, x: torch.Tensor) -> None:
        """Let a field be the address of a tensor, which is kept until the call is over."""
        self.held.append(x)
        setattr(self.problem, name, x.data_ptr())

    def operand(self, name: str, strides: str, x: torch.Tensor) -> None:
        """A tensor [batch, heads, tokens, dim] of the shape of out, read where it lies."""
        if not x.is_contiguous():  # else the strides are those of the form
            x = _last_dim_dense(x)
            setattr(self.problem, strides, _Strides(*x.stride()[:3]))
        self.point(name, x)


def _last_dim_dense(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_CPU)  # whatever the default device is


_CPU = torch.device("cpu")


def _served() -> Library:
    found = library()
    assert found is not None, "serves() was asked"
    return found


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Out [B, Hq, N, V] in q's dtype and lse [B, Hq, N], of the keys alone, in fp32."""
    build = _served()
    call = _Call("forward", q, k, v, _plan(build, rows, None, tiles, pattern_of, block), score)
    out, lse = call.results(q, sinks)
    build.run("forward", call.problem)
    return out, lse


def backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, rows: BlockLists, columns: BlockLists, tiles: Tiles, pattern_of: torch.Tensor,
    block: tuple[int, int], score: Score,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k, v (without sinks) in their dtypes."""
    build = _served()
    call = _Call("backward", q, k, v, _plan(build, rows, columns, tiles, pattern_of, block), score)
    form, problem = call.form, call.problem
    call.check(out, "out", form.out, q.dtype)
    call.check(dout, "dout", form.out, q.dtype)
    call.check(lse, "lse", form.lse, torch.float32)
    call.operand("out", "so", out)
    call.operand("dout", "sdo", dout)
    call.point("lse", lse.contiguous())
    if dlse is not None:
        call.check(dlse, "dlse", form.lse, dlse.dtype)
        call.point("dlse", dlse.float().contiguous())
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    call.point("dq", dq)
    call.point("dk", dk)
    call.point("dv", dv)
    call.point("delta", _empty((form.lines,)))
    call.point("lse2", _empty((form.lines,)))
    call.point("turns", _empty((q.shape[0] * q.shape[1] * problem.nQ,), torch.int32).zero_())
    if q.dtype != torch.float32:
        call.point("dq_sum", _empty((problem.held * form.one,)))
    build.run("backward", problem)
    return dq, dk, dv


def bias_gradient(
    results: Results, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, rows: BlockLists,
    columns: BlockLists, tiles: Tiles, pattern_of: torch.Tensor, block: tuple[int, int], score: Score,
) -> torch.Tensor:  # fmt: skip
    """The gradient of a bias (without sinks), in its shape and dtype. Sums are in fp32."""
    build, (dout, dlse, out, lse) = _served(), results
    call = _Call("bias_gradient", q, k, v, _plan(build, rows, columns, tiles, pattern_of, block), score)
    form, problem = call.form, call.problem
    call.check(out, "out", form.out, q.dtype)
    call.check(dout, "dout", form.out, q.dtype)
    call.check(lse, "lse", form.lse, torch.float32)
    call.operand("dout", "sdo", dout)
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        call.check(dlse, "dlse", form.lse, dlse.dtype)
        delta -= dlse
    call.point("delta", delta)
    call.point("lse2", (lse * LOG2_E).masked_fill_(lse == -torch.inf, torch.inf).contiguous())
    relative = biases.is_relative(bias)
    problem.bias_samples, problem.bias_heads, problem.bias_rows = (1, bias.shape[0], 1) if relative else bias.shape[:3]
    total = torch.zeros(bias.shape, dtype=torch.float32, device=_CPU)
    if not relative:
        problem.cols = problem.nK
        call.point("bias_sums", total)
        build.run("bias_gradient", problem)
        return total.to(bias.dtype)
    together = max(1, SUMS // (4 * total.numel()))
    for first in range(0, problem.nK, together):
        problem.first_col, problem.cols = first, min(together, problem.nK - first)
        sums = torch.zeros((problem.cols, *total.shape), dtype=torch.float32, device=_CPU)
        problem.bias_sums = sums.data_ptr()
        build.run("bias_gradient", problem)
        total += sums.sum(0)
    return total.to(bias.dtype)


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: torch.Tensor, rows: BlockLists, tiles: Tiles,
    pattern_of: torch.Tensor, block: tuple[int, int], score: Score, sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """As :func:`forward`; query i of a sample is at position length - n + i."""
    build = _served()
    plan = _plan(build, rows, None, tiles, pattern_of, block)
    call = _Call("decode", q, k, v, plan, score)
    form, problem = call.form, call.problem
    call.check(lengths, "lengths", q.shape[:1], lengths.dtype)
    out, lse = call.results(q, sinks)
    call.point("lengths", lengths.long().contiguous())
    problem.chunk = max(1, SPLIT // block[1])
    # A table may be for more tokens than the cache has room for: no row has more entries than there are columns.
    problem.chunks = max(1, -(-plan.most_cols // problem.chunk))
    call.point("parts", _empty((form.lines, problem.chunks, v.shape[3] + 2)))
    build.run("decode", problem)
    return out, lse
