"""The suite's own laws on cases small enough to be asked once for every fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from tests import test_attention_laws as attention
from tests import test_cpu_pieces as pieces
from tests import test_decode as decoding
from tests import test_heavy_lines as heavy
from tests import test_pattern_laws as tables
from tests.strategies import Shape

Law = tuple[str, Callable[[], object]]

SHAPE = Shape(70, 90, (16, 32), None)
MIXED = P.per_head(P.causal() & P.local(15), P.prefix(20) - P.global_tokens((33,)))
ALL: dict[str, Any] = {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3}


def use(backend: str) -> None:
    """Let the laws run on this backend."""
    for module in (attention, heavy, decoding):
        vars(module)["BACKEND"] = backend


def inner(law: Any) -> Callable[..., object]:
    """A law without what draws its cases."""
    found: Callable[..., object] = law.hypothesis.inner_test
    return found


def drawn(
    pattern: P.Pattern, group: int, block: tuple[int, int], q_offset: int | None = None, **features: Any
) -> attention.Drawn:
    """Query heads of one key head, lengths that are no multiples of a block."""
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


def law_9() -> None:
    inner(attention.test_law_9_unseen_keys_leave_no_trace)(CASES[0], float("nan"))


def law_4() -> None:
    for pattern in (MIXED, P.causal(), P.per_head(P.local(20), P.global_tokens(3) | P.local(5))):
        inner(tables.test_law_4_column_tables_hold_the_row_tables_entries)(pattern, SHAPE)
        inner(tables.test_law_4_pieces_hold_the_entries_of_their_lines)(pattern, SHAPE)


def checked() -> None:
    for pattern in (MIXED, P.local(40)):
        sf.lookup(SHAPE.compile(pattern)).check(SHAPE.compile(pattern))


def windows() -> None:
    """Pieces of every kind of the CPU backend: tall windows too, whose rows are merged with others."""
    for only_out in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            pieces.test_pieces_of_every_kind_are_masked_dense_attention(
                patch, P.causal() | P.prefix(70), (150, 170), torch.float32, (16, 16), pieces.SMALL, only_out
            )
    with pytest.MonkeyPatch.context() as patch:
        pieces.test_scores_past_the_range_of_their_exponential(patch, 1000.0, pieces.PARTS)


def in_pieces() -> None:
    heavy.test_pieces_give_masked_dense_attention(heavy.BLIND, {})


def steps() -> None:
    """Steps smaller than a block; this module launches kernels, so it is for the interpreter alone."""
    from tests.kernels.numerics import test_triton_laws as launched

    launched.test_a_step_divides_the_block((32, 64), (16, 16))


def decoded() -> None:
    sizes = 1, 2, 5, (23, 40), 43, (16, 16), 16, 24
    law = inner(decoding.test_decoding_is_the_rows_of_masked_dense_attention)
    # A pattern that looks ahead lists keys that are not in the cache yet.
    for pattern in (P.streaming(5, 13), P.full()):
        law(decoding.Drawn(pattern, *sizes, torch.float32, 5, True, 3.0, "sample", 1.0))


ATTENTION: list[Law] = [("law 5", law_5), ("law 9", law_9), ("heavy lines", in_pieces)]
LAWS: dict[str, list[Law]] = {
    "table": [("law 4", law_4), ("table check", checked)],
    "cpu": [*ATTENTION, ("pieces of the CPU backend", windows), ("decoding", decoded)],
    "triton": [*ATTENTION, ("steps of a block", steps)],
}
