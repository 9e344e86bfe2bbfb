"""Textual form: what is read, and how errors point at what is not."""

from __future__ import annotations

import re

import numpy as np
import pytest

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns.parsing import MAX_DEPTH


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("causal() & local(1024)", P.causal() & P.local(1024)),
        ("causal() & (local(1024) | butterfly(unit=128))", P.causal() & (P.local(1024) | P.butterfly())),
        ("~full() - strided(3, unit=64)", ~P.full() - P.strided(3, 64)),
        ("~(full() | causal())", ~(P.full() | P.causal())),
        ("global_tokens([5, 0, 5])", P.global_tokens((0, 5))),
        ("butterfly(max_stride=None)", P.butterfly()),
        ("per_head(local(4), causal() | local(1))", P.per_head(P.local(4), P.causal() | P.local(1))),
        (" local( 7 )\n", P.local(7)),
        ("documents([2, 0], kv_lengths=[1, 3], causal=True)", P.documents((2, 0), (1, 3), causal=True)),
    ],
)
def test_reads(text: str, pattern: P.Pattern) -> None:
    assert sf.parse(text) == pattern
    assert sf.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("local(3) | lokal(4)", "no pattern is called 'lokal'", 11),
        ("local(-3)", "local: window must be at least 0, got window=-3", 0),
        ("causal() & local(True)", "local: window must be an int, got True", 11),
        ("local()", "missing a required argument: 'window'", 0),
        ("local(3, unti=3)", "local(window): got an unexpected keyword argument 'unti'", 0),
        ("strided(4, unti=3)", "unexpected keyword argument 'unti'; did you mean unit?", 0),
        ("local(2 ** 70)", "arguments are literals", 6),
        ("local(__import__('os').getpid())", "arguments are literals", 6),
        ("neighborhood({grid}, 1)", "elsewhere write the numbers, as (14, 14) for {grid}", 13),
        ("causal", "written as a call: causal()", 0),
        ("causal() + full()", "patterns are joined by | & or -", 0),
        ("(lambda: 1)()", "expected a pattern", 0),
        ("where(f)", "patterns.register(name, fn)", 0),
        ("full() | from_blocks(1)", "has no textual form", 9),
        ("causal() &", "invalid syntax", None),
        ("", "invalid syntax", None),
        (
            "per_head(full(), per_head(full(), causal()))",
            "operand 1, per_head(full(), causal()), is already per head",
            0,
        ),
        ("per_head()", "at least one pattern", 0),
        ("global_tokens([])", "at least one position", 0),
        ("local(3)\x00", "null bytes", None),
        ("local(**{'window': 3})", "** is not read here", 0),
    ],
)
def test_errors_point_at_what_they_mean(text: str, message: str, column: int | None) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sf.parse(text)
    if column is not None:
        assert str(error.value).splitlines()[-1] == "  " + " " * column + "^"


def test_errors_point_into_the_right_line() -> None:
    with pytest.raises(ValueError, match="window must be at least 0") as error:
        sf.parse("per_head(\n  local(3),\n  local(-1))")
    assert str(error.value).splitlines()[1:] == ["    local(-1))", "    ^"]


def test_long_chains_and_long_lists_are_read() -> None:
    pattern = P.local(0)
    for window in range(1, 120):
        pattern = pattern | P.local(window)
    assert sf.parse(str(pattern)) == pattern
    assert sf.parse(str(P.documents([17] * 3000))) == P.documents([17] * 3000)


def test_the_longest_chain_that_is_read() -> None:
    sf.parse(" | ".join(["full()"] * 201))
    with pytest.raises(ValueError, match="a chain of 201 operators; at most 200"):
        sf.parse(" | ".join(["full()"] * 202))


def test_hostile_sizes_are_refused() -> None:
    for text in ("(" * 5000 + "full()" + ")" * 5000, "~" * 4000 + "full()", "local(1)" + " " * 2_000_000):
        with pytest.raises(ValueError, match=r"deep|characters|many|parentheses"):
            sf.parse(text)
    with pytest.raises(ValueError, match=r"expression '\\ud800' cannot be read"):  # half a character
        sf.parse("\ud800")
    with pytest.raises(TypeError, match="parse takes text"):
        sf.parse(3)  # type: ignore[arg-type]


def test_the_deepest_nesting_that_is_read() -> None:
    def nested(levels: int) -> str:
        twos, one = divmod(levels, 2)
        return "~per_head(" * twos + "~" * one + "full()" + ")" * twos

    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        sf.parse(nested(MAX_DEPTH))
    sf.parse(nested(MAX_DEPTH - 1))
    # In a chain of n operators the last operand is one level deep, the first n.
    for chain, levels in (("full() | {}", 1), ("full() | full() | {}", 1), ("{} | full() | full()", 2)):
        sf.parse(chain.format(nested(MAX_DEPTH - 1 - levels)))
        with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
            sf.parse(chain.format(nested(MAX_DEPTH - levels)))


def test_registered_predicates_have_text() -> None:
    pattern = P.register("even_sum", lambda q, k: (q + k) % 2 == 0)
    assert str(pattern & P.causal()) == "even_sum() & causal()"
    assert sf.parse("even_sum() & causal()") == pattern & P.causal()
    assert str(P.where(np.greater)) == "where(greater)"
    with pytest.raises(ValueError, match="already called 'even_sum'"):
        P.register("even_sum", lambda q, k: q == k)
    with pytest.raises(ValueError, match="already called 'local'"):
        P.register("local", lambda q, k: q == k)
    with pytest.raises(ValueError, match="identifier"):
        P.register("two words", lambda q, k: q == k)
    with pytest.raises(TypeError, match="callable"):
        P.register("three", 3)  # type: ignore[call-overload]
