"""Whatever text is given for a pattern, it is read or refused, and what is read can be written and compiled."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash.patterns.parsing import _constructors
from tests.refusing import or_refused
from tests.strategies import expressions, named_leaves, per_head, per_sample

NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, -(10**30)])
)
LITERALS = st.one_of(
    NUMBERS.map(str),
    st.lists(NUMBERS, max_size=4).map(str),
    st.tuples(NUMBERS, NUMBERS).map(str),
    st.sampled_from(["None", "True", "'raster'", "'morton'", "'hilbert'", "b''", "...", "1.5", "1e999", "{}", "1j"]),
    st.sampled_from(["x", "__import__('os')", "[[1]]", "{1: 2}", "f''", "*[1]", "(1)", "-1", "~1", "lambda: 1"]),
)
KEYWORDS = [
    "window",
    "unit",
    "stride",
    "summary",
    "n",
    "seed",
    "per_row",
    "lengths",
    "radius",
    "order",
    "max_stride",
    "x",
]
PIECES = st.one_of(
    st.sampled_from([" | ", " & ", " - ", "~", "(", ")", ",", "=", " ", "\n", ".", "[", "]", "**", "\x00", "#", "\\"]),
    st.sampled_from(sorted(_constructors)),
    LITERALS,
    st.text(max_size=3),
)


@st.composite
def calls(draw: st.DrawFn) -> str:
    """A call of a pattern that exists, with arguments that may be anything."""
    given_ = draw(st.lists(LITERALS, max_size=4))
    named = draw(st.lists(st.tuples(st.sampled_from(KEYWORDS), LITERALS), max_size=2))
    return f"{draw(st.sampled_from(sorted(_constructors)))}({', '.join([*given_, *(f'{k}={v}' for k, v in named)])})"


@st.composite
def mutated(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> str:
    """A text with some stretches of it replaced."""
    text = draw(texts)
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        text = text[:first] + draw(PIECES) + text[min(last, first + 6) :]
    return text


written = (expressions(named_leaves) | per_head(2, named_leaves) | per_sample(named_leaves)).map(str)
joined = st.lists(calls() | st.just("causal()"), min_size=1, max_size=4).flatmap(
    lambda parts: st.lists(st.sampled_from([" | ", " & ", " - ", " - ~"]), min_size=3, max_size=3).map(
        lambda signs: "".join(a + b for a, b in zip(parts, [*signs[: len(parts) - 1], ""], strict=True))
    )
)
soup = st.lists(PIECES, max_size=20).map("".join)


@given(st.text() | soup | joined | mutated(written))
def test_any_text_is_read_or_refused(text: str) -> None:
    with or_refused():
        pattern = sf.parse(text)
        assert sf.parse(str(pattern)) == pattern


@given(joined | mutated(written))
def test_what_is_read_compiles_or_is_refused(text: str) -> None:
    with or_refused():
        sf.parse(text).compile((70, 90), block=16).check()
