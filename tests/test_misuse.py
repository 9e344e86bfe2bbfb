"""What people write where a pattern should stand, and the line that they are told to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from sparseflash import patterns as P

CAUSAL: Any = P.causal()
MASK: Any = CAUSAL.compile(64, block=16)


@dataclass(frozen=True, repr=False)
class Near(P.Pattern):
    reach: int

    def allows(self, q: Any, k: Any) -> Any:
        return abs(q - k) <= self.reach


@pytest.mark.parametrize("operand", [CAUSAL, CAUSAL & P.local(3), P.where(np.equal), Near(3), MASK], ids=repr)
def test_and_or_not_are_no_operators_of_patterns(operand: Any) -> None:
    wrong: list[Callable[[], object]] = [
        lambda: operand and P.local(5),
        lambda: operand or P.local(5),
        lambda: not operand,
        lambda: bool(operand),
        lambda: P.local(5) if operand else P.causal(),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match=re.escape("has no truth value") + ".*" + re.escape("write `&`, `|`, `~`")):
            call()


@pytest.mark.parametrize(
    ("operand", "words"),
    [
        (P.causal, "causal is not called: write causal()"),
        (P.local, "local is not called: write local(window)"),
        (P.documents, "documents is not called: write documents(lengths)"),
        (P.per_head, "per_head is not called: write per_head(...)"),
        (Near, "Near is a class: write Near(reach)"),
        (lambda q, k: q > k, "a lambda is a function, not a pattern: write where(fn)"),
        (np.greater, "greater is a function, not a pattern: write where(fn)"),
        (True, "True is not a pattern: write full(), or ~full() for nothing"),
        (np.bool_(False), "False is not a pattern: write full()"),
        ("local(5)", "text is not a pattern: write parse('local(5)')"),
        ("local(5) | " * 9, "write parse('local(5) | local(5) | local(5) | loca...')"),
        (np.ones((4, 4), bool), "write from_blocks(array, unit)"),
        (torch.ones(4, 4) > 0, "write from_blocks(array, unit)"),
        (MASK, "compile the pattern first, pattern.compile(mask.shape, mask.block, mask.q_offset)"),
        (3, "unsupported operand"),
        (None, "unsupported operand"),
        (dict, "unsupported operand"),
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_operands_that_are_no_patterns(operand: Any, words: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: CAUSAL & operand,
        lambda: CAUSAL | operand,
        lambda: CAUSAL - operand,
        lambda: operand & CAUSAL,
        lambda: operand | CAUSAL,
        lambda: operand - CAUSAL,
    ]
    for call in calls:
        with pytest.raises(TypeError, match=re.escape(words)):
            call()


def test_heads_and_samples_that_are_no_patterns() -> None:
    stacked: Any
    for stacked in (P.per_head, P.per_sample):
        with pytest.raises(TypeError, match=re.escape("operand 1 is <function causal")) as error:
            stacked(CAUSAL, P.causal)
        assert str(error.value).endswith(": causal is not called: write causal()")
        with pytest.raises(TypeError, match=r"operand 0 is 3$"):
            stacked(3)


def test_a_mask_for_the_lengths_of_another_combines_as_the_error_says() -> None:
    mask: P.BlockMask = P.local(9).compile((30, 70), block=(16, 32), q_offset=5)
    again = CAUSAL.compile(mask.shape, mask.block, mask.q_offset)
    assert mask & again == (CAUSAL & P.local(9)).compile((30, 70), block=(16, 32), q_offset=5)
