"""`patterns.check` finds what a pattern's methods promise wrongly, and captured state that changed is noticed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.comparison import compare_sample
from sparseflash.patterns.grid import Grid, Ints
from sparseflash.patterns.pattern import Bools
from tests.strategies import expressions, named_leaves

SMALL: dict[str, Any] = {"lengths": (60, (37, 80)), "blocks": (16, (32, 16)), "offsets": (None, 3)}


@given(expressions(named_leaves))
def test_the_library_keeps_its_promises(pattern: Pattern) -> None:
    P.check(pattern, **SMALL)
    for block in (16, 32, (64, 16), 128):
        compare_sample(pattern, pattern.compile(300, block=block))


@dataclass(frozen=True, repr=False)
class Near(Pattern):
    """Keys at most 5 tokens away."""

    def allows(self, q: Ints, k: Ints) -> Bools:
        near: Bools = abs(q - k) <= 5
        return near

    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows = grid.all_rows()
        return grid.expand_positions(rows, grid.q_start(rows) - 5, grid.q_last(rows) + 5)

    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
        return grid.k_start(cols) - grid.q_start(rows)


class TooFew(Near):
    def candidates(self, grid: Grid) -> tuple[Ints, Ints]:
        rows = grid.all_rows()
        return grid.expand_positions(rows, grid.q_start(rows), grid.q_last(rows) + 5)


class TooAlike(Near):
    def keys(self, grid: Grid, rows: Ints, cols: Ints) -> Ints | None:
        distance: Ints = np.abs(grid.k_start(cols) - grid.q_start(rows))
        return distance


class TooFull(Near):
    def full_runs(self, grid: Grid) -> tuple[Ints, Ints, Ints]:
        rows = grid.all_rows()
        return rows, rows, rows + 1


class OtherBits(Near):
    def tiles(self, grid: Grid, rows: Ints, cols: Ints) -> Any:
        return np.zeros((rows.size, grid.bq, -(-grid.bk // 32)), np.uint32)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (TooFew(), "is True, the compiled mask says otherwise; candidates leaves out block row"),
        (TooAlike(), "keys gives block row .* the key of a block with other bits"),
        (TooFull(), "is False, .* full_runs promises that all of block row"),
        (OtherBits(), "tiles gives other bits for block row"),
        (P.per_head(P.causal(), TooFew()), "the compiled mask says otherwise"),
    ],
    ids=["candidates", "keys", "full_runs", "tiles", "per head"],
)
def test_a_broken_promise_is_named(pattern: Pattern, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=words):
        P.check(pattern)
    pattern.compile(211)  # silently wrong
    monkeypatch.setenv("SPARSEFLASH_DEBUG", "1")
    with pytest.raises(ValueError, match="the compiled mask says otherwise"):
        pattern.compile(212, block=16)


def test_what_is_no_pattern_is_not_checked() -> None:
    with pytest.raises(TypeError, match="check takes a pattern, got function"):
        P.check(P.causal)  # type: ignore[arg-type]


REACH = 3


def reaching(q: Any, k: Any) -> Any:
    return abs(q - k) <= REACH


def test_state_that_a_predicate_captured_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shift, tensor, box = np.array([1]), torch.tensor([1]), {"n": 1}

    def inner(q: Any) -> Any:
        return q + shift[0]

    by_array, by_call, by_tensor = (
        P.where(lambda q, k: k == q + shift[0]),
        P.where(lambda q, k: k == inner(q)),
        P.where(lambda q, k: k == q + tensor.item()),
    )
    by_global = P.where(reaching) & P.causal()

    def defaulted(q: Any, k: Any, s: Any = shift) -> Any:
        return k == q + s[0]

    by_default = P.where(defaulted)
    by_dict = P.where(lambda q, k: k == q + box["n"])
    everything = (by_array, by_call, by_tensor, by_default)
    assert [p.compile(40, block=16).tokens for p in (*everything, by_dict)] == [39] * 5
    assert by_global.compile(40, block=16).tokens == 4 * 40 - 6
    shift[0], box["n"] = 2, 2
    tensor.fill_(2)
    monkeypatch.setitem(reaching.__globals__, "REACH", 1)
    assert [p.compile(40, block=16).tokens for p in everything] == [38] * 4
    assert by_global.compile(40, block=16).tokens == 2 * 40 - 1
    assert by_dict.compile(40, block=16).tokens == 39, "as its docstring says, a dict is read once"


def test_unchanged_predicates_share_a_mask() -> None:
    table = np.arange(40)
    pattern = P.where(lambda q, k: table[q] == table[k])
    assert pattern.compile(40, block=16) is pattern.compile(40, block=16)


def test_classes_are_registered_and_names_replaced() -> None:
    @dataclass(frozen=True, repr=False)
    class Stripe(Pattern):
        width: int = 2

        def allows(self, q: Ints, k: Ints) -> Bools:
            stripe: Bools = k % self.width == 0
            return stripe + (q < 0)

    P.register("stripe_here", Stripe, replace=True)
    assert P.parse("stripe_here(3) | causal()") == Stripe(3) | P.causal()
    assert str(Stripe(3)) == "stripe_here(width=3)"
    with pytest.raises(ValueError, match="already called 'stripe_here'; replace=True"):
        P.register("stripe_here", lambda q, k: q == k)
    P.register("stripe_here", lambda q, k: q == k, replace=True)
    assert P.parse("stripe_here()").compile(16, block=16).tokens == 16
    with pytest.raises(ValueError, match="of the library is already called 'local'"):
        P.register("local", lambda q, k: q == k, replace=True)
    with pytest.raises(TypeError, match="a subclass of Pattern, got int"):
        P.register("an_int", int)


@pytest.mark.parametrize("name", ["lambda", "None", "a b", "ｃausal", "ﬁne", "1st", ""])
def test_names_that_would_not_be_read_back_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="must be an identifier that Python reads back"):
        P.register(name, lambda q, k: q == k)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("locl(1024)", "no pattern is called 'locl' here; did you mean local"),
        ("causl", "no pattern is called 'causl' here; did you mean causal"),
        ("local", r"written as a call: local\(window\)"),
        ("local(windw=3)", "did you mean window?"),
        ("causal() and local(5)", "joined by & and |, .*not by `and`"),
        ("not causal()", "complemented by ~"),
        ("zzzzzz()", "known are axial, beside, bigbird"),
    ],
)
def test_text_with_a_slip_is_answered_with_what_was_meant(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        P.parse(text)
