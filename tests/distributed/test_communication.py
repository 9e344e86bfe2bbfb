"""The counts behind the tables of benchmarks/README.md."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import communication
from sparseflash import patterns as P
from sparseflash.distributed import Sharding, plan
from sparseflash.distributed.comm_volume import Operands, received, ring_forward


def test_rows_are_counted_for_every_number_of_ranks() -> None:
    name, tokens = "local(1024)", 1 << 16
    moved, work = communication.measure(name, communication.MASKS[name](tokens).compile(tokens))
    for ranks in communication.RANKS:
        neighbours = min(ranks - 1, 2)
        assert moved[f"weight_max_{ranks}"] == communication._short(neighbours * 1024 / (tokens - tokens // ranks))
        assert work[f"weight_{ranks}"] < 1.02


def test_dense_attention_moves_what_a_ring_moves() -> None:
    for ranks in (2, 8):
        mask = P.full().compile(8192)
        sharding = Sharding.of(mask, ranks)
        forward, backward = received(plan(mask, sharding, sharding), Operands())
        assert set(forward.tolist()) == set(backward.tolist()) == {ring_forward(8192, ranks, Operands())}


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [("traffic", "comm_volume", ["Operands", "received", "ring_forward"]), ("pooling", "context", ["summed"])],
    ids=["traffic", "pooling"],
)
def test_addresses_of_the_first_release_warn_and_still_work(old: str, new: str, names: list[str]) -> None:
    before, now = (importlib.import_module(f"sparseflash.distributed.{name}") for name in (old, new))
    for name in names:
        with pytest.warns(DeprecationWarning, match=rf"distributed\.{old}\.{name} is now sparseflash\.") as met:
            assert getattr(before, name) is getattr(now, name)
        assert met[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'sent'"):
        _ = before.sent
