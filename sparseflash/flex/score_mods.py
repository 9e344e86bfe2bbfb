"""Recognise what a ``score_mod`` does to a score from the operations that it runs (:class:`Recording`).

A score may be multiplied by constants and by values per sample, head and query, capped by ``c * tanh(score / c)``,
shifted by terms that do not depend on it, and masked by -inf, in this order. Which of the terms kernels can add is
decided elsewhere. Nothing is guessed from values: a function of any other form is not recognised.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from sparseflash.integrations.mask_mods import (
    HEAD,
    KEY,
    QUERY,
    SAMPLE,
    SCORE,
    VALUE_FREE,
    Made,
    Origin,
    Read,
    Recording,
    aten,
)

NAMES = {SAMPLE: "sample", HEAD: "head", QUERY: "query", KEY: "key", SCORE: "score"}
OF_HEADS = frozenset(("sample", "head"))
OF_ROWS = OF_HEADS | {"query"}
INFINITY = float("inf")
WIDE = (torch.int64, torch.int32)  # sums of indices do not overflow
INTEGERS = (*WIDE, torch.int16, torch.int8, torch.uint8, torch.bool)
PLACES = (*WIDE, torch.float32, torch.float64)  # hold every index exactly
SAME = (aten.alias, aten.clone, aten.detach, aten.expand, aten.view, aten._to_copy)


class Sizes(NamedTuple):
    """The sizes of a call."""

    samples: int
    heads: int
    queries: int
    keys: int


class Bias(NamedTuple):
    """A term added to scores: what it depends on, the value it is computed from, and a constant factor."""

    depends: frozenset[str]  # among sample, head, query, key, distance
    origin: Origin | None  # None: the constant 1
    number: float

    def times(self, number: float) -> Bias:
        """The term times a constant."""
        return self._replace(number=self.number * number)

    @property
    def of_row(self) -> bool:
        """Whether it adds the same to all scores of a query."""
        return self.depends <= OF_ROWS

    @property
    def relative(self) -> bool:
        """Whether it depends on the distance, and on nothing else but the head."""
        return "distance" in self.depends and self.depends <= {"head", "distance"}


class Factor(NamedTuple):
    """A product of a constant and of values per sample, head and query."""

    number: float = 1.0
    terms: tuple[tuple[Origin, bool], ...] = ()  # the bool: whether it is a divisor
    of_query: bool = False  # whether a term depends on the query

    def times(self, other: Factor) -> Factor:
        return Factor(self.number * other.number, self.terms + other.terms, self.of_query or other.of_query)

    def inverse(self) -> Factor:
        divided = tuple((origin, not divided) for origin, divided in self.terms)
        return Factor(1 / self.number, divided, self.of_query)


ONE = Factor()


class Distance(NamedTuple):
    """``factor * (k_idx - q_idx)``, or ``factor * |k_idx - q_idx|``; `bias` is the same value as an ordinary term."""

    factor: Factor
    absolute: bool
    bias: Bias | None = None

    def times(self, factor: Factor) -> Distance:
        bias = None if self.bias is None else self.bias.times(factor.number)
        return Distance(self.factor.times(factor), self.absolute, bias)


class Condition(NamedTuple):
    """A pair is seen where this is true, or where it is false."""

    origin: Origin
    seen: bool


@dataclass(frozen=True)
class Change:
    """``cap * tanh(factor * score)``, or ``factor * score``; then biases; then -inf wherever a condition fails."""

    factor: Factor = ONE
    cap: Factor | None = None
    distances: tuple[Distance, ...] = ()
    biases: tuple[Bias, ...] = ()
    conditions: tuple[Condition, ...] = ()

    @property
    def moved(self) -> bool:
        """Whether anything is added to the scores."""
        return bool(self.distances or self.biases)

    def times(self, factor: Factor) -> Change | None:
        """The product; None if it is not of this form."""
        if (factor.terms and self.moved) or (self.conditions and (factor.terms or factor.number <= 0)):
            return None
        moved = replace(
            self,
            distances=tuple(distance.times(factor) for distance in self.distances),
            biases=tuple(bias.times(factor.number) for bias in self.biases),
        )
        if self.cap is None:
            return replace(moved, factor=self.factor.times(factor))
        return replace(moved, cap=self.cap.times(factor))


Special: TypeAlias = Change | Distance | Condition  # a condition: 0 where it holds, else -inf


def change_of(recording: Recording) -> tuple[Change | str, frozenset[int]]:
    """What a recorded score_mod does, or a description of what is not recognised; and the tensors this depends on.

    Tensors are given by their numbers. Those of conditions are read when a mask is built from them.
    """
    if recording.mutates or recording.answer is None:
        return "writes into tensors", frozenset()
    reading = _Reading(recording)
    found = reading.special.get(recording.answer)
    if isinstance(found, Change):
        return found, reading.looked.union(*(recording.read_by(one.origin) for one in found.conditions))
    if "score" not in reading.depends(recording.answer):
        return "does not use the score", reading.looked
    return reading.strange(recording.answer), reading.looked


class _Reading:
    """Interprets the steps of a recording in order."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        place, score = (torch.zeros((), dtype=of, device=recording.device) for of in (torch.long, torch.float))
        self._zeros = place, place, place, place, score  # arguments for evaluating constants
        self._depends: dict[Origin, frozenset[str]] = {made: frozenset((name,)) for made, name in NAMES.items()}
        self.special: dict[Origin, Special] = {SCORE: Change()}
        self.looked: frozenset[int] = frozenset()  # numbers of the tensors whose values were read
        self._position: dict[Origin, Made] = {QUERY: QUERY, KEY: KEY}  # an index, perhaps in another dtype
        # Integers of the form a * q_idx + b * kv_idx + c, with c independent of both, as (a, b).
        self._slopes: dict[Origin, tuple[int, int]] = {QUERY: (1, 0), KEY: (0, 1)}
        for index, step in enumerate(recording.steps):
            free = step.operator.overloadpacket in VALUE_FREE
            depends = frozenset().union(*map(self.depends, () if free else step.arguments))
            for number in range(len(step.outputs)):
                self._depends[Made(index, number)] = depends
            if len(step.outputs) == 1 and step.outputs[0][1] == (1,):
                self._read(Made(index, 0), step.operator.overloadpacket, step.arguments)

    def depends(self, argument: Any) -> frozenset[str]:
        """What a value depends on, among sample, head, query, key, distance and score."""
        return self._depends.get(argument, frozenset())

    def strange(self, answer: Origin) -> str:
        """A message that names the first operation towards the answer that is not of the recognised form."""
        for index in self.recording.behind(answer):
            step = self.recording.steps[index]
            made = Made(index, 0)
            if "score" in self.depends(made) and not isinstance(self.special.get(made), Change):
                return f"applies to the score what the kernels do not have ({step.operator.overloadpacket})"
        return "is not of a recognised form"

    def _read(self, made: Made, operator: Any, arguments: tuple[Any, ...]) -> None:
        one, dtype = arguments[0], self.recording.steps[made.step].outputs[0][0]
        if (slopes := self._sloped(operator, arguments)) is not None and dtype in WIDE:
            self._slopes[made] = slopes
            if slopes[0] == -slopes[1]:
                self._depends[made] = self._depends[made] - {"query", "key"} | ({"distance"} if slopes[1] else set())
        if operator in SAME:
            if one in self._position and dtype in PLACES:
                self._position[made] = self._position[one]
            found = self.special.get(one)
            integer = dtype in INTEGERS
            if found is not None and not (integer and not isinstance(found, Distance)):
                self.special[made] = found
            return
        found = self._computed(operator, arguments)
        if isinstance(found, Distance):
            self._depends[made] = self._depends[made] - {"query", "key"} | {"distance"}
        if found is not None:
            self.special[made] = found

    def _sloped(self, operator: Any, arguments: tuple[Any, ...]) -> tuple[int, int] | None:
        """The coefficients of the query's and the key's index in an integer; None if it is not linear in them."""
        one, *rest = map(self._slope, arguments)
        if one is None:
            return None
        if operator in SAME:
            return one
        if operator == aten.neg:
            return -one[0], -one[1]
        if operator in (aten.add, aten.sub) and len(rest) == 1 and rest[0] is not None:
            sign = 1 if operator == aten.add else -1
            return one[0] + sign * rest[0][0], one[1] + sign * rest[0][1]
        return None

    def _slope(self, argument: Any) -> tuple[int, int] | None:
        if not isinstance(argument, Made | Read):
            return (0, 0) if argument[0] is int else None
        if argument in self._slopes:
            return self._slopes[argument]
        whole = self._shaped(argument)[0] in INTEGERS
        return (0, 0) if whole and self.depends(argument) <= OF_HEADS else None

    def _shaped(self, origin: Origin) -> tuple[torch.dtype, torch.Size]:
        if isinstance(origin, Read):
            found = self.recording.contents[origin.number]
            return found.dtype, found.shape
        if origin.step < 0:
            return (torch.float32 if origin == SCORE else torch.int64), torch.Size((1,))
        return self.recording.steps[origin.step].outputs[origin.number]

    def _computed(self, operator: Any, arguments: tuple[Any, ...]) -> Special | None:
        one, *rest = arguments
        if operator in (aten.add, aten.sub):
            return self._sum(one, rest[0], operator == aten.sub) if rest[1:] in ([], [(int, 1)]) else None
        if operator in (aten.mul, aten.div) and len(rest) == 1:
            return self._product(one, rest[0], operator == aten.div)
        if operator == aten.where and len(rest) == 2:
            return self._where(one, *rest)
        if operator == aten.masked_fill:
            return self._where(rest[0], rest[1], one)
        found = self.special.get(one)
        if operator == aten.neg:
            return self._scaled(found, Factor(-1.0))
        if operator == aten.abs and isinstance(found, Distance) and not found.factor.terms:
            return Distance(Factor(abs(found.factor.number)), absolute=True)
        if operator == aten.tanh and isinstance(found, Change) and found.cap is None and not found.moved:
            return None if found.conditions else replace(found, cap=ONE)
        return None

    def _sum(self, one: Any, other: Any, minus: bool) -> Special | None:
        places = self._position.get(one), self._position.get(other)
        if minus and places in ((KEY, QUERY), (QUERY, KEY)):
            return Distance(Factor(1.0 if places[0] == KEY else -1.0), absolute=False)
        first, second = self.special.get(one), self.special.get(other)
        if isinstance(second, Change) and not isinstance(first, Change):
            negative = self._scaled(second, Factor(-1.0)) if minus else second
            if not isinstance(negative, Change):
                return None
            first, second, other, minus = negative, first, one, False
        if not isinstance(first, Change) or "score" in self.depends(other):
            return None
        if isinstance(second, Distance):
            signed = self._scaled(second, Factor(-1.0)) if minus else second
            assert isinstance(signed, Distance)
            bias = Bias(self.depends(other), other, -1.0 if minus else 1.0)
            return replace(first, distances=(*first.distances, signed._replace(bias=bias)))
        if isinstance(second, Condition):
            return None if minus else replace(first, conditions=(*first.conditions, second))
        number = self._number(other)
        if number is None and (not isinstance(other, Made | Read) or self._shaped(other)[1].numel() != 1):
            return None
        bias = Bias(self.depends(other), other if number is None else None, 1.0 if number is None else number)
        return replace(first, biases=(*first.biases, bias.times(-1.0) if minus else bias))

    def _product(self, one: Any, other: Any, divided: bool) -> Special | None:
        if self.special.get(one) is None and not divided:
            one, other = other, one
        factor = self._factor(other)
        if factor is None or (divided and factor.number == 0):
            return None
        return self._scaled(self.special.get(one), factor.inverse() if divided else factor)

    def _scaled(self, found: Special | None, factor: Factor) -> Special | None:
        if isinstance(found, Distance):
            return None if factor.of_query else found.times(factor)
        return found.times(factor) if isinstance(found, Change) else None

    def _factor(self, argument: Any) -> Factor | None:
        if (number := self._number(argument)) is not None:
            return Factor(number)
        told = isinstance(argument, Made | Read) and argument not in self.special
        if not told or self._shaped(argument)[1].numel() != 1 or not self.depends(argument) <= OF_ROWS:
            return None
        return Factor(1.0, ((argument, False),), "query" in self.depends(argument))

    def _number(self, argument: Any) -> float | None:
        """The value of an argument that is a constant and requires no gradient; None for any other."""
        if not isinstance(argument, Made | Read):
            _, value = argument
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
        read = self.recording.read_by(argument)
        if self.depends(argument) or read & self.recording.learned:
            return None
        self.looked |= read
        value = self.recording.function(argument)(*self._zeros)
        return float(value) if value.numel() == 1 and not value.is_complex() else None

    def _where(self, condition: Any, one: Any, other: Any) -> Special | None:
        if not isinstance(condition, Made) or "score" in self.depends(condition):
            return None
        seen = self._number(other) == -INFINITY
        if not seen and self._number(one) != -INFINITY:
            return None
        kept, told = one if seen else other, Condition(condition, seen)
        if isinstance(found := self.special.get(kept), Change):
            return replace(found, conditions=(*found.conditions, told))
        return told if self._number(kept) == 0 else None


def value_of(factor: Factor, recording: Recording, sizes: Sizes, score: Tensor) -> Tensor | None:
    """The product of a factor's terms, [B, H, N], or [B, H, 1] if none depends on the query; None without terms."""
    product: Tensor | None = None
    for origin, divided in factor.terms:
        queries = sizes.queries if factor.of_query else 1
        found = values_of(origin, recording, Sizes(sizes.samples, sizes.heads, queries, 1), score)[..., 0]
        found = found.reciprocal() if divided else found
        product = found if product is None else product * found
    return product


def values_of(origin: Origin, recording: Recording, sizes: Sizes, score: Tensor) -> Tensor:
    """A value for all samples, heads, queries and keys, [B, H, N, M], in the dtype of score."""
    one = recording.function(origin)
    for axis in (3, 2, 1, 0):
        one = torch.vmap(one, in_dims=tuple(0 if at == axis else None for at in range(5)))
    found = one(*(torch.arange(size, device=score.device) for size in sizes), score)
    return found.reshape(sizes).to(score.dtype)
