"""Stand-ins for what Gluon kernels are written with: their source runs on tensors, one program after the other.

What the hardware does later is done as late as it may be, and what it leaves undefined is NaN or an error:

- a copy by the memory accelerator destroys its place at once, and fills it when somebody waits for its barrier;
- an asynchronous product reads its operands when it is waited for, so what was overwritten meanwhile shows;
- a barrier that is waited for and never completed is an error, not a hang;
- a place that was read since the program's last barrier may not be filled again; what threads wrote to shared memory
  may not be read by products before a fence and a barrier.

Layouts say which thread holds what, change no value, and are ignored: the compiler checks them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.experimental.gluon import language as real

from sparseflash.kernels.candidates import gluon_forward
from sparseflash.kernels.triton import common as triton_common
from sparseflash.kernels.triton.types import Bits, ListPointers


class Pointer:
    """The address of an element, or of many."""

    def __init__(self, base: torch.Tensor, offset: torch.Tensor | int = 0) -> None:
        self.base, self.offset = base, torch.as_tensor(offset)
        self.dtype = SimpleNamespace(element_ty=base.dtype)

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        """Where a tensor begins: in all of its memory, whatever its strides."""
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        return cls(tensor.as_strided((size,), (1,), 0), int(tensor.storage_offset()))

    def __add__(self, more: torch.Tensor | int) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def at(self, mask: torch.Tensor | bool | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets, and which of them count; these lie within the memory."""
        offset, keep = torch.broadcast_tensors(self.offset, torch.as_tensor(True if mask is None else mask))
        inside = (offset >= 0) & (offset < len(self.base))
        assert bool((inside | ~keep).all()), "an address outside of the tensor"
        return offset, keep


def _load(pointer: Pointer, mask: Any = None, other: float = 0) -> torch.Tensor:
    offset, keep = pointer.at(mask)
    found = torch.full(offset.shape, other, dtype=pointer.base.dtype)
    found[keep] = pointer.base[offset[keep]]
    return found


def _store(pointer: Pointer, value: torch.Tensor, mask: Any = None) -> None:
    offset, keep = pointer.at(mask)
    assert value.dtype == pointer.base.dtype
    pointer.base[offset[keep]] = value.expand_as(offset)[keep]


class Shared:
    """Shared memory, or a part of it as somebody sees it."""

    def __init__(self, machine: Machine, memory: torch.Tensor, place: list[int] | None = None) -> None:
        self.machine, self.memory, self.place = machine, memory, place or []
        self.dtype = memory.dtype

    def index(self, i: Any) -> Shared:
        assert 0 <= int(i) < len(self.memory)
        return Shared(self.machine, self.memory[int(i)], [*self.place, self.memory.data_ptr(), int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.machine, self.memory.view(shape), self.place)

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.machine, self.memory.permute(order), self.place)

    @property
    def key(self) -> tuple[int, ...]:
        """Which place of a ring it is."""
        return tuple(self.place) or (self.memory.data_ptr(),)

    def load(self, layout: Any) -> torch.Tensor:
        self.machine.read_since_barrier.add(self.key)
        return self.memory.clone()

    def store(self, value: torch.Tensor) -> None:
        assert value.dtype == self.dtype
        assert not self.machine.unfinished, "threads write while products are under way"
        self.memory.copy_(value)
        self.machine.written[self.key] = {"fence", "barrier"}


class Product:
    """The result of an asynchronous product: there once it is waited for."""

    def __init__(self, compute: Callable[[], torch.Tensor]) -> None:
        self.compute = compute
        self.value: torch.Tensor | None = None

    def finish(self) -> None:
        self.value = self.compute()


class Machine:
    """What one program has: products under way, memory that waits for fences, barriers."""

    def __init__(self, program: int, programs: int) -> None:
        self.program, self.programs = program, programs
        self.unfinished: list[Product] = []
        self.read_since_barrier: set[tuple[int, ...]] = set()
        self.written: dict[tuple[int, ...], set[str]] = {}  # by threads: what is still needed before products read it
        self.phases: dict[tuple[int, ...], int] = {}  # of barriers in memory, by place: how often they completed
        self.expected: dict[tuple[int, ...], int] = {}
        self.copies: dict[tuple[int, ...], list[Callable[[], int]]] = {}
        self.products = 0

    def settle(self, what: str) -> None:
        for needs in self.written.values():
            if what == "fence" or "fence" not in needs:
                needs.discard(what)
        if what == "barrier":
            self.read_since_barrier.clear()

    def ready(self, shared: Shared) -> torch.Tensor:
        assert not self.written.get(shared.key), f"products read what waits for {self.written[shared.key]}"
        self.read_since_barrier.add(shared.key)
        return shared.memory

    def init(self, bar: Shared, count: int) -> None:
        assert count == 1
        self.phases[bar.key] = 0
        self.written[bar.key] = {"fence", "barrier"}

    def expect(self, bar: Shared, size: int, pred: Any = True) -> None:
        if pred:
            assert not self.written[bar.key], "a barrier is used before all threads know of it"
            assert bar.key not in self.expected, "a barrier expects twice in one phase"
            self.expected[bar.key] = int(size)

    def copy(self, tiles: Any, coordinates: list[Any], bar: Shared, to: Shared, pred: Any = True) -> None:
        if not pred:
            return
        assert to.key not in self.read_since_barrier, "no barrier between reading a place and filling it"
        batch, head, first, column = map(int, coordinates)
        rows, width = to.memory.shape[-2:]
        assert first >= 0
        assert column == 0
        to.memory.fill_(float("nan"))

        def arrive() -> int:
            have = tiles.tensor[batch, head, first : first + rows]
            to.memory.zero_()
            to.memory[..., : len(have), :] = have
            return int(rows * width * have.element_size())

        self.copies.setdefault(bar.key, []).append(arrive)

    def wait(self, bar: Shared, phase: Any) -> None:
        if self.phases[bar.key] % 2 == int(phase):  # the phase of this parity is not over
            assert bar.key in self.expected, "a wait that never ends: nobody will complete this barrier"
            arrived = sum(copy() for copy in self.copies.pop(bar.key, []))
            assert arrived == self.expected.pop(bar.key), "a wait that never ends: bytes that never arrive"
            self.phases[bar.key] += 1

    def product(self, a: Any, b: Shared, acc: torch.Tensor, *, use_acc: bool = True, is_async: bool = False) -> Any:
        assert isinstance(acc, torch.Tensor), "an accumulator is under way"
        for operand in (a, b):
            if isinstance(operand, Shared):
                self.ready(operand)

        def compute() -> torch.Tensor:
            self.products += 1
            left, right = (self.ready(x) if isinstance(x, Shared) else x for x in (a, b))
            assert left.dtype == right.dtype
            return (left.double() @ right.double()).float() + (acc if use_acc else 0)

        result = Product(compute)
        self.unfinished.append(result)
        return result if is_async else self.finish(0, [result])

    def finish(self, outstanding: int, deps: list[Any]) -> Any:
        while len(self.unfinished) > outstanding:
            self.unfinished.pop(0).finish()
        values = [x.value if isinstance(x, Product) else x for x in deps]
        assert all(value is not None for value in values), "a result is used while its product is under way"
        return values[0] if len(values) == 1 else tuple(values)

    def language(self) -> SimpleNamespace:
        """Stands for both languages' modules."""

        def shared(dtype: torch.dtype, shape: list[int], layout: Any, value: torch.Tensor | None = None) -> Shared:
            floating = dtype.is_floating_point
            made = Shared(self, torch.full(shape, float("nan") if floating else 0, dtype=dtype))
            if value is not None:
                made.store(value)
            return made

        return SimpleNamespace(
            constexpr=real.constexpr, SliceLayout=lambda *_: None, NVMMADistributedLayout=lambda *_: None,
            DotOperandLayout=lambda *_: SimpleNamespace(parent=None), BlockedLayout=lambda *_: None,
            NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
            int64=torch.int64, int32=torch.int32, float32=torch.float32, static_range=range,
            program_id=lambda axis: torch.tensor(self.program), num_programs=lambda axis: self.programs,
            load=_load, store=_store, where=_where,
            arange=lambda start, stop, layout=None: torch.arange(start, stop),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
            max=lambda x, axis: x.amax(axis), min=lambda x, axis: x.amin(axis), sum=lambda x, axis: x.sum(axis),
            maximum=_binary(torch.maximum), minimum=_binary(torch.minimum), exp2=torch.exp2, log2=torch.log2, abs=abs,
            convert_layout=lambda x, layout: x, allocate_shared_memory=shared,
        )  # fmt: skip


def _where(condition: Any, yes: Any, no: Any) -> torch.Tensor:
    like = next(x for x in (yes, no) if isinstance(x, torch.Tensor))
    one, two = (torch.as_tensor(x, dtype=like.dtype) for x in (yes, no))
    return torch.where(torch.as_tensor(condition), one, two)


def _binary(function: Callable[..., torch.Tensor]) -> Callable[[Any, Any], torch.Tensor]:
    return lambda x, y: function(torch.as_tensor(x), torch.as_tensor(y))


class Emulated:
    """A kernel that runs here; launched like the real one."""

    def __init__(self) -> None:
        self.programs, self.products = 0, 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int], *arguments: Any, num_warps: int, **constants: Any) -> None:
        names = KERNEL.arg_names[: len(arguments)]
        given: dict[str, Any] = {}
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, ListPointers | Bits):
                value = type(value)(*(None if field is None else Pointer.to(field) for field in value))
            elif name.endswith("_ptr") and value is not None:
                value = Pointer.to(value)
            elif isinstance(value, int | float):
                value = torch.tensor(value, dtype=torch.int32 if isinstance(value, int) else torch.float64)
            given[name] = value
        assert num_warps == constants["WARPS"]
        for program in range(grid[0]):
            machine = Machine(program, grid[0])
            with _standing_in(machine):
                KERNEL.fn(**given, **constants)
            assert not machine.unfinished, "a program ends while products are under way"
            assert not machine.expected, "a program ends while copies are under way"
            self.programs += 1
            self.products += machine.products


KERNEL = gluon_forward.gluon_kernel


@contextmanager
def _standing_in(machine: Machine) -> Iterator[None]:
    language = machine.language()
    plain = {
        name: value.fn
        for name, value in vars(gluon_forward).items()
        if hasattr(value, "fn") and hasattr(value, "arg_names") and value is not KERNEL
    }
    own = {
        "gl": language,
        "LOG2E": triton_common.LOG2E.value,
        "LN2": triton_common.LN2.value,
        "barrier": lambda: machine.settle("barrier"),
        "fence_async_shared": lambda: machine.settle("fence"),
        "mbarrier": SimpleNamespace(
            init=machine.init, expect=machine.expect, wait=machine.wait, MBarrierLayout=lambda: None
        ),
        "tma": SimpleNamespace(async_copy_global_to_shared=machine.copy),
        "warpgroup_mma": machine.product,
        "warpgroup_mma_wait": machine.finish,
    }
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(gluon_forward, **plain, **own))
        stack.enter_context(mock.patch.object(triton_common, "tl", language))
        yield


def in_rings(rows: int, *tensors: torch.Tensor) -> tuple[Any, ...]:
    """Stands for `gluon_forward.in_rings`."""
    return tuple(
        SimpleNamespace(tensor=x, layout=None, block_type=SimpleNamespace(nbytes=rows * x.shape[-1] * x.element_size()))
        for x in tensors
    )
