"""Every named pattern against its definition, written pair by pair in plain Python from the source it names."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from tests.test_grids import DEFINITIONS as GRIDS

N = 60
POWERS = {0} | {1 << b for b in range(20)}


def raster(position: int) -> tuple[int, int]:
    return divmod(position, 10)


def morton(position: int) -> tuple[int, int]:
    """Pixel (y, x): x in the even bits, y in the odd ones."""
    return (
        sum((position >> (2 * b + 1) & 1) << b for b in range(4)),
        sum((position >> (2 * b) & 1) << b for b in range(4)),
    )


def document(position: int) -> int:
    return sum(position >= edge for edge in (7, 8, 30))


def in_the_row(q: int, k: int) -> bool:
    """A window over 40 tokens, documents of 3 and 8 behind it, and 9 tokens of padding."""
    part = [position // 40 + (position >= 43) + (position >= 51) for position in (q, k)]
    return part[0] == part[1] != 3 and (part[0] > 0 or abs(q - k) <= 6)


DEFINITIONS: list[tuple[Pattern, Callable[[int, int], bool]]] = [
    (P.full(), lambda q, k: True),
    (P.causal(), lambda q, k: k <= q),
    (P.local(6), lambda q, k: abs(q - k) <= 6),
    (P.dilated(3, 4), lambda q, k: abs(q - k) in (0, 4, 8, 12)),
    (P.strided(5), lambda q, k: (q - k) % 5 == 0),
    (P.strided(3, unit=4), lambda q, k: (q // 4 - k // 4) % 3 == 0),
    (P.fixed(4, 1, unit=3), lambda q, k: q // 12 == k // 12 or k // 3 % 4 == 3),
    (P.butterfly(unit=4), lambda q, k: (q // 4) ^ (k // 4) in POWERS),
    (P.butterfly(unit=2, max_stride=8), lambda q, k: (q // 2) ^ (k // 2) in (0, 1, 2, 4, 8)),
    (P.global_tokens(3), lambda q, k: min(q, k) < 3),
    (P.global_tokens((5, 40)), lambda q, k: q in (5, 40) or k in (5, 40)),
    (P.documents([7, 1, 22, 30]), lambda q, k: document(q) == document(k)),
    (P.documents([7, 0, 1, 22, 30, 0], causal=True), lambda q, k: document(q) == document(k) and k <= q),
    (P.prefix(9), lambda q, k: k <= q or k < 9),
    (P.log_sparse(), lambda q, k: abs(q - k) in POWERS),
    (P.star(), lambda q, k: abs(q - k) <= 1 or q == 0 or k == 0),
    (P.star_transformer(), lambda q, k: abs(q - k) <= 1 or q == 0 or k == 0),
    (P.streaming(2, 5), lambda q, k: k <= q and (k < 2 or q - k < 5)),
    (P.longformer(2), lambda q, k: abs(q - k) <= 1 or min(q, k) < 1),
    (P.longformer(8, 2), lambda q, k: abs(q - k) <= 4 or q < 2 or k < 2),
    (P.sparse_transformer_strided(6), lambda q, k: k <= q and (q - k <= 6 or (q - k) % 6 == 0)),
    (P.sparse_transformer_fixed(6, 2), lambda q, k: k <= q and (q // 6 == k // 6 or k % 6 >= 4)),
    (P.axial((6, 10)), lambda q, k: raster(q)[0] == raster(k)[0] or raster(q)[1] == raster(k)[1]),
    (
        P.neighborhood((6, 10), (1, 2)),
        lambda q, k: abs(raster(q)[0] - raster(k)[0]) <= 1 and abs(raster(q)[1] - raster(k)[1]) <= 2,
    ),
    (
        P.neighborhood((8, 8), 1, "morton"),
        lambda q, k: max(abs(a - b) for a, b in zip(morton(q), morton(k), strict=True)) <= 1,
    ),
    (P.beside(P.strided(7), 5, 10), lambda q, k: not (5 <= q < 50 and 5 <= k < 50) or (q - k) % 7 == 0),
    (P.packed(P.documents([40]) & P.local(6), P.documents([3, 8])), lambda q, k: in_the_row(q, k)),
    (P.where(lambda q, k: (q * k) % 3 == 1), lambda q, k: q * k % 3 == 1),
    (P.from_blocks(np.eye(60)[::-1], unit=1), lambda q, k: q + k == 59),
    (P.from_blocks(np.eye(9)[::-1], unit=7), lambda q, k: q // 7 + k // 7 == 8),
    (P.bigbird(unit=5, window=3, global_cells=1, random=0), lambda q, k: abs(q // 5 - k // 5) <= 1 or min(q, k) < 5),
]


@pytest.mark.parametrize(("pattern", "definition"), DEFINITIONS, ids=[str(p) for p, _ in DEFINITIONS])
def test_definition(pattern: Pattern, definition: Callable[[int, int], bool]) -> None:
    expected = [[definition(q, k) for k in range(N)] for q in range(N)]
    np.testing.assert_array_equal(pattern.compile(N, block=16).to_dense(), expected)


# Cells, windows and images that are smaller and larger than blocks, aligned with them and not.
WIDE: list[Pattern] = [
    *(P.full(), P.causal(), P.local(0), P.local(20), P.local(70), P.prefix(9), P.prefix(40), P.log_sparse(), P.star()),
    *(P.dilated(3, 4), P.dilated(2, 40), P.dilated(5, 17), P.dilated(0, 3), P.streaming(2, 5), P.streaming(20, 40)),
    *(P.strided(5), P.strided(40), P.strided(3, unit=16), P.strided(2, unit=40), P.strided(4, unit=5)),
    *(P.fixed(4, 1, unit=3), P.fixed(2, 1, unit=16), P.fixed(3, 2, unit=20), P.fixed(50, 7), P.fixed(8, 0, unit=4)),
    *(P.global_tokens(3), P.global_tokens(40), P.global_tokens((5, 40, 100)), P.bigbird(unit=8, window=3, random=2)),
    *(P.random_blocks(2, unit=8), P.random_blocks(1, unit=32), P.random_blocks(2, unit=5)),
    *(P.axial((16, 12)), P.axial((12, 16), "morton"), P.axial((16, 16), "hilbert")),
    *(P.neighborhood((12, 16), 2), P.neighborhood((16, 12), (3, 1), "morton"), P.neighborhood((16, 16), 2, "hilbert")),
    *(P.neighborhood((8, 24), (1, 2), "tile"), P.neighborhood((3, 64), 5, "morton"), P.neighborhood((64, 3), (0, 2))),
    *(
        P.beside(P.causal() & P.strided(3), 7),
        P.beside(P.local(20), 40, sees=False),
        P.beside(P.star(), 16, seen=False),
    ),
    *(
        P.packed(P.axial((7, 9)), P.neighborhood((8, 8), 2, "hilbert")),
        P.packed(P.documents([33, 70]), P.axial((4, 4))),
    ),
    *(P.where(lambda q, k: (q * k) % 7 == 1), P.causal() & P.strided(3, unit=16) | P.local(5), ~P.local(30)),
    *(
        P.from_blocks(np.eye(192)[::-1], unit=1),
        P.from_blocks(np.eye(30)[::-1], unit=7),
        P.from_blocks(np.eye(14), unit=16),
    ),
]
BLOCKS: list[int | tuple[int, int]] = [16, 32, (16, 32), (32, 16)]
PLACES = [(100, 100, 0), (70, 160, 0), (70, 160, 37), (50, 160, 110), (64, 128, 64), (33, 97, 64), (130, 40, 0)]


@pytest.mark.parametrize("pattern", WIDE, ids=str)
def test_compiling_gives_the_truth_wherever_queries_begin(pattern: Pattern) -> None:
    for (q_len, kv_len, q_offset), block in itertools.product(PLACES, BLOCKS):
        mask = pattern.compile((q_len, kv_len), block=block, q_offset=q_offset)
        q, k = np.arange(q_len)[:, None] + q_offset, np.arange(kv_len)
        expected = np.broadcast_to(np.asarray(pattern.at(mask.grid).allows(q, k), bool), (q_len, kv_len))
        np.testing.assert_array_equal(mask.to_dense(), expected)
        mask.check()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("unit", [1, 2, 3, 5, 8, 16, 48])
def test_butterflies_wherever_blocks_and_cells_begin(unit: int, block: int | tuple[int, int]) -> None:
    """Cells smaller and larger than blocks, aligned and not; as much of an even stretch of them as of an odd one."""
    for q_offset, max_stride in itertools.product([0, 5, 16, 37, 100], [None, 4]):
        mask = P.butterfly(unit=unit, max_stride=max_stride).compile((70, 260), block=block, q_offset=q_offset)
        q, k = np.arange(70)[:, None] + q_offset, np.arange(260)
        strides = [x for x in POWERS if max_stride is None or x <= max_stride]
        np.testing.assert_array_equal(mask.to_dense(), np.isin((q // unit) ^ (k // unit), strides))


def test_a_last_block_of_one_query_keeps_its_cell() -> None:
    np.testing.assert_array_equal(P.from_blocks(np.eye(49), unit=1).compile(49, block=16).to_dense(), np.eye(49))


def test_the_first_pixel_alone_sees_its_neighbours() -> None:
    mask = P.neighborhood((4, 4), 1).compile((1, 16), block=16, q_offset=0)
    assert np.flatnonzero(mask.to_dense()).tolist() == [0, 1, 4, 5]


def test_axial_reaches_the_last_row_and_column() -> None:
    for shape in ((3, 16), (5, 32), (2, 17)):
        n = shape[0] * shape[1]
        (y, x) = np.divmod(np.arange(n), shape[1])
        expected = (y[:, None] == y) | (x[:, None] == x)
        np.testing.assert_array_equal(P.axial(shape).compile(n, block=16).to_dense(), expected)


def test_random_blocks_draws_distinct_cells_evenly() -> None:
    cells = P.random_blocks(5, unit=1, seed=3).compile(400, block=16).to_dense()
    assert (cells.sum(axis=1) == 5).all()
    # 400 rows of 5 in 400: a column is drawn 5 times on average; 20 or more has a chance of about 1e-4 in all.
    assert cells.sum(axis=0).max() < 20
    assert (cells != P.random_blocks(5, unit=1, seed=4).compile(400, block=16).to_dense()).any()
    again = P.random_blocks(5, unit=1, seed=3, count=400)
    assert (cells == again.allows(np.arange(400)[:, None], np.arange(400))).all()
    assert P.random_blocks(9, unit=1).compile(4, block=16).to_dense().all()
    with pytest.raises(ValueError, match="give count, or compile it"):
        P.random_blocks(5).allows(np.array(0), np.array(0))


Definition = Callable[[int, int, int, int], bool]  # queries and keys of a document, a query and a key of it
SEES: list[tuple[bool, Definition]] = [(False, lambda m, n, a, b: True), (True, lambda m, n, a, b: b - a <= n - m)]


@pytest.mark.parametrize(("causal", "sees"), SEES, ids=["all keys", "bottom-right causal"])
@pytest.mark.parametrize("block", BLOCKS)
def test_documents_whose_keys_are_another_sequence(
    causal: bool, sees: Definition, block: int | tuple[int, int]
) -> None:
    queries, keys = [0, 40, 3, 0, 1, 25, 0], [50, 2, 0, 7, 33, 25, 4]
    expected = np.zeros((sum(queries), sum(keys)), bool)
    for d, (m, n) in enumerate(zip(queries, keys, strict=True)):
        for a, b in itertools.product(range(m), range(n)):
            expected[sum(queries[:d]) + a, sum(keys[:d]) + b] = sees(m, n, a, b)
    pattern = P.documents(queries, kv_lengths=keys, causal=causal)
    np.testing.assert_array_equal(pattern.compile(expected.shape, block=block).to_dense(), expected)
    cumulative = {"cu_seqlens": [0, *itertools.accumulate(queries)], "cu_seqlens_k": [0, *itertools.accumulate(keys)]}
    assert P.documents(**cumulative, causal=causal) == pattern


@given(st.lists(st.tuples(st.integers(-5, 1 << 40), st.integers(1, 40)), min_size=1, max_size=9), st.booleans())
def test_documents_of_ids(parts: list[tuple[int, int]], causal: bool) -> None:
    ids = np.repeat([name for name, _ in parts], [length for _, length in parts])
    expected = ids[:, None] == ids
    if causal:
        expected &= np.tri(ids.size, dtype=bool)
    where = P.where(lambda q, k: (ids[q] == ids[k]) & ((k <= q) | (not causal))).compile(ids.size, block=16)
    np.testing.assert_array_equal(where.to_dense(), expected)
    together = np.unique(ids).size == 1 + np.count_nonzero(np.diff(ids))
    if not together:
        with pytest.raises(ValueError, match=r"id -?\d+ comes again at token \d+; for ids in any order use"):
            P.documents(ids=ids, causal=causal)
        return
    for given_as in (ids, ids.tolist(), torch.from_numpy(ids)):
        pattern = P.documents(ids=given_as, causal=causal)
        assert pattern.compile(ids.size, block=16) == where
    assert sf.parse(f"documents(ids={ids.tolist()}, causal={causal})") == pattern
    both = P.documents(ids=np.stack([ids, np.arange(ids.size)]), causal=causal)
    assert both == (P.per_sample(pattern, P.documents([1] * ids.size, causal=causal)))


def test_a_token_of_a_decoder_sees_its_document_so_far() -> None:
    """Queries that are the last tokens of the keys: positions go on, whatever was asked before."""
    pattern, whole = P.documents([5, 0, 6], causal=True), P.documents([5, 6]) & P.causal()
    assert pattern.compile(11, block=16) == whole.compile(11, block=16)
    for length in range(1, 12):
        token = pattern.compile((1, length), block=16).to_dense()
        np.testing.assert_array_equal(token[0], whole.compile(11, block=16).to_dense()[length - 1, :length])


def test_a_place_of_the_queries_that_is_given_is_no_guess() -> None:
    whole = P.documents([5, 6]).compile(11, block=16).to_dense()
    first_keys = P.documents([5, 6]).compile((11, 7), block=16, q_offset=0)
    np.testing.assert_array_equal(first_keys.to_dense(), whole[:, :7])
    earlier = P.documents([5, 6]).compile((11, 11), block=16, q_offset=-2)  # two queries stand before all documents
    assert not earlier.to_dense()[:2].any()
    np.testing.assert_array_equal(earlier.to_dense()[2:], whole[:9])


def test_keys_that_no_query_asks_for_cost_no_more_than_the_grid() -> None:
    lengths, kv_lengths = [1, 0] * 500, [1, 40_000] * 500
    mask = P.documents(lengths, kv_lengths=kv_lengths).compile((500, sum(kv_lengths)), block=128)
    assert mask.tokens == 500
    assert mask.nbytes < 2_000_000


def test_every_named_pattern_is_defined_here() -> None:
    tested = {str(p).split("(")[0] for p, _ in DEFINITIONS} | {"longformer", "sparse_transformer_strided"}
    tested |= {str(p).split("(")[0] for p, _, _ in GRIDS}
    tested |= {"sparse_transformer_fixed", "star_transformer", "random_blocks", "per_head", "per_sample"}
    constructors = {n for n in P.__all__ if n.islower()} - {"check", "parse", "register"}
    assert constructors <= tested


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: P.dilated(2, 0), "dilated: dilation must be at least 1"),
    (lambda: P.axial((1 << 20, 257)), "more than 2\\*\\*28 places"),
    (lambda: P.axial((257, 1 << 20)), "more than 2\\*\\*28 places"),
    (lambda: P.documents([3, -1]), "documents: length must be at least 0, got length=-1"),
    (lambda: P.documents([3], [-1]), "documents: kv_length must be at least 0, got kv_length=-1"),
    (lambda: P.documents([3, 4], [5]), "2 lengths need as many kv_lengths, got 1"),
    (lambda: P.documents([0, 0]).compile(1), "2 lengths add up to 0 tokens; the sequence has 1"),
    (lambda: P.documents(cu_seqlens=[0, 2], cu_seqlens_k=[1, 2]), "cu_seqlens_k must start at 0"),
    (
        lambda: P.documents([30, 40]).compile((70, 3)),
        r"for 70 queries and 3 keys.*documents\(lengths, kv_lengths=...\)",
    ),
    (lambda: P.documents([30, 40]).compile((4, 3)), "add up to 70 tokens; this mask is for 4 queries and 3 keys"),
    (lambda: P.documents([3, 4], [2, 2]).compile(4), "7 queries and kv_lengths to 4 keys; this mask is for 4 x 4"),
    (lambda: P.documents([3, 4], [2, 2]).compile((7, 5)), "add up to 7 queries and kv_lengths to 4 keys"),
    (lambda: P.documents([3, 4], [2, 2]).compile((7, 3)), "this mask is for 7 x 3 tokens"),
    (lambda: P.documents([3, 4], [2, 2]).compile((8, 4)), "this mask is for 8 x 4 tokens"),
    (lambda: P.documents([3, 4], [2, 2]).compile((7, 4), q_offset=0), "first query at 0"),
    (lambda: P.documents([3, 4], [2, 2]).compile((3, 4)), "this mask is for 3 x 4 tokens"),  # not the last queries
    (lambda: P.documents([]), "at least one length"),
    (lambda: P.documents(cu_seqlens=[1, 2]), "cu_seqlens must start at 0"),
    (lambda: P.documents([3, 4]).compile(8), "2 lengths add up to 7 tokens; the sequence has 8"),
    (lambda: P.fixed(4, 5), "summary must be at most stride = 4, got summary=5"),
    (lambda: P.prefix(-1), "prefix: n must be at least 0"),
    (lambda: P.streaming(1, 0), "streaming: window must be at least 1"),
    (lambda: P.bigbird(window=2), "window must be odd"),
    (
        lambda: P.axial((3, 4)).compile(13),
        "3 x 4 has 12 tokens; the sequence has 13, 1 over\\. .*write beside",
    ),
    (lambda: P.axial((3, 4)).compile((5, 13)), "the sequence has 13"),
    (lambda: P.axial((3, 4)).compile((13, 5), q_offset=0), "the sequence has 13"),
    (lambda: P.from_blocks(np.eye(2), unit=16).allows(np.array([32]), np.array([0])), "from_blocks"),
    (lambda: P.from_blocks(np.eye(2), unit=16).allows(np.array([0]), np.array([32])), "from_blocks"),
    (lambda: P.neighborhood((4, 4), -1), "radius must be at least 0"),
    (lambda: P.neighborhood((4, 4), 1, "zigzag"), "order must be one of"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_arguments(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_heads_that_share_a_pattern_are_counted_each() -> None:
    mask = P.per_head(P.causal(), P.local(9), P.local(9)).compile(50, block=16)
    assert mask.patterns == 2
    assert mask.tokens == mask.to_dense().sum() == P.causal().compile(50).tokens + 2 * P.local(9).compile(50).tokens
