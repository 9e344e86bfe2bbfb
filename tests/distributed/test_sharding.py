"""Who holds which tokens, and who needs which of whom; no processes needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.distributed import Sharding, plan
from sparseflash.distributed.plan import Layout, LocalLayout, local_mask
from sparseflash.distributed.sharding import Partition
from sparseflash.patterns import BlockMask
from sparseflash.patterns.grid import Ints
from sparseflash.patterns.intervals import positions
from tests.strategies import expressions, is_placed, leaves, per_head

DEALS = st.sampled_from(["weight", "zigzag", "contiguous"])


@given(st.integers(1, 3000), st.integers(1, 9), DEALS, st.sampled_from([16, 64]))
def test_shards_cover_the_sequence_once(length: int, ranks: int, partition: Partition, block: int) -> None:
    ranks = min(ranks, -(-length // block))
    sharding = Sharding.of(P.causal().compile(length, block=block), ranks, partition)
    every = [sharding.positions(rank) for rank in range(ranks)]
    assert tuple(map(len, every)) == sharding.lengths
    assert min(sharding.lengths) > 0
    assert torch.equal(torch.cat(every).sort().values, torch.arange(length))
    assert all((x.diff() > 0).all() for x in every)
    x = torch.randn(2, length, 3, dtype=torch.float64, requires_grad=True)
    shards = [sharding.shard(x, rank, 1) for rank in range(ranks)]
    assert torch.equal(sharding.unshard(shards, 1), x)
    (gradient,) = torch.autograd.grad(sharding.unshard(shards, 1).sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


@given(
    expressions(leaves) | per_head(3, leaves),
    st.tuples(st.integers(100, 700), st.integers(100, 700)),
    st.booleans(),
    st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32])),
    st.none() | st.integers(-50, 50),
    st.integers(1, 4),
    DEALS,
    st.sampled_from(["packed", "aligned", "global"]),
)
def test_the_parts_of_all_ranks_are_the_mask(
    pattern: P.Pattern,
    lengths: tuple[int, int],
    square: bool,
    block: tuple[int, int],
    q_offset: int | None,
    ranks: int,
    partition: Partition,
    layout: Layout,
) -> None:
    """Every allowed pair is computed by one rank, which holds the query or the key, and no other pair is."""
    lengths = (lengths[0], lengths[0]) if square else lengths
    if not is_placed(pattern, *lengths, q_offset):
        assume(False)
    mask = pattern.compile(lengths, block=block, q_offset=q_offset)
    queries = Sharding.of(mask, ranks, partition)
    keys = queries if square else Sharding.of(mask, ranks, "contiguous", axis="k")
    whole = plan(mask, queries, keys)
    truth = mask.to_dense().reshape(-1, *lengths)
    computed = np.zeros(truth.shape, int)
    work = []
    for rank in range(ranks):
        rows, columns = LocalLayout.of(whole.rows, rank, layout), LocalLayout.of(whole.columns, rank, layout)
        part = local_mask(whole, rank, rows, columns)
        assert part == BlockMask.canonical(part.grid, part.runs, part.tiles, part.pattern_of)
        assert part.shape == (rows.length, columns.length)
        (q_here, q), (k_here, k) = tokens(rows, lengths[0]), tokens(columns, lengths[1])
        dense = part.to_dense().reshape(-1, *part.shape)
        outside = dense.copy()
        outside[:, q_here[:, None], k_here] = False
        assert not outside.any(), "something in a gap is seen"
        computed[:, q[:, None], k] += dense[:, q_here[:, None], k_here]
        work.append(part.nnz)
        if layout != "packed" and part.tokens:
            np.testing.assert_array_equal(q_here[:, None] + part.q_offset - k_here, q[:, None] + mask.q_offset - k)
        foreign = whole.columns.wanted[rank] & (whole.columns.owner != rank)
        if not whole.dense:
            seen = mask.runs.select_rows(all_rows(mask, np.flatnonzero((whole.rows.owner == rank) & ~whole.split)))
            assert set(np.flatnonzero(foreign)) <= set(seen.blocks()[1]), "a key block that no row needs"
    np.testing.assert_array_equal(computed, truth)
    assert whole.work.tolist() == work
    assert sum(work) == mask.nnz


def all_rows(mask: BlockMask, rows: Ints) -> Ints:
    return (np.arange(mask.patterns)[:, None] * mask.grid_shape[0] + rows).ravel()


def tokens(layout: LocalLayout, length: int) -> tuple[Ints, Ints]:
    """Indices of a rank's tokens in its own tensors and in the whole sequence."""
    sizes = np.minimum(layout.size, length - layout.blocks * layout.size)
    here, there = layout.local * layout.size, layout.blocks * layout.size
    return positions(here, here + sizes), positions(there, there + sizes)


def test_layouts_leave_the_gaps_they_must() -> None:
    mask = P.global_tokens([900]).compile(1000, block=16)
    sharding = Sharding.of(mask, 2, "contiguous")
    whole = plan(mask, sharding, sharding)
    assert whole.split.nonzero()[0].tolist() == [56]
    lengths = {n: LocalLayout.of(whole.columns, 1, n).length for n in ("packed", "aligned", "global")}
    assert lengths == {"packed": 504, "aligned": 504, "global": 1000}
    lengths = {n: LocalLayout.of(whole.columns, 0, n).length for n in ("packed", "aligned", "global")}
    assert lengths == {"packed": 512, "aligned": 912, "global": 912}


WORK = [
    ("local(1024)", "contiguous", 1.01, 0.01),
    ("causal()", "zigzag", 1.001, 1.0),
    ("butterfly(unit=128)", "contiguous", 1.001, 0.3),
    ("bigbird()", "contiguous", 1.01, 0.5),
    ("longformer(512)", "contiguous", 1.01, 0.01),
]


@pytest.mark.parametrize(("text", "like", "even", "share"), WORK, ids=[w[0] for w in WORK])
def test_partitioning_by_weight_is_even_and_keeps_neighbours_together(
    text: str, like: Partition, even: float, share: float
) -> None:
    """On 16 ranks at 1,048,576 tokens: the heaviest rank over the mean, and received keys over those of a ring."""
    mask = P.parse(text).compile(1 << 20)
    sharding = Sharding.of(mask, 16)
    whole = plan(mask, sharding, sharding)
    assert sharding == Sharding.of(mask, 16, like)
    assert whole.work.max() <= even * whole.work.mean()
    assert whole.columns.traffic.sum(0).max() <= share * (1 << 20) * 15 / 16


def test_a_global_row_would_make_one_rank_receive_everything() -> None:
    mask = P.longformer(512).compile(1 << 20)
    sharding = Sharding.of(mask, 16)
    whole = plan(mask, sharding, sharding)
    assert whole.split.nonzero()[0].tolist() == [0]
    assert mask.row_counts.max() > 0.5 * whole.work.mean(), "on one rank it would be half of its work"
    assert whole.rows.traffic.sum() == 15 * 128, "its queries go to everyone instead"


def test_layers_share_a_sharding() -> None:
    causal, local = (P.parse(t).compile(4096) for t in ("causal()", "causal() & local(256)"))
    both = Sharding.of([causal, local], 4)
    work = plan(causal, both, both).work + plan(local, both, both).work
    assert work.max() <= 1.02 * work.mean()
    assert hash(both) == hash(Sharding.of([causal, local], 4))


MASK = P.causal().compile(300)
BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: Sharding.of(P.causal(), 2), TypeError, "takes a BlockMask"),  # type: ignore[arg-type]
    (lambda: Sharding.of(MASK, 2.0), TypeError, "ranks must be an int, got 2.0"),  # type: ignore[arg-type]
    (lambda: Sharding.of(MASK, 4), ValueError, "300 tokens are 3 cells of 128, which 4 ranks cannot share"),
    (lambda: Sharding.of(MASK, 0), ValueError, "which 0 ranks cannot share"),
    (lambda: Sharding.of(MASK, 2, "best"), ValueError, "one of 'weight', 'zigzag',.* got 'best'"),  # type: ignore[arg-type]
    (lambda: Sharding.of([MASK, P.full().compile(400)], 2), ValueError, r"one length, got \[300, 400\]"),
    (lambda: Sharding.of(MASK, 2).positions(2), ValueError, "rank must be 0 to 1, got 2"),
    (lambda: Sharding.of(MASK, 2).shard(torch.zeros(301), 0, 0), ValueError, "has 300 tokens, dim 0 of"),
    (lambda: Sharding.of(MASK, 2).unshard([torch.zeros(9)], 0), ValueError, r"got \(9,\)"),
]


@pytest.mark.parametrize(("call", "kind", "message"), BAD, ids=[b[2] for b in BAD])
def test_errors(call: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_the_former_name_of_the_partition_works_and_warns() -> None:
    mask = P.causal().compile(256, block=16)
    with pytest.warns(DeprecationWarning, match="of: deal= is now partition="):
        assert Sharding.of(mask, 2, deal="zigzag") == Sharding.of(mask, 2, "zigzag")  # type: ignore[call-arg]
