"""The tolerance must refuse what is wrong, or the laws prove nothing."""

from __future__ import annotations

import pytest
import torch

from sparseflash import patterns as P
from tests.oracle import NAMES, check, ours, random_case


@pytest.mark.parametrize("tokens", [30, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_results_are_refused(name: str, dtype: torch.dtype, tokens: int) -> None:
    case = random_case(0, 1, 2, 1, tokens, tokens, 24, 24, dtype)
    mask = P.causal().compile(tokens, block=16)
    truth = torch.from_numpy(mask.to_dense())
    right = ours(case, mask, "cpu")
    check(case, truth, right)
    place = NAMES.index(name)
    factors = [0.0, -1.0, 1.25] if dtype != torch.float32 else [0.0, -1.0, 1.001]
    for factor in factors:
        wrong = [r * factor if i == place else r for i, r in enumerate(right)]
        with pytest.raises(AssertionError, match=f"{name}: error"):
            check(case, truth, wrong)
