"""What one call of a FlexAttention ``mask_mod`` tells of it: what it looks at, and whether it is still the same.

A ``mask_mod`` is code that may look into anything: tensors, numbers, other functions. Mapped over its indices it cannot
branch on them, so the operations that one call runs are the operations of every call. They are recorded here, together
with the contents of the tensors that they read. That is more than ``patterns/captured.py`` can tell of predicates,
which may be numpy's: torch reads a ``mask_mod`` at every call, so a change of anything has to be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

aten = torch.ops.aten
# They take a tensor for its dtype, device and shape alone; and_masks and or_masks begin with one of them.
VALUE_FREE = {
    *(aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty, aten.new_empty_strided),
    *(aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like),
}  # fmt: skip


class Made(NamedTuple):
    """A tensor by where it came from: one of the indices, or the output of a step."""

    step: int  # -1 for indices
    number: int


class Read(NamedTuple):
    """A tensor that was there before, by its number in ``Recording.contents``."""

    number: int


@dataclass(frozen=True, eq=False)
class Recording:
    """The operations of one call of a mask_mod.

    Attributes:
        steps: (operator, structure of its arguments, the arguments), tensors replaced by where they came from.
        contents: copies of the tensors that were read, as they were then.
        looks_at_sample: whether the answer may depend on ``b``.
        looks_at_head: whether it may depend on ``h``.
    """

    steps: tuple[tuple[Any, ...], ...]
    contents: tuple[Tensor, ...]
    looks_at_sample: bool
    looks_at_head: bool

    @classmethod
    def of(cls, mask_mod: MaskMod, device: torch.device) -> Recording:
        """Call ``mask_mod`` once, on index 0 of everything, and write down what it does."""
        recorder = _Recorder(tuple(torch.zeros(1, dtype=torch.long, device=device) for _ in range(4)))
        with torch.no_grad(), recorder:
            answer = torch.vmap(mask_mod)(*recorder.indices)
        sample, head = recorder.looks(answer)
        return cls(tuple(recorder.steps), tuple(recorder.contents), sample, head)

    def same(self, other: Recording) -> bool:
        """Whether both calls ran the same operations on equal tensors, so that all answers are equal."""
        return self.steps == other.steps and equal(self.contents, other.contents)


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether tensors have equal dtypes, devices, shapes and contents, one by one."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )


class _Recorder(TorchDispatchMode):
    def __init__(self, indices: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.indices = indices
        self.steps: list[tuple[Any, ...]] = []
        self.contents: list[Tensor] = []
        self.mutates = False  # whatever was written into may depend on more than it was made of
        # Kept alive, so that no other tensor gets the id of one of them.
        self._alive: list[Tensor] = list(indices)
        self._origin: dict[int, Made | Read] = {id(index): Made(-1, i) for i, index in enumerate(indices)}
        # Of each step: which of the four indices its outputs may depend on.
        self._looks: list[frozenset[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        told = tuple(self._named(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        result = func(*args, **(kwargs or {}))
        step = len(self.steps)
        self.steps.append((func, structure, told))
        looks = frozenset() if func.overloadpacket in VALUE_FREE else frozenset().union(*map(self._seen_by, told))
        self._looks.append(looks)
        self.mutates |= func._schema.is_mutable
        for number, out in enumerate(x for x in tree_leaves(result) if isinstance(x, Tensor)):
            self._alive.append(out)
            self._origin[id(out)] = Made(step, number)
        return result

    def _named(self, x: Tensor) -> Made | Read:
        found = self._origin.get(id(x))
        if found is None:
            found = Read(len(self.contents))
            self.contents.append(x.detach().clone())
            self._alive.append(x)
            self._origin[id(x)] = found
        return found

    def _seen_by(self, argument: object) -> frozenset[int]:
        if not isinstance(argument, Made):
            return frozenset()
        return frozenset((argument.number,)) if argument.step < 0 else self._looks[argument.step]

    def looks(self, answer: Tensor) -> tuple[bool, bool]:
        """Whether the answer may depend on sample and head; where that is not known, both."""
        origin = self._origin.get(id(answer))
        seen = frozenset((0, 1)) if self.mutates or origin is None else self._seen_by(origin)
        return 0 in seen, 1 in seen
