"""Lines far above the mean, split among programs, give the same attention.

Like the attention laws this runs on the CPU backend, which walks such lines whole, and again on the Triton kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns import BlockMask
from tests.laws.backend import BACKEND, DEVICE
from tests.oracle import Case, Features, check, ours, random_case, random_features
from tests.splits import lookup_with_splits

pytestmark = pytest.mark.interpreted
LENGTH = 100
HEAVY = P.local(9) | P.global_tokens((40, 41))  # the lines of the global tokens hold 7 blocks, others 3 or 4
BLIND = HEAVY - P.global_tokens((35, 37, 40))  # and of these three tokens not one pair is left


def case_of(mask: BlockMask, heads: int = 1, group: int = 1, **features: Any) -> Case:
    batch = mask.pattern_of.shape[0]
    return random_features(random_case(1, batch, heads, group, *mask.shape, 16, 24, torch.float32), 1, **features)


def with_splits(case: Case, mask: BlockMask) -> list[torch.Tensor]:
    """Attention with split lines."""
    table = lookup_with_splits(mask, DEVICE)
    assert min(table.rows.slots, table.columns.slots) > 1, "no line is split"
    return ours(case, table, BACKEND)


ON: dict[str, dict[str, Any]] = {
    "plain": {},
    "sinks": {"sinks": 1.0},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": "pairs shared"},
    "all": {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3, "bias": "near distances"},
}


@pytest.mark.parametrize(
    ("pattern", "on"), [(HEAVY, {}), *((BLIND, on) for on in ON.values())], ids=["heavy", *(f"blind, {n}" for n in ON)]
)
def test_splits_give_masked_dense_attention(pattern: P.Pattern, on: dict[str, Any]) -> None:
    mask = pattern.compile(LENGTH, block=16)
    case = case_of(mask, **on)
    check(case, torch.from_numpy(mask.to_dense()), with_splits(case, mask))


@pytest.mark.parametrize(
    "pattern",
    [P.per_head(P.local(20), HEAVY, P.full(), BLIND), P.per_sample(BLIND, P.full())],
    ids=["by head", "by sample"],
)
def test_heads_and_samples_of_which_some_are_cut(pattern: P.Pattern) -> None:
    mask = pattern.compile((70, 80), block=16, q_offset=0)
    assert (lookup_with_splits(mask).rows.reductions[:, :, 0] < 0).all(1).any(), "every pattern has split lines"
    case = case_of(mask, heads=2, group=2, sinks=1.0, dropout_p=0.2) if "head" in str(pattern) else case_of(mask)
    check(case, torch.from_numpy(mask.to_dense()), with_splits(case, mask))


def test_a_rerun_is_bitwise_equal_and_whole_lines_agree() -> None:
    mask = BLIND.compile(LENGTH, block=16)
    case = case_of(mask, **ON["all"])
    first, again = with_splits(case, mask), with_splits(case, mask)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b), "a rerun differs"
    whole = sf.lookup(mask, DEVICE)
    assert whole.rows.slots == whole.columns.slots == 0
    check(case, torch.from_numpy(mask.to_dense()), ours(case, whole, BACKEND))


@pytest.mark.parametrize("sink", [-torch.inf, -1000.0, 1000.0])
def test_sinks_far_from_every_score(sink: float) -> None:
    mask = BLIND.compile(70, block=16)
    case = case_of(mask)
    far = dataclasses.replace(case, features=Features(sinks=torch.tensor([sink])))
    results = with_splits(far, mask)
    assert not any(torch.isnan(r).any() for r in results)
    if sink == -torch.inf:
        assert all(torch.equal(a, b) for a, b in zip(with_splits(case, mask), results[:5], strict=True))
    else:
        check(far, torch.from_numpy(mask.to_dense()), results)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_splits_travel_through_a_compiled_graph() -> None:
    torch._dynamo.reset()
    mask = HEAVY.compile(60, block=16)
    case, table = case_of(mask), lookup_with_splits(mask, DEVICE)
    q, k, v = (x.detach().to(DEVICE).requires_grad_() for x in (case.q, case.k, case.v))

    def layer(q: torch.Tensor, table: sf.LookupTable) -> torch.Tensor:
        return sf.attention(q, k, v, table, backend=BACKEND)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        out = function(q, table)
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_splits_count_as_bytes() -> None:
    mask = HEAVY.compile(LENGTH, block=16)
    table, whole = lookup_with_splits(mask), sf.lookup(mask)
    sizes = [side.work_items.nbytes + side.reductions.nbytes for side in (table.rows, table.columns)]
    assert min(sizes) > 0
    assert table.nbytes == whole.nbytes + sum(sizes)
