"""Attention over a shared sequence is attention in one process: outputs, lse and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sparseflash import patterns as P
from tests.distributed import programs
from tests.distributed.programs import Call
from tests.distributed.ranks import Ranks

EVERYTHING = (("softcap", 3.0), ("alibi", "sample"), ("sinks", 1.0), ("dropout_p", 0.3))
WIDE = P.local(20) | P.global_tokens(3)  # with 40 block rows, the first one is split

CALLS = {
    "local": Call(P.local(40), 320),
    "local, contiguous": Call(P.local(40), 320, deal="contiguous"),
    "butterfly": Call(P.butterfly(unit=16), 512),
    "butterfly, zigzag": Call(P.butterfly(unit=16), 512, deal="zigzag"),
    "causal": Call(P.causal()),
    "causal, zigzag": Call(P.causal(), deal="zigzag"),
    "causal, contiguous": Call(P.causal(), deal="contiguous"),
    "documents": Call(P.causal() & P.documents([100, 7, 60, 90, 200])),
    "dense": Call(P.full(), 200),
    "global tokens": Call(WIDE, 640),
    "global tokens, zigzag, half": Call(WIDE, 640, deal="zigzag", dtype=torch.bfloat16),
    "global tokens, ragged, per head": Call(P.per_head(WIDE, P.causal(), WIDE, P.local(3)), 633, heads=2, group=2),
    "bigbird": Call(P.bigbird(16), 700),
    "per head and sample": Call(P.per_sample(P.per_head(P.causal(), P.local(9)), P.full()), 150, heads=2, batch=2),
    "ragged, wide blocks": Call(P.causal() | P.local(5), 517, block=(64, 32), dims=(24, 40)),
    "tall blocks": Call(P.local(50), 500, block=(16, 64), dims=(40, 24), dtype=torch.float16),
    "rectangular": Call(P.causal() & P.local(90), 200, 330, heads=2, batch=2),
    "rectangular, offset": Call(P.causal(), 300, 210, q_offset=-40, deal="zigzag"),
    "rows that see nothing": Call(P.local(50) - P.prefix(100), 300, deal="contiguous"),
    "nothing at all": Call(P.full() - P.full(), 100),
    "grouped queries, half": Call(P.causal() & P.local(100), 256, heads=2, group=2, dtype=torch.bfloat16),
    "softcap": Call(P.causal(), 200, heads=2, features=(("softcap", 2.0),)),
    "alibi": Call(P.local(30), 300, heads=2, features=(("alibi", "head"),)),
    "alibi, zigzag, offset": Call(P.causal(), 260, 300, q_offset=7, deal="zigzag", features=(("alibi", "head"),)),
    "sinks": Call(P.causal(), 200, heads=2, features=(("sinks", 2.0),)),
    "dropout": Call(P.causal(), 200, heads=2, batch=2, features=(("dropout_p", 0.3),)),
    "everything": Call(P.causal() & P.local(99), 250, heads=1, group=2, batch=2, features=EVERYTHING),
    "everything, global tokens": Call(WIDE, 633, heads=1, group=2, batch=2, features=EVERYTHING, deal="zigzag"),
}


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    processes = Ranks(request.param)
    yield processes
    processes.close()


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_equal_to_one_process(ranks: Ranks, call: Call) -> None:
    ranks.run(programs.compare, call)


def test_a_rerun_is_equal_bit_for_bit(ranks: Ranks) -> None:
    ranks.run(programs.rerun, CALLS["global tokens"])
    ranks.run(programs.rerun, replace(CALLS["causal"], heads=2))
