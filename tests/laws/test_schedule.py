"""Lines are dealt whole or split; every entry is walked once; nobody waits for one long line."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.tables.lookup import lookup
from sparseflash.tables.splitting import (
    HEAVY,
    SHARES,
    SHORTEST_SPLIT,
    assign,
    balance,
    makespan,
    split_counts,
    split_sizes,
    weights,
)


@st.composite
def ranges(draw: st.DrawFn) -> np.ndarray:
    """Spans of a few patterns, with some lines far heavier than the rest."""
    patterns, lines = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    counts = rng.integers(0, draw(st.integers(1, 30)), size=(patterns, lines, 2))
    heavy = rng.random((patterns, lines)) < draw(st.sampled_from([0, 0.1, 0.5]))
    counts[heavy] *= draw(st.integers(1, 60))
    stops = np.cumsum(counts.reshape(-1, 2), axis=0).reshape(counts.shape)
    return np.stack([stops[..., 0] - counts[..., 0], stops[..., 0], stops[..., 1] - counts[..., 1], stops[..., 1]], -1)


@given(ranges())
def test_every_entry_is_walked_once(table: np.ndarray) -> None:
    work, reductions = assign(table)
    for p, lines in enumerate(table):
        items = work[p][work[p, :, 0] >= 0]
        assert (np.bincount(items[:, 0], minlength=len(lines)) >= 1).all(), "a line is nobody's"
        for line, (a, b, c, d) in enumerate(lines.tolist()):
            mine = items[items[:, 0] == line]
            mine = mine[np.argsort(mine[:, 5])]
            assert [x for i in mine for x in range(i[1], i[2])] == list(range(a, b))
            assert [x for i in mine for x in range(i[3], i[4])] == list(range(c, d))
            merged = reductions[p][reductions[p, :, 0] == line]
            assert len(merged) == (len(mine) > 1)
            expected = [-1] if len(mine) == 1 else list(range(merged[0, 1], merged[0, 2]))
            assert mine[:, 5].tolist() == expected
        slots = items[items[:, 5] >= 0, 5]
        assert sorted(slots.tolist()) == list(range(slots.size)), "slots are not 0, 1, 2, ..."


@given(ranges())
def test_splits_are_even_and_heavy_ones_come_first(table: np.ndarray) -> None:
    work, _ = assign(table)
    for p, lines in enumerate(table):
        items = work[p][work[p, :, 0] >= 0]
        size = weights(items[:, 1:5])
        assert (size[1:] <= size[:-1]).all()
        limit = max(SHORTEST_SPLIT, int(np.ceil(HEAVY * weights(lines).mean())))
        assert size.max() <= limit
        splits = size[items[:, 5] >= 0]
        assert (2 * splits >= limit - 1).all(), "a line was split finer than it had to be"


def test_global_tokens_no_longer_set_the_time() -> None:
    """64 global tokens at 65,536: the longest row holds 512 blocks, the mean one 12. 132 programs run at once."""
    mask = (P.local(512) | P.global_tokens(64)).compile(65536)
    table = lookup(mask)
    for side in (table.rows, table.columns):
        lines = side.ranges.numpy().astype(np.int64)
        whole = np.sort(weights(lines[0]))[::-1].tolist()
        work, _ = assign(lines)
        splits = weights(work[0, :, 1:5]).tolist()
        ideal = sum(whole) / 132
        assert makespan(whole, 132) == 512
        assert makespan(splits, 132) < 1.5 * ideal


def test_a_long_line_is_cut_no_finer_than_helps() -> None:
    """At 4M tokens the row of the global tokens holds 32,768 blocks: thousands of splits would take long to merge."""
    mask = (P.local(512) | P.global_tokens(64)).compile(1 << 22)
    table = lookup(mask)
    for side in (table.rows, table.columns):
        assert 132 < side.slots <= SHARES
        splits = weights(side.work_items[0, :, 1:5].numpy().astype(np.int64)).tolist()
        assert makespan(splits, 132) < 1.05 * sum(splits) / 132


@given(ranges())
def test_balance_agrees_with_the_deal(table: np.ndarray) -> None:
    work, reductions = assign(table)
    found = balance(weights(table[0]), workers=3)
    splits = weights(work[0, work[0, :, 0] >= 0, 1:5])
    if (reductions[0, :, 0] < 0).all():
        assert found is None
        return
    assert found is not None
    assert split_sizes(weights(table[0])).tolist() == splits.tolist()
    assert (found.longest_piece, found.busiest) == (splits.max(), makespan(splits, 3))
    counts = reductions[0, :, 2] - reductions[0, :, 1]
    assert found.pieces == counts[reductions[0, :, 0] == weights(table[0]).argmax()]


def test_where_lines_are_cut() -> None:
    def heaviest(weight: int, others: int, lines: int) -> int:
        return int(split_counts(np.array([others] * (lines - 1) + [weight]))[-1])

    assert [heaviest(n, 0, 100) for n in (16, 17, 32, 33)] == [1, 2, 2, 3]  # into 16 blocks at least
    assert [heaviest(n, 100, 100) for n in (203, 204)] == [1, 2]  # past twice the mean: 202.06 and 202.08, rounded up
    assert [heaviest(n, 0, 8192) for n in (40960, 40961)] == [2048, 1951]  # no split is less than a 2048th of all
    plain = balance(np.array([512, *[12] * 511]))
    assert plain is not None
    assert plain.workers == 132


def test_dense_and_causal_tables_are_not_cut() -> None:
    for pattern in (P.full(), P.causal(), P.local(300)):
        ranges = lookup(pattern.compile(1 << 15)).rows.ranges.numpy().astype(np.int64)
        work, reductions = assign(ranges)
        assert reductions.size == 0
        assert work.shape[1] == ranges.shape[1]


def test_the_busiest_worker_is_found_by_hand() -> None:
    assert makespan([8, 1, 1, 1, 1], 2) == 8
    assert makespan([4, 4, 1, 1, 1, 1], 2) == 6
