"""Patterns of padded and packed rows: each sequence gets what it would get alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.integrations.transformers.sequences import Holes, Piece, Restarted, SameSequence, restarted, within
from sparseflash.patterns import Pattern
from tests.strategies import BLOCKS, expressions, leaves, per_head


@st.composite
def rows(draw: st.DrawFn) -> tuple[tuple[Piece, ...], int]:
    """Pieces of a row, and its tokens: sequences with holes, padding between and around them, origins before them."""
    at, pieces = 0, []
    for _ in range(draw(st.integers(0, 4))):
        at += draw(st.integers(0, 40))
        origin = at - draw(st.sampled_from([0, 0, 1, 50]))
        for _ in range(draw(st.integers(1, 3))):
            stop = at + draw(st.integers(1, 150))
            pieces.append((at, stop, origin))
            at = stop + draw(st.integers(1, 30))
        at -= 1  # sequences, unlike pieces of one, may touch
    return tuple(pieces), max(at, 1) + draw(st.integers(0, 40))


def sequence_of(pieces: tuple[Piece, ...], tokens: int) -> np.ndarray:
    """The origin of the sequence that each token belongs to or comes after; of the first one before all of them."""
    origin = np.full(tokens, pieces[0][2] if pieces else 0)
    for start, _, first in pieces:
        origin[start:] = first
    return origin


def truth(pattern: Pattern, pieces: tuple[Piece, ...], tokens: int, heads: int) -> np.ndarray:
    """Pair by pair, piece by piece: bool [heads, queries, tokens]; queries before an origin see nothing here."""
    allowed = np.zeros((heads, tokens, tokens), bool)
    origins = sequence_of(pieces, tokens)
    for k0, k1, origin in pieces:
        (rows,) = np.nonzero((origins == origin) & (np.arange(tokens) >= origin))
        allowed[:, rows, k0:k1] = pattern.allows(rows[:, None] - origin, np.arange(k0, k1)[None] - origin)
    return allowed


@given(expressions() | per_head(3), rows(), st.sampled_from(BLOCKS), st.sampled_from(BLOCKS), st.data())
def test_each_sequence_gets_what_it_gets_alone(
    pattern: Pattern, row: tuple[tuple[Piece, ...], int], bq: int, bk: int, data: st.DataObject
) -> None:
    pieces, tokens = row
    pattern = pattern.at(P.Grid(tokens, tokens, bq, bk, 0))
    first = data.draw(st.integers(0, tokens - 1), label="first query")
    mask = within(pattern, pieces, tokens).compile((tokens - first, tokens), (bq, bk), first)
    heads = mask.pattern_of.shape[1]
    found = mask.to_dense().reshape(-1, tokens - first, tokens)
    want = truth(pattern, pieces, tokens, heads)[:, first:]
    counted = np.arange(first, tokens) >= sequence_of(pieces, tokens)[first:]
    assert np.array_equal(found[:, counted], want[:, counted])
    live = np.zeros(tokens, bool)
    for start, stop, _ in pieces:
        live[start:stop] = True
    assert not found[:, :, ~live].any(), "padding is seen by nobody"


def test_padding_in_front_sees_the_first_sequence_and_padding_behind_the_last() -> None:
    pieces, tokens = ((3, 9, 3), (9, 12, 9)), 16
    dense = within(P.full(), pieces, tokens).compile(tokens, block=16).to_dense().reshape(tokens, tokens)
    for rows, (start, stop) in ((slice(0, 9), (3, 9)), (slice(9, 16), (9, 12))):
        want = np.zeros(tokens, bool)
        want[start:stop] = True
        assert (dense[rows] == want).all()
    assert not within(P.causal(), pieces, tokens).compile(tokens, block=16).to_dense().reshape(tokens, -1)[:3].any()
    counted = within(P.fixed(4, 1), pieces, tokens).compile(tokens, block=16).to_dense().reshape(tokens, -1)
    assert not counted[:3].any(), "what counts positions has none before the first token"
    assert np.array_equal(counted[12:, 9:12], P.fixed(4, 1).allows(np.arange(3, 7)[:, None], np.arange(3)[None]))


def test_a_restarted_leaf_is_evaluated_once_for_each_kind_of_block() -> None:
    calls = {"pairs": 0}  # a dict, for a number that it captured would be state of the predicate

    def striped(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        calls["pairs"] += np.broadcast(q, k).size
        return (k % 64 < 8) & (q >= 0)

    tokens, block = 1 << 14, 64
    sequences = tuple((i * 1024, (i + 1) * 1024, i * 1024) for i in range(16))
    leaf = P.from_blocks(np.tri(16, dtype=bool), unit=64)
    mask = within(leaf, sequences, tokens).compile(tokens, block=block)
    assert mask.nnz == 16 * 136
    assert not len(mask.tiles)

    alone = P.where(striped)
    pattern = restarted(alone, sequences)
    assert isinstance(pattern, Restarted)
    (pattern & SameSequence(tuple((a, b) for a, b, _ in sequences))).compile(tokens, block=block)
    assert calls["pairs"] < 1024 * 1024 + 70 * 64 * 64, "one scan of the longest sequence, then one block a kind"


def test_a_shift_changes_nothing_for_patterns_of_the_distance() -> None:
    pattern = P.causal() & (P.local(8) | P.dilated(3, 5) | P.log_sparse())
    assert restarted(pattern, ((3, 9, 3),)) == pattern
    assert restarted(P.per_head(P.local(3), P.global_tokens(1)), ((3, 9, 3),)) == P.per_head(
        P.local(3), Restarted(P.global_tokens(1), ((3, 9, 3),))
    )


def test_a_row_of_one_sequence_is_the_pattern_itself() -> None:
    assert within(P.streaming(1, 5), ((0, 70, 0),), 70) == P.streaming(1, 5)


@given(leaves)
def test_padding_alone_sees_nothing(pattern: Pattern) -> None:
    assert within(pattern, (), 40).compile(40, block=16).nnz == 0


def test_holes_cost_no_evaluation_elsewhere() -> None:
    holes = Holes(((5, 9), (300, 301)))
    mask = holes.compile(512, block=64)
    inside = np.zeros(512, bool)
    inside[5:9] = inside[300] = True
    assert np.array_equal(mask.to_dense(), np.broadcast_to(inside, (512, 512)))
    grid = P.Grid(512, 512, 64, 64, 0)
    rows, cols = np.divmod(np.arange(64), 8)
    assert len(np.unique(holes.keys(grid, rows, cols))) == 3
