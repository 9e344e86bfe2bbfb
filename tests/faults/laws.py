"""The suite's own laws on cases small enough to be asked once for every fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels.cpu import native
from tests.laws import test_attention_laws as attention
from tests.laws import test_bias_laws as biases
from tests.laws import test_decode as decoding
from tests.laws import test_heavy_lines as heavy
from tests.laws import test_pattern_laws as tables
from tests.oracle import check, ours, random_case
from tests.strategies import Shape

Law = tuple[str, Callable[[], object]]

SHAPE = Shape(70, 90, (16, 32), None)
MIXED = P.per_head(P.causal() & P.local(15), P.prefix(20) - P.global_tokens((33,)))
ALL: dict[str, Any] = {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3}


def use(backend: str) -> None:
    """Let the laws run on this backend."""
    for module in (attention, biases, heavy, decoding):
        vars(module)["BACKEND"] = backend


def inner(law: Any) -> Callable[..., object]:
    """A law without what draws its cases."""
    found: Callable[..., object] = law.hypothesis.inner_test
    return found


def drawn(
    pattern: P.Pattern, group: int, block: tuple[int, int], q_offset: int | None = None, **features: Any
) -> attention.Drawn:
    """Query heads of one key head, lengths that are not multiples of a block."""
    sizes = 1, group, 1, 21, 37, block, q_offset, 16, 24
    return attention.Drawn(pattern, *sizes, torch.float32, 5, features, True)


CASES = [
    # Some queries see nothing, and so do all those of a block row. The quickest case comes first.
    drawn(P.causal() - P.local(2) - P.global_tokens(tuple(range(16))), 1, (16, 16), 0),
    drawn(MIXED, 2, (16, 16)),
    drawn(P.causal() | P.strided(3), 1, (16, 32), 3, **ALL),
]


def law_5() -> None:
    for case in CASES:
        inner(attention.test_law_5_attention_is_masked_dense_attention)(case)


def biased() -> None:
    case = drawn(P.causal() | P.strided(3), 2, (16, 32), 3, softcap=3.0, sinks=1.0)
    for form in ("near distances", "pairs shared", "keys", "queries"):
        inner(biases.test_minus_infinity_hides_a_pair)(case, form, 0.2, 0)


def law_9() -> None:
    inner(attention.test_law_9_unseen_keys_leave_no_trace)(CASES[0], float("nan"))


def law_4() -> None:
    for pattern in (MIXED, P.causal(), P.per_head(P.local(20), P.global_tokens(3) | P.local(5))):
        inner(tables.test_law_4_column_tables_hold_the_row_tables_entries)(pattern, SHAPE)
        inner(tables.test_law_4_splits_hold_the_entries_of_their_lines)(pattern, SHAPE)


def checked() -> None:
    for pattern in (MIXED, P.local(40)):
        sf.lookup(SHAPE.compile(pattern)).check(SHAPE.compile(pattern))


def far_scores() -> None:
    """Sums and outputs have to be faded where a later block has the larger scores, and where it has not."""
    mask = P.local(60).compile(200, block=16)
    for factor in (30.0, 1000.0):
        case = random_case(7, 1, 2, 1, 200, 200, 16, 16, torch.float32)
        case = replace(case, q=case.q * factor)
        check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


def halves() -> None:
    """Gradients of half precision are summed up beside what is returned."""
    mask = (P.causal() | P.prefix(70)).compile((150, 170), block=16)
    case = random_case(0, 1, 2, 2, 150, 170, 16, 16, torch.bfloat16)
    case = replace(case, scale=0.3)
    check(case, torch.from_numpy(mask.to_dense()), ours(case, mask, "cpu"))


def hidden() -> None:
    """A NaN that some queries of a block see, and others do not."""
    mask = P.causal().compile(40, block=16)
    case = random_case(1, 1, 1, 1, 40, 40, 16, 16, torch.float32)
    v = case.v.clone()
    v[0, 0, 20] = torch.nan
    out = sf.attention(case.q, case.k, v, mask)
    assert not out[0, 0, :20].isnan().any()
    assert out[0, 0, 20:].isnan().all()


def with_splits() -> None:
    heavy.test_splits_give_masked_dense_attention(heavy.BLIND, {})


def steps() -> None:
    """Steps smaller than a block; this module launches kernels, so it is for the interpreter alone."""
    from tests.laws.kernels import test_triton_laws as launched

    launched.test_a_step_divides_the_block((32, 64), (16, 16))


def decoded() -> None:
    sizes = 1, 2, 5, (23, 40), 43, (16, 16), 16, 24
    law = inner(decoding.test_decoding_is_the_rows_of_masked_dense_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "SPLIT", 16)
        # A pattern that looks ahead lists keys that are not in the cache yet.
        for pattern in (P.streaming(5, 13), P.full()):
            law(decoding.Drawn(pattern, *sizes, torch.float32, 5, True, 3.0, "sample", 1.0))


ATTENTION: list[Law] = [("law 5", law_5), ("biases", biased), ("law 9", law_9), ("heavy lines", with_splits)]
LAWS: dict[str, list[Law]] = {
    "table": [("law 4", law_4), ("table check", checked)],
    "cpu": [*ATTENTION, ("far scores", far_scores), ("halves", halves), ("decoding", decoded)],
    "native": [*ATTENTION, ("far scores", far_scores), ("halves", halves), ("decoding", decoded), ("hidden", hidden)],
    "triton": [*ATTENTION, ("steps of a block", steps)],
}
