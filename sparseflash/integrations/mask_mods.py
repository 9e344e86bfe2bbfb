"""Record one call of a FlexAttention ``mask_mod`` or ``score_mod``.

Such a function is code that may read anything: tensors, numbers, other functions. Under vmap it cannot branch on its
indices, so the operations of one call are the operations of every call: a graph, as torch.fx would trace it. They are
recorded here, with the contents of the tensors that they read. The recording shows which indices the function depends
on, whether it has changed, and what it computes (``comparisons.py``). ``patterns/captured.py`` checks less for
predicates, which may use numpy; but torch evaluates a ``mask_mod`` at every call, so every change has to be noticed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

MaskMod: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

aten = torch.ops.aten
# Operators that use only the dtype, device and shape of a tensor; and_masks and or_masks begin with one of them.
VALUE_FREE = {
    *(aten.new_ones, aten.new_zeros, aten.new_full, aten.new_empty, aten.new_empty_strided),
    *(aten.ones_like, aten.zeros_like, aten.full_like, aten.empty_like),
}  # fmt: skip


class Made(NamedTuple):
    """A tensor that is an argument or the output of a step."""

    step: int  # -1 for arguments
    number: int


SAMPLE, HEAD, QUERY, KEY, SCORE = (Made(-1, number) for number in range(5))


class Read(NamedTuple):
    """A captured tensor, by its index in ``Recording.contents``."""

    number: int


Origin: TypeAlias = Made | Read


class Step(NamedTuple):
    """One operation: its arguments, with tensors replaced by their origin, and the form of its outputs."""

    operator: Any
    structure: TreeSpec
    arguments: tuple[Any, ...]  # an Origin, or (type, value)
    outputs: tuple[tuple[torch.dtype, torch.Size], ...]

    def call(self, given: Sequence[Any]) -> Any:
        """The operator's result for other leaves of the arguments."""
        args, kwargs = tree_unflatten(list(given), self.structure)
        return self.operator(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Recording:
    """The operations of one call of a mask_mod or score_mod.

    Attributes:
        steps: the operations in the order in which they ran, each index a tensor of one element.
        contents: the tensors that were read; copies for a mask_mod.
        answer: the origin of the result; None if unknown.
        looks_at_sample: whether the answer may depend on ``b``.
        looks_at_head: whether it may depend on ``h``.
        mutates: whether an operation wrote into a tensor, so that the steps are not a graph.
        learned: indices of the tensors in ``contents`` that require a gradient.
        device: of the arguments.
        compared: indices of the tensors whose contents :meth:`same` compares; None: all.
    """

    steps: tuple[Step, ...]
    contents: tuple[Tensor, ...]
    answer: Origin | None
    looks_at_sample: bool
    looks_at_head: bool
    mutates: bool
    learned: frozenset[int]
    device: torch.device
    compared: frozenset[int] | None = None

    @classmethod
    def of(cls, mod: Callable[..., Tensor], device: torch.device, score: torch.dtype | None = None) -> Recording:
        """Call a mod once, with all indices 0 and, for a score_mod, a score of 0, and record what it does."""
        indices = tuple(torch.zeros(1, dtype=torch.long, device=device) for _ in range(4))
        scores = () if score is None else (torch.zeros(1, dtype=score, device=device),)
        recorder = _Recorder(indices + scores, copies=score is None)
        with torch.no_grad(), recorder:
            answer = torch.vmap(mod)(*scores, *indices)
        sample, head = recorder.looks(answer)
        return cls(
            *(tuple(recorder.steps), tuple(recorder.contents), recorder.origin(answer), sample, head),
            *(recorder.mutates, frozenset(recorder.learned), device),
        )

    def same(self, other: Recording) -> bool:
        """Whether both calls ran the same operations on equal tensors, so that all answers are equal."""
        if (self.steps, self.learned) != (other.steps, other.learned) or len(self.contents) != len(other.contents):
            return False
        here = range(len(self.contents)) if other.compared is None else sorted(other.compared)
        forms = [[(x.dtype, x.device, x.shape) for x in recording.contents] for recording in (self, other)]
        return forms[0] == forms[1] and all(torch.equal(self.contents[n], other.contents[n]) for n in here)

    def kept(self, compared: frozenset[int]) -> Recording:
        """The recording to keep: with copies of the tensors to compare, and empty placeholders for the others."""
        copies = tuple(
            x.detach().clone() if number in compared else x.new_empty(()).expand(x.shape)
            for number, x in enumerate(self.contents)
        )
        return replace(self, contents=copies, compared=compared)

    @property
    def widest(self) -> int:
        """Elements of the largest tensor that a step makes for one value of each index."""
        return max((shape.numel() for step in self.steps for _, shape in step.outputs), default=1)

    def function(self, origin: Origin) -> Callable[..., Tensor]:
        """The value at ``origin`` as a function of scalars (b, h, q_idx, kv_idx) and, if any, a score; for vmap."""
        wanted = self.behind(origin)

        def computed(*arguments: Tensor) -> Tensor:
            values: dict[Origin, Tensor] = {Made(-1, number): x.reshape(1) for number, x in enumerate(arguments)} | {
                Read(number): x for number, x in enumerate(self.contents)
            }
            for index in wanted:
                step = self.steps[index]
                result = step.call([values[x] if isinstance(x, Made | Read) else x[1] for x in step.arguments])
                values |= {Made(index, n): x for n, x in enumerate(_tensors(result))}
            found = values[origin]
            return found[0] if isinstance(origin, Made) and found.dim() else found

        return computed

    def behind(self, origin: Origin) -> list[int]:
        """The steps on which a tensor depends, in order."""
        wanted: set[int] = set()
        waiting: list[Any] = [origin]
        while waiting:
            found = waiting.pop()
            if isinstance(found, Made) and found.step >= 0 and found.step not in wanted:
                wanted.add(found.step)
                waiting += self.steps[found.step].arguments
        return sorted(wanted)

    def read_by(self, origin: Origin) -> frozenset[int]:
        """Indices in ``contents`` of the tensors from which a value is computed."""
        read = [x for index in self.behind(origin) for x in self.steps[index].arguments] + [origin]
        return frozenset(x.number for x in read if isinstance(x, Read))


def _tensors(result: Any) -> list[Tensor]:
    return [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def equal(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether tensors have equal dtypes, devices, shapes and contents, one by one."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in zip(some, others, strict=True)
    )


class _Recorder(TorchDispatchMode):
    def __init__(self, arguments: tuple[Tensor, ...], copies: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies = copies
        self.steps: list[Step] = []
        self.contents: list[Tensor] = []
        self.mutates = False  # after a write, a tensor may depend on more than its recorded origin
        self.learned: set[int] = set()
        # Keeps tensors alive, so that no other tensor can get the id of one of them.
        self._alive: list[Tensor] = list(arguments)
        self._origin: dict[int, Origin] = {id(x): Made(-1, i) for i, x in enumerate(arguments)}
        # For each step: the arguments on which its outputs may depend.
        self._looks: list[frozenset[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, structure = tree_flatten((args, kwargs or {}))
        told = tuple(self._named(x) if isinstance(x, Tensor) else (type(x), x) for x in leaves)
        result = func(*args, **(kwargs or {}))
        step = len(self.steps)
        outs = _tensors(result)
        self.steps.append(Step(func, structure, told, tuple((x.dtype, x.shape) for x in outs)))
        looks = frozenset() if func.overloadpacket in VALUE_FREE else frozenset().union(*map(self._seen_by, told))
        self._looks.append(looks)
        self.mutates |= func._schema.is_mutable
        for number, out in enumerate(outs):
            self._alive.append(out)
            self._origin[id(out)] = Made(step, number)
        return result

    def _named(self, x: Tensor) -> Origin:
        found = self._origin.get(id(x))
        if found is None:
            found = Read(len(self.contents))
            self.contents.append(x.detach().clone() if self.copies else x)
            if x.requires_grad:
                self.learned.add(found.number)
            self._alive.append(x)
            self._origin[id(x)] = found
        return found

    def _seen_by(self, argument: object) -> frozenset[int]:
        if not isinstance(argument, Made):
            return frozenset()
        return frozenset((argument.number,)) if argument.step < 0 else self._looks[argument.step]

    def origin(self, answer: Tensor) -> Origin | None:
        return self._origin.get(id(answer))

    def looks(self, answer: Tensor) -> tuple[bool, bool]:
        """Whether the answer may depend on the sample and on the head; (True, True) if unknown."""
        origin = self.origin(answer)
        seen = frozenset((0, 1)) if self.mutates or origin is None else self._seen_by(origin)
        return 0 in seen, 1 in seen
