"""Tokens beside those of a pattern, and patterns one after another in a row: right wherever blocks begin."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.integrations.transformers.sequences import within
from sparseflash.patterns import Pattern
from sparseflash.rotary import PackedRotary, Rotary2d
from sparseflash.tables.padded import depends_on_length, padded_table
from tests.strategies import BLOCKS, Shape, expressions, named_leaves, per_head

blocks = st.tuples(st.sampled_from(BLOCKS), st.sampled_from(BLOCKS))
SIZED: list[Pattern] = [
    P.neighborhood((7, 9), 2),
    P.neighborhood((8, 8), 1, "morton") - P.axial((8, 8)),
    P.documents([1, 50, 0, 20]),
    P.documents([130]) & P.causal(),
    P.documents([40]) & P.random_blocks(2, unit=7),
    P.per_head(P.axial((6, 11)), P.documents([66]) & ~P.local(5)),
    P.beside(P.axial((5, 8)), 3, 2, sees=False),
    P.packed(P.axial((3, 3)), P.documents([17])),
    P.documents([0]),
]


def alone(pattern: Pattern, tokens: int) -> np.ndarray:
    """The pattern's own mask, bool [heads or 1, tokens, tokens]."""
    if tokens == 0:
        return np.zeros((1, 0, 0), bool)
    return pattern.compile(tokens, block=16).to_dense().reshape(-1, tokens, tokens)


def surrounded(own: np.ndarray, before: int, after: int, sees: bool, seen: bool) -> np.ndarray:
    """Masks [..., n, n] with tokens before and after them, by the definition."""
    n = own.shape[-1]
    whole = np.ones((*own.shape[:-2], before + n + after, before + n + after), bool)
    inside = slice(before, before + n)
    whole[..., :, inside] = sees
    whole[..., inside, :] = seen
    whole[..., inside, inside] = own
    return whole


def assert_equal(mask: P.BlockMask, want: np.ndarray) -> None:
    """Pair by pair; heads that see the same need not be told apart."""
    dense = mask.to_dense().reshape(-1, *mask.shape)
    found, wanted = np.broadcast_arrays(dense, want.reshape(-1, *mask.shape))
    np.testing.assert_array_equal(found, wanted)
    mask.check()


def cut(shape: Shape, whole: np.ndarray) -> np.ndarray:
    """The queries and keys of a shape, of a mask for all tokens."""
    return whole[..., shape.offset : shape.offset + shape.q_len, : shape.kv_len]


@st.composite
def shapes_of(draw: st.DrawFn, tokens: int) -> Shape:
    """Some of the queries of a row, and all of its keys."""
    first = draw(st.integers(0, tokens - 1))
    return Shape(draw(st.integers(1, tokens - first)), tokens, draw(blocks), first)


@given(
    expressions() | per_head(2),
    *(st.integers(0, 150), st.integers(0, 150), st.integers(0, 150), st.booleans(), st.booleans(), st.data()),
)
def test_law_1_beside_any_pattern(
    pattern: Pattern, tokens: int, before: int, after: int, sees: bool, seen: bool, data: st.DataObject
) -> None:
    assume(before + tokens + after and pattern.known_size is None)
    shape = data.draw(shapes_of(before + tokens + after))
    mask = shape.compile(P.beside(pattern, before, after, sees, seen))
    want = surrounded(alone(pattern, tokens), before, after, sees, seen)
    assert_equal(mask, cut(shape, want))


@given(
    st.sampled_from(SIZED),
    *(st.integers(0, 80), st.integers(0, 80), st.booleans(), st.booleans(), st.data()),
)
def test_law_1_beside_a_pattern_that_knows_its_size(
    pattern: Pattern, before: int, after: int, sees: bool, seen: bool, data: st.DataObject
) -> None:
    size = pattern.known_size
    assert size is not None
    assume(before + size + after)
    shape = data.draw(shapes_of(before + size + after))
    found = P.beside(pattern, before, after, sees, seen)
    assert found.known_size == before + size + after
    want = surrounded(alone(pattern, size), before, after, sees, seen)
    assert_equal(shape.compile(found), cut(shape, want))
    assert_equal(shape.compile(found), shape.truth(found))


@given(st.lists(st.sampled_from(SIZED), min_size=1, max_size=6), st.integers(0, 100), st.data())
def test_law_1_patterns_in_a_row(parts: list[Pattern], rest: int, data: st.DataObject) -> None:
    sizes = [part.known_size or 0 for part in parts]
    row = P.packed(*parts)
    assert row.known_size == sum(sizes)
    assume(sum(sizes) + rest)
    want = np.zeros((2, sum(sizes) + rest, sum(sizes) + rest), bool)
    for part, size, start in zip(parts, sizes, np.cumsum([0, *sizes]), strict=False):
        want[:, start : start + size, start : start + size] = alone(part, size)
    shape = data.draw(shapes_of(sum(sizes) + rest))
    assert_equal(shape.compile(row), cut(shape, want))
    assert_equal(shape.compile(row), shape.truth(row))


@given(expressions(), expressions(), st.integers(0, 70), st.integers(0, 70), st.integers(1, 200), blocks)
def test_law_2_both_are_homomorphisms(
    p: Pattern, r: Pattern, before: int, after: int, tokens: int, block: tuple[int, int]
) -> None:
    assume(p.known_size is None and r.known_size is None)
    length = before + tokens + after

    def put(pattern: Pattern) -> P.BlockMask:
        return P.beside(pattern, before, after).compile(length, block=block)

    def in_a_row(pattern: Pattern) -> P.BlockMask:
        own = P.documents([tokens]) & pattern
        return P.packed(own, own).compile(2 * tokens + 9, block=block)

    inside = P.packed(~P.documents([before]), P.documents([tokens])).compile(length, block=block)
    both = P.packed(P.documents([tokens]), P.documents([tokens])).compile(2 * tokens + 9, block=block)
    assert put(p | r) == put(p) | put(r)
    assert put(p & r) == put(p) & put(r)
    assert put(p - r) & inside == (put(p) - put(r)) & inside
    assert put(~p) & inside == ~put(p) & inside
    assert in_a_row(p | r) == in_a_row(p) | in_a_row(r)
    assert in_a_row(p & r) == in_a_row(p) & in_a_row(r)
    assert in_a_row(p - r) == in_a_row(p) - in_a_row(r)
    assert in_a_row(~p) == ~in_a_row(p) & both


@given(
    expressions(named_leaves) | per_head(2, named_leaves),
    *(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans(), st.lists(st.sampled_from(SIZED), max_size=2)),
)
def test_text_parses_back(
    pattern: Pattern, before: int, after: int, sees: bool, seen: bool, parts: list[Pattern]
) -> None:
    found = P.beside(pattern, before, after, sees, seen)
    assert sf.parse(str(found)) == found
    assert hash(sf.parse(str(~found & P.causal()))) == hash(~found & P.causal())
    row = P.packed(*parts, P.beside(P.axial((2, 2)), before, after))
    assert sf.parse(str(row)) == row


def test_text_may_name_the_pattern() -> None:
    assert sf.parse("beside(pattern=local(3) | star(), after=2)") == P.beside(P.local(3) | P.star(), after=2)
    with pytest.raises(ValueError, match="expected a pattern such as"):
        sf.parse("beside(3)")
    with pytest.raises(ValueError, match="arguments are literals"):
        sf.parse("beside(full(), full())")
    with pytest.raises(ValueError, match="packed takes patterns"):
        sf.parse("packed(pattern=full())")


def test_a_sample_of_a_padded_batch_has_its_own_last_tokens() -> None:
    pattern = P.beside(P.local(3), before=2, after=4)
    assert depends_on_length(pattern)
    assert depends_on_length(P.beside(P.random_blocks(1), before=2))
    assert not depends_on_length(P.beside(P.star(), before=2))
    assert not depends_on_length(P.packed(P.beside(P.documents([30]) & P.random_blocks(1), after=2)))
    lengths = [50, 9, 33]
    table = padded_table(pattern, (16, 16), torch.tensor(lengths), 50)
    table.check()
    q, k, v = torch.randn(3, 3, 2, 50, 4, dtype=torch.float64).unbind(0)
    out = sf.attention(q, k, v, table)
    for sample, length in enumerate(lengths):
        mine = slice(sample, sample + 1), slice(None), slice(length)
        alone = sf.attention(q[mine], k[mine], v[mine], pattern.compile(length, block=16))
        torch.testing.assert_close(out[mine], alone)


def test_one_pattern_for_sequences_of_many_lengths_cannot_count_from_the_end() -> None:
    pattern = P.causal() & P.beside(P.local(3), after=4)
    assert within(pattern, ((0, 9, 0),), 9) == pattern
    with pytest.raises(ValueError, match=r"counts tokens from the end, .* give beside\(pattern, before=n\)"):
        within(pattern, ((0, 9, 0),), 12)


def test_compiling_takes_the_time_of_the_pattern_alone() -> None:
    """Text of an odd length before an image: a few times the image's own time, though every block moves."""
    image = P.neighborhood((128, 128), 12, "morton")
    row = P.packed(*[P.neighborhood((16, 16), 3)] * 200)
    P.causal().compile(256)
    took = []
    for pattern, tokens in ((image, 1 << 14), (P.beside(image, before=77), 77 + (1 << 14)), (row, 51_200 + 99)):
        started = time.perf_counter()
        pattern.compile(tokens)
        took.append(time.perf_counter() - started)
    assert took[1] < 8 * took[0] + 0.5, took
    assert took[2] < 5, took


def test_long_margins_cost_no_more_than_the_grid() -> None:
    mask = P.beside(P.local(100), before=1 << 24, after=1 << 23).compile((1 << 25), block=256)
    assert mask.nbytes < 100_000_000
    assert len(mask.tiles) <= 4


IMAGE = P.neighborhood((8, 8), 1)
beside: Any = P.beside  # as called by those who do not check types
packed: Any = P.packed
BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: beside(P.local), TypeError, "beside takes a pattern, got .*: local is not called: write local(window)"),
    (lambda: beside("local(3)"), TypeError, "write parse('local(3)')"),
    (lambda: beside(3), TypeError, "beside takes a pattern, got 3"),
    (lambda: beside(IMAGE, -1), ValueError, "beside: before must be at least 0, got before=-1"),
    (lambda: beside(IMAGE, after=2.0), TypeError, "beside: after must be an int, got 2.0"),
    (lambda: beside(IMAGE, sees=1), TypeError, "beside: sees must be True or False, got 1"),
    (lambda: beside(P.documents([1 << 40]), 1), ValueError, "1,099,511,627,777 tokens together"),
    (
        lambda: beside(IMAGE, 5, 2).compile(80),
        ValueError,
        "beside(neighborhood((8, 8), 1), before=5, after=2) is for 5 + 64 + 2 = 71 tokens; the sequence has 80, 9 "
        "over. If they stand after the others, give after=11; if they are padding, write packed(beside(",
    ),
    (lambda: beside(IMAGE, 5, 2).compile(70), ValueError, "5 + 64 + 2 tokens; the sequence has 70, 1 too few"),
    (lambda: beside(P.local(3), 5, 2).compile(6), ValueError, "5 + n + 2 tokens; the sequence has 6, 1 too few"),
    (lambda: beside(P.local(3), after=2).allows(np.array(3), np.array(4)), ValueError, "the last 2 depends on how"),
    (lambda: packed(), ValueError, "packed needs at least one pattern"),
    (lambda: packed(IMAGE, P.causal), TypeError, "packed takes patterns; operand 1 is .*: causal is not called"),
    (
        lambda: packed(IMAGE, P.causal() | P.local(3)),
        ValueError,
        "operand 1, causal() | local(3), does not say, or not in one way, for how many tokens it is; for n tokens "
        "write documents([n]) & (causal() | local(3))",
    ),
    (lambda: packed(IMAGE & P.axial((9, 9))), ValueError, "for n tokens write documents([n]) & (neighborhood"),
    (lambda: packed(P.documents([1 << 40]), P.documents([1])), ValueError, r"1,099,511,627,777 tokens together"),
    (
        lambda: IMAGE.compile(69),
        ValueError,
        "a grid of 8 x 8 has 64 tokens; the sequence has 69, 5 over. For text or other tokens that see all and are "
        "seen by all, write beside(pattern, before=n) or beside(pattern, after=n); for further images, or padding that "
        "sees nothing, packed(pattern, ...) in place of documents(lengths) & pattern",
    ),
    (lambda: (P.documents([64, 64]) & IMAGE).compile(128), ValueError, "64 over. .*packed(pattern, ...) in place of"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[message[:60] for _, _, message in BAD])
def test_refusals_say_what_to_write(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message).replace(r"\.\*", ".*")):
        call()


def test_a_row_that_is_cut_keeps_its_beginning() -> None:
    """As when tokens are generated one by one: positions count from the front."""
    whole = packed(beside(P.axial((4, 4)), before=3), P.documents([9])).compile(28, block=16).to_dense()
    for length in (1, 3, 12, 19, 22):
        shorter = packed(beside(P.axial((4, 4)), before=3), P.documents([9])).compile(length, block=16)
        np.testing.assert_array_equal(shorter.to_dense(), whole[:length, :length])


def test_images_in_a_row_have_the_positions_that_they_have_alone() -> None:
    torch.manual_seed(0)
    shapes = [(4, 6), (8, 8)]
    patterns = [P.neighborhood(shape, 1) for shape in shapes]
    text, sizes = 5, [24, 64]
    rotary = PackedRotary(((None, text), *((Rotary2d(shape), n) for shape, n in zip(shapes, sizes, strict=True))))
    row = P.beside(P.packed(*patterns), before=text, sees=False, seen=False)
    layer = sf.SparseAttention(16, 2, row, block=16, rotary=rotary).double()
    x = torch.randn(1, text + sum(sizes), 16, dtype=torch.float64)
    out = layer(x)
    first = text
    for shape, pattern, size in zip(shapes, patterns, sizes, strict=True):
        alone = sf.SparseAttention(16, 2, pattern, block=16, rotary=Rotary2d(shape)).double()
        alone.load_state_dict(layer.state_dict())
        torch.testing.assert_close(out[:, first : first + size], alone(x[:, first : first + size]))
        first += size
    still = sf.SparseAttention(16, 2, "full()", block=16).double()
    still.load_state_dict(layer.state_dict())
    torch.testing.assert_close(out[:, :text], still(x[:, :text]))


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: PackedRotary(((3, 4),)), TypeError, "pairs (positions or None, tokens), got (3, 4)"),  # type: ignore[arg-type]
        (lambda: PackedRotary(((None, -1),)), ValueError, "an int of at least 0 tokens, got (None, -1)"),
        (lambda: PackedRotary(((None, 4),)).table(3, 8), ValueError, "have 4 tokens together, the row has 3"),
        (lambda: PackedRotary(((Rotary2d((2, 2)), 5),)).table(5, 8), ValueError, "2 x 2 pixels has 4 tokens, got 5"),
        (lambda: PackedRotary(((Rotary2d((2, 2)), 4),)).check_head_dim(6), ValueError, "a multiple of 4, got 6"),
        (lambda: PackedRotary(((None, 4),)).check_head_dim(7), ValueError, "an even head dim, got 7"),
    ],
)
def test_positions_that_cannot_be(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()
