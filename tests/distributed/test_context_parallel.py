"""Attention over a shared sequence is attention in one process: outputs, lse and gradients."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.distributed import plan
from sparseflash.distributed.comm_volume import Operands, received, ring_forward
from tests.distributed import programs
from tests.distributed.programs import Call
from tests.distributed.ranks import Ranks
from tests.strategies import expressions, is_placed, named_leaves, per_head

EVERYTHING = (("softcap", 3.0), ("alibi", "sample"), ("sinks", 1.0), ("dropout_p", 0.3))
WIDE = P.local(20) | P.global_tokens(3)  # with 40 block rows, the first one is split

CALLS = {
    "local": Call(P.local(40), 320),
    "local, contiguous": Call(P.local(40), 320, partition="contiguous"),
    "butterfly": Call(P.butterfly(unit=16), 512),
    "butterfly, zigzag": Call(P.butterfly(unit=16), 512, partition="zigzag"),
    "causal": Call(P.causal()),
    "causal, zigzag": Call(P.causal(), partition="zigzag"),
    "causal, contiguous": Call(P.causal(), partition="contiguous"),
    "documents": Call(P.causal() & P.documents([100, 7, 60, 90, 200])),
    "dense": Call(P.full(), 200),
    "global tokens": Call(WIDE, 640),
    "global tokens, zigzag, half": Call(WIDE, 640, partition="zigzag", dtype=torch.bfloat16),
    "global tokens, ragged, per head": Call(P.per_head(WIDE, P.causal(), WIDE, P.local(3)), 633, heads=2, group=2),
    "global tokens, only out used": Call(WIDE, 640, used="out"),
    "global tokens, only lse used": Call(WIDE, 640, used="lse"),
    "bigbird": Call(P.bigbird(16), 700),
    "per head and sample": Call(P.per_sample(P.per_head(P.causal(), P.local(9)), P.full()), 150, heads=2, batch=2),
    "ragged, wide blocks": Call(P.causal() | P.local(5), 517, block=(64, 32), dims=(24, 40)),
    "tall blocks": Call(P.local(50), 500, block=(16, 64), dims=(40, 24), dtype=torch.float16),
    "rectangular": Call(P.causal() & P.local(90), 200, 330, heads=2, batch=2),
    "rectangular, offset": Call(P.causal(), 300, 210, q_offset=-40, partition="zigzag"),
    "rows that see nothing": Call(P.local(50) - P.prefix(100), 300, partition="contiguous"),
    "nothing at all": Call(P.full() - P.full(), 100),
    "grouped queries, half": Call(P.causal() & P.local(100), 256, heads=2, group=2, dtype=torch.bfloat16),
    "softcap": Call(P.causal(), 200, heads=2, features=(("softcap", 2.0),)),
    "alibi": Call(P.local(30), 300, heads=2, features=(("alibi", "head"),)),
    "alibi, zigzag, offset": Call(P.causal(), 260, 300, q_offset=7, partition="zigzag", features=(("alibi", "head"),)),
    "sinks": Call(P.causal(), 200, heads=2, features=(("sinks", 2.0),)),
    "light sinks of split rows": Call(P.star(), 130, heads=2, features=(("sinks", 20.0),), seed=6),
    "dropout": Call(P.causal(), 200, heads=2, batch=2, features=(("dropout_p", 0.3),)),
    "everything": Call(P.causal() & P.local(99), 250, heads=1, group=2, batch=2, features=EVERYTHING),
    "everything, global tokens": Call(WIDE, 633, heads=1, group=2, batch=2, features=EVERYTHING, partition="zigzag"),
}


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_equal_to_one_process(ranks: Ranks, call: Call) -> None:
    ranks.run(programs.compare, call)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    heads, group, batch = draw(st.sampled_from([(1, 1, 1), (2, 1, 1), (1, 2, 2)]))
    q_len = draw(st.integers(130, 400))
    features = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "softcap": st.sampled_from([0.3, 30.0]),
                "alibi": st.sampled_from(["head", "sample"]),
                "sinks": st.sampled_from([1.0, 20.0]),
                "dropout_p": st.sampled_from([0.1, 0.9]),
            },
        )
    )
    return Call(
        draw(expressions(named_leaves) | per_head(heads * group, named_leaves)),
        q_len, draw(st.just(q_len) | st.integers(130, 400)),
        draw(st.tuples(st.sampled_from([16, 32]), st.sampled_from([16, 32]))),
        draw(st.none() | st.integers(-20, 20)), batch, heads, group,
        draw(st.sampled_from([(16, 16), (24, 40)])), draw(st.sampled_from([torch.float32, torch.bfloat16])),
        draw(st.sampled_from(["weight", "zigzag", "contiguous"])), tuple(features.items()), draw(st.integers(0, 999)),
    )  # fmt: skip


@settings(max_examples=15)
@given(call=calls())
def test_equal_to_one_process_for_any_pattern(ranks: Ranks, call: Call) -> None:
    if not is_placed(call.pattern, call.q_len, call.kv_len or call.q_len, call.q_offset):
        assume(False)
    ranks.run(programs.compare, call)


COUNTED = ("local", "butterfly", "causal, zigzag", "dense", "global tokens, zigzag, half", "rectangular", "documents",
           "grouped queries, half", "nothing at all")  # fmt: skip


DENSE = {2: ("dense", "butterfly"), 4: ("dense",)}  # in one all-gather


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_moved_are_those_counted_from_the_tables(ranks: Ranks, name: str) -> None:
    call, mask = CALLS[name], CALLS[name].mask()
    moved = ranks.run(programs.count, call)
    whole = plan(mask, *programs.shardings(call, mask, ranks.count))
    operands = Operands(call.heads * call.group, call.heads, *call.dims, call.dtype.itemsize, call.batch)
    forward, backward = received(whole, operands)
    assert [f for f, _, _ in moved] == forward.tolist()
    assert [b for _, b, _ in moved] == backward.tolist()
    assert whole.dense == (name in DENSE[ranks.count])
    assert all(used <= {"_allgather_base_" if whole.dense else "alltoall_base_"} for _, _, used in moved)
    assert max(f for f, _, _ in moved) <= ring_forward(mask.shape[1], ranks.count, operands) + slack(call, ranks.count)


def slack(call: Call, ranks: int) -> int:
    """Bytes by which an all-gather of unequal shards is longer than one of equal ones: one cell for each."""
    operands = Operands(1, call.heads, *call.dims, call.dtype.itemsize, call.batch)
    return ranks * 2 * max(call.block) * operands.keys


WRONG = {
    "shard": "rank [0-9] of [0-9] holds [0-9]+ of 300 tokens, but q has [0-9]+",
    "batch": r"all ranks must make the same call, but rank 0 of [0-9] has q \[1, 2.*; rank [0-9] has q \[2, 2",
    "mask": "all ranks must make the same call|rank [0-9] of [0-9] holds",
    "no tensor": "q must be a tensor, got NoneType",
    "option": "rank 0 of [0-9] has .*; scale=[0-9.]+, backend=.cpu.; .*rank [0-9] has .*, softcap=2.0, ",
    "partition": "all ranks must make the same call|rank [0-9] of [0-9] holds",
    "gradient": "gradients of none.*gradients of q",
    "length": "sharding is for 300 tokens, the mask for 301",
    "ranks": "sharding is for [0-9] ranks, the mesh has [0-9]",
    "few cells": "100 tokens are 1 cells of 128, which [0-9] ranks cannot share",
    "table": "mask must be a BlockMask, a Pattern or its text: a LookupTable is no longer on the host",
    "pattern": "a Pattern has no length",
    "seed": "dropout over several ranks needs a seed",
    "mesh": r"the mesh has 2 \(data, context\): pass mesh\['context'\]",
    "no mesh": "mesh must be a DeviceMesh",
    "softcap": "softcap must be positive",
    "grad": r"context_parallel_attention takes no transform of torch\.func .*loss\.backward",
    "tangent": "forward-mode derivatives .* of context_parallel_attention are not implemented",
}


@pytest.mark.parametrize("what", WRONG)
def test_every_rank_raises(ranks: Ranks, what: str) -> None:
    for rank, (ok, text) in enumerate(ranks.outcomes(programs.fail, what, patience=20)):
        assert not ok, f"rank {rank} went on"
        assert re.search(WRONG[what], text.splitlines()[-1]), f"rank {rank}: {text}"
    ranks.run(programs.compare, CALLS["causal"])  # and the group still works


def test_a_rerun_is_equal_bit_for_bit(ranks: Ranks) -> None:
    ranks.run(programs.rerun, CALLS["global tokens"])
    ranks.run(programs.rerun, replace(CALLS["causal"], heads=2))


@pytest.mark.parametrize("name", ["causal", "global tokens", "global tokens, only out used", "everything"])
def test_activation_checkpointing_changes_nothing(ranks: Ranks, name: str) -> None:
    """Recomputing exchanges again, in the backward pass: in one order on all ranks."""
    ranks.run(programs.rerun, CALLS[name], True, patience=30)
