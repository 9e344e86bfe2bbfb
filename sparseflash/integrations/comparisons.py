"""Masks of ``mask_mod`` functions that compare values of the query with values of the key, without evaluating pairs.

Whatever depends on the query alone, or on the key alone, is a vector that is computed once for all positions: indices,
document ids, lengths, cells. The rest of most masks compares two such vectors, or their difference with a constant, and
combines the results. This is recognised from the operations that the function ran (:class:`Recording`), never guessed
from values; a function that combines query and key in any other way is evaluated on all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from sparseflash.integrations.mask_mods import (
    KEY,
    QUERY,
    VALUE_FREE,
    Made,
    Origin,
    Read,
    Recording,
    aten,
)
from sparseflash.integrations.stretches import Compared, Stretches
from sparseflash.patterns.block_mask import BlockMask
from sparseflash.patterns.grid import Grid, Ints

INTEGERS = (torch.int64, torch.int32)  # dtypes of sums
WHOLE = (*INTEGERS, torch.int16, torch.int8, torch.uint8, torch.bool)  # dtypes of compared values
NUMBERS_AT_ONCE = 1 << 22  # elements of one operation's result, in a chunk of queries or keys
PAST = 1 << 62  # an index after every possible key
# Sums of values below these do not overflow their dtype, nor int64 after a few more additions.
LARGEST = {torch.int64: 1 << 60, torch.int32: 1 << 29}


class Vector(NamedTuple):
    """A value that depends on the query, on the key, or on neither."""

    origin: Origin
    axis: str | None  # "q", "k"


@dataclass(frozen=True, eq=False)
class Sum:
    """``of_query[q] + of_key[k]``, or its absolute value."""

    of_query: Ints
    of_key: Ints
    absolute: bool = False


@dataclass(frozen=True, eq=False)
class Joined:
    """A mask in which a query may see more than one stretch of keys."""

    compile: Callable[[Grid], BlockMask]


Seen: TypeAlias = Stretches | Compared | Joined
Meaning: TypeAlias = "Vector | Sum | Seen | None"  # None: not recognised


def compared(recording: Recording, sample: int, head: int, grid: Grid, device: torch.device) -> BlockMask | None:
    """The mask of a recorded mask_mod for one sample and head; None if it does not consist of comparisons alone."""
    if recording.mutates or recording.answer is None:
        return None
    reading = _Reading(recording, sample, head, grid, device)
    seen = reading.seen(reading.meaning(recording.answer))
    return None if seen is None else _compiled(seen, grid)


def _compiled(seen: Seen, grid: Grid) -> BlockMask:
    # Bypasses the cache: these patterns compare by identity and are new each time.
    return seen.compile(grid) if isinstance(seen, Joined) else seen.compile_on(grid)


class _Reading:
    """Interprets the steps of a recording in order, for one sample and head."""

    def __init__(self, recording: Recording, sample: int, head: int, grid: Grid, device: torch.device) -> None:
        self.recording, self.grid, self.device = recording, grid, device
        self.place = sample, head
        self.meanings: dict[Origin, Meaning] = {QUERY: Vector(QUERY, "q"), KEY: Vector(KEY, "k")}
        self.values: dict[Origin, NDArray[Any] | None] = {}
        for index, step in enumerate(recording.steps):
            arguments = [self.meaning(x) if isinstance(x, Made | Read) else x[1] for x in step.arguments]
            tensors = [meant for meant, x in zip(arguments, step.arguments, strict=True) if isinstance(x, Made | Read)]
            vectors = [meant for meant in tensors if isinstance(meant, Vector)]
            axes = {vector.axis for vector in vectors} - {None}
            for number in range(len(step.outputs)):
                made = Made(index, number)
                if step.operator.overloadpacket in VALUE_FREE:
                    self.meanings[made] = Vector(made, None)
                    continue
                if len(vectors) == len(tensors) and len(axes) <= 1:
                    self.meanings[made] = Vector(made, *axes or (None,))
                    continue
                self.meanings[made] = self._of_both(step, arguments)

    def meaning(self, origin: Origin) -> Meaning:
        return self.meanings[origin] if origin in self.meanings else Vector(origin, None)

    def _of_both(self, step: Any, arguments: list[Any]) -> Meaning:
        """The meaning of an operation whose arguments depend on both query and key."""
        operator = step.operator.overloadpacket
        dtype, shape = step.outputs[0]
        if shape != (1,) or len(step.outputs) > 1:
            return None
        if operator in SAME:
            return self._same(arguments[0], dtype)
        if operator in ARITHMETIC and dtype in INTEGERS:
            return self._arithmetic(operator, arguments, dtype)
        if operator in COMPARISONS:
            return self._comparison(COMPARISONS[operator], arguments[0], arguments[1])
        if operator in JOINS and dtype == torch.bool:
            seen = [self.seen(meant) for meant in arguments[: 1 if operator in NEGATIONS else None]]
            if None not in seen:
                joined: Seen = JOINS[operator](*seen)
                return joined
        return None

    def _same(self, meant: Any, dtype: torch.dtype) -> Meaning:
        """The same values, perhaps in another dtype."""
        if isinstance(meant, Sum):
            return meant if dtype in INTEGERS and _largest(meant) <= LARGEST[dtype] else None
        return meant if dtype == torch.bool and isinstance(meant, Stretches | Compared | Joined) else None

    def _arithmetic(self, operator: Any, arguments: list[Any], dtype: torch.dtype) -> Meaning:
        one, *rest = arguments
        term = self._sum(one)
        if term is None:
            return None
        if operator == aten.abs:
            return Sum(term.of_query, term.of_key, absolute=True)
        if term.absolute:
            return None
        if operator == aten.neg:
            return Sum(-term.of_query, -term.of_key)
        other = self._sum(rest[0])
        if other is None or other.absolute or rest[1:] not in ([], [1]):  # a factor of the second term
            return None
        sign = 1 if operator == aten.add else -1
        total = Sum(term.of_query + sign * other.of_query, term.of_key + sign * other.of_key)
        return total if _largest(total) <= LARGEST[dtype] else None

    def _sum(self, meant: Any) -> Sum | None:
        """A value as a sum of a part per query and a part per key; None if it has no such form."""
        if isinstance(meant, Sum):
            return meant
        zero = np.zeros(1, np.int64)
        if isinstance(meant, int) and not isinstance(meant, bool):
            return Sum(zero + meant, zero) if abs(meant) <= LARGEST[torch.int64] else None
        if not isinstance(meant, Vector):
            return None
        values = self._values(meant)
        if values is None or np.abs(values).max() > LARGEST[torch.int64]:
            return None
        return Sum(zero, values) if meant.axis == "k" else Sum(values, zero)

    def _values(self, vector: Vector) -> Ints | None:
        """The values of a vector, int64 [n]: for all queries, for all keys, or one value; None if not integers."""
        if vector.origin not in self.values:
            self.values[vector.origin] = self._computed(vector)
        return self.values[vector.origin]

    def _computed(self, vector: Vector) -> Ints | None:
        if isinstance(vector.origin, Read):
            found = self.recording.contents[vector.origin.number]
            values = found.reshape(-1) if found.numel() == 1 else None
        else:
            step, number = vector.origin
            if step >= 0 and self.recording.steps[step].outputs[number][1] not in ((1,), ()):
                return None
            size = {"q": self.grid.q_len, "k": self.grid.kv_len, None: 1}[vector.axis]
            places = torch.arange(size, device=self.device)
            sample, head, zero = (torch.tensor(place, device=self.device) for place in (*self.place, 0))
            dims = None, None, 0 if vector.axis != "k" else None, 0 if vector.axis == "k" else None
            given = sample, head, places if vector.axis != "k" else zero, places if vector.axis == "k" else zero
            at_once = max(1, NUMBERS_AT_ONCE // self.recording.widest)
            ask = torch.vmap(
                self.recording.function(vector.origin), in_dims=dims, chunk_size=at_once if at_once < size else None
            )
            with torch.no_grad():
                values = ask(*given)
        if values is None or values.dtype not in WHOLE:
            return None
        return values.cpu().numpy().astype(np.int64)

    def _comparison(self, name: str, left: Any, right: Any) -> Seen | None:
        one, other = self._sum(left), self._sum(right)
        if one is None or other is None or (one.absolute and other.absolute):
            return None
        if other.absolute:
            one, other, name = other, one, TURNED[name]
        bound = (sign * part for sign in (1, -1) for part in _parts(other))
        above_q, above_k, below_q, below_k = bound
        if not one.absolute:
            return self._against_zero(name, one.of_query - above_q, one.of_key - above_k)
        if name not in ("le", "lt", "ge", "gt"):
            return None
        # |y| <= x where y <= x and y >= -x.
        near = self._against_zero(name, one.of_query - above_q, one.of_key - above_k)
        far = self._against_zero(TURNED[name], one.of_query - below_q, one.of_key - below_k)
        return both(near, far) if name in ("le", "lt") else either(near, far)

    def _against_zero(self, name: str, of_query: Ints, of_key: Ints) -> Seen:
        """Where ``of_query[q] + of_key[k]`` is below, at or above 0."""
        of_query = np.broadcast_to(of_query, self.grid.q_len)
        of_key = np.broadcast_to(of_key, self.grid.kv_len)
        if name in ("eq", "ne"):
            same = _equal(-of_query, of_key)
            return same if name == "eq" else negated(same)
        strictly = int(name in ("lt", "gt"))
        if name in ("le", "lt"):
            return _at_most(-of_query - strictly, of_key)
        return _at_most(of_query - strictly, -of_key)

    def seen(self, meant: Any) -> Seen | None:
        """A boolean value as a mask; None if it is not one."""
        if isinstance(meant, bool):
            return _at_most(np.full(self.grid.q_len, int(meant)), np.ones(self.grid.kv_len, np.int64))
        if not isinstance(meant, Vector):
            return meant if isinstance(meant, Stretches | Compared | Joined) else None
        if self._dtype(meant.origin) != torch.bool or (values := self._values(meant)) is None:
            return None
        if meant.axis == "k":
            return _at_most(np.zeros(self.grid.q_len, np.int64), 1 - values)
        return _at_most(np.broadcast_to(values, self.grid.q_len), np.ones(self.grid.kv_len, np.int64))

    def _dtype(self, origin: Origin) -> torch.dtype:
        if isinstance(origin, Read):
            return self.recording.contents[origin.number].dtype
        return torch.int64 if origin.step < 0 else self.recording.steps[origin.step].outputs[origin.number][0]


def _parts(term: Sum) -> tuple[Ints, Ints]:
    return term.of_query, term.of_key


def _largest(term: Sum) -> int:
    return int(max(np.abs(part).max() for part in _parts(term)))


def _at_most(of_query: Ints, of_key: Ints) -> Seen:
    """Where ``of_key[k] <= of_query[q]``."""
    steps = np.diff(of_key)
    nothing, everything = np.zeros(of_query.size, np.int64), np.full(of_query.size, PAST)
    if (steps >= 0).all():
        return Stretches(nothing, np.searchsorted(of_key, of_query, side="right"))
    if (steps <= 0).all():
        return Stretches(of_key.size - np.searchsorted(of_key[::-1], of_query, side="right"), everything)
    return Compared(of_query, of_key, equal=False)


def _equal(of_query: Ints, of_key: Ints) -> Seen:
    """Where ``of_key[k] == of_query[q]``."""
    begin = np.append(0, np.flatnonzero(np.diff(of_key)) + 1)
    end = np.append(begin[1:], of_key.size)
    order = np.argsort(of_key[begin], kind="stable")
    numbers = of_key[begin[order]]
    if (numbers[1:] == numbers[:-1]).any():  # a value occurs in several stretches
        return Compared(of_query, of_key, equal=True)
    place = np.minimum(np.searchsorted(numbers, of_query), numbers.size - 1)
    found = numbers[place] == of_query
    return Stretches(begin[order][place], np.where(found, end[order][place], 0))


def both(one: Seen, other: Seen) -> Seen:
    """The intersection of two masks."""
    if isinstance(one, Stretches) and isinstance(other, Stretches):
        return Stretches(np.maximum(one.low, other.low), np.minimum(one.stop, other.stop))
    return Joined(lambda grid: _compiled(one, grid) & _compiled(other, grid))


def either(one: Seen, other: Seen) -> Seen:
    """The union of two masks."""
    if isinstance(one, Stretches) and isinstance(other, Stretches):
        nothing, nothing_else = one.low >= one.stop, other.low >= other.stop
        low, stop = np.minimum(one.low, other.low), np.maximum(one.stop, other.stop)
        touching = np.maximum(one.low, other.low) <= np.minimum(one.stop, other.stop)
        if (touching | nothing | nothing_else).all():
            low = np.where(nothing, other.low, np.where(nothing_else, one.low, low))
            stop = np.where(nothing, other.stop, np.where(nothing_else, one.stop, stop))
            return Stretches(low, stop)
    return Joined(lambda grid: _compiled(one, grid) | _compiled(other, grid))


def negated(one: Seen) -> Seen:
    """The complement of a mask."""
    if isinstance(one, Stretches):
        empty = one.low >= one.stop
        if ((one.low <= 0) | empty).all():
            return Stretches(np.where(empty, 0, one.stop), np.full_like(one.stop, PAST))
        if ((one.stop >= PAST) | empty).all():
            return Stretches(np.zeros_like(one.low), np.where(empty, PAST, one.low))
    return Joined(lambda grid: ~_compiled(one, grid))


def differing(one: Seen, other: Seen) -> Seen:
    """The symmetric difference of two masks."""
    return either(both(one, negated(other)), both(other, negated(one)))


def chosen(condition: Seen, one: Seen, other: Seen) -> Seen:
    """``one`` where the condition holds, ``other`` elsewhere."""
    return either(both(condition, one), both(negated(condition), other))


SAME = {aten.alias, aten.clone, aten.detach, aten.expand, aten.view, aten._to_copy, aten.lift_fresh}
ARITHMETIC = {aten.add, aten.sub, aten.neg, aten.abs}
COMPARISONS = {aten.le: "le", aten.lt: "lt", aten.ge: "ge", aten.gt: "gt", aten.eq: "eq", aten.ne: "ne"}
TURNED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq", "ne": "ne"}
NEGATIONS = {aten.bitwise_not, aten.logical_not}
JOINS: dict[Any, Callable[..., Seen]] = {
    **dict.fromkeys((aten.bitwise_and, aten.logical_and, aten.mul), both),
    **dict.fromkeys((aten.bitwise_or, aten.logical_or), either),
    **dict.fromkeys((aten.bitwise_xor, aten.logical_xor), differing),
    **dict.fromkeys(NEGATIONS, negated),
    aten.where: chosen,
}
