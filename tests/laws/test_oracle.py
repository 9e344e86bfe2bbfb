"""The tolerance must refuse what is wrong, or the laws prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparseflash import patterns as P
from tests.oracle import NAMES, check, ours, random_case, random_features

ALL_ON: dict[str, Any] = {"softcap": 3.0, "alibi": "head", "sinks": 1.0, "dropout_p": 0.3, "bias": "keys"}


@pytest.mark.parametrize("tokens", [30, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "features"),
    [*((name, {}) for name in NAMES[:5]), *((name, ALL_ON) for name in NAMES)],
    ids=[*NAMES[:5], *(f"{name}, all features" for name in NAMES)],
)
def test_wrong_results_are_refused(name: str, features: dict[str, Any], dtype: torch.dtype, tokens: int) -> None:
    case = random_features(random_case(0, 1, 2, 1, tokens, tokens, 24, 24, dtype), 0, **features)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "change", [{"softcap": 3.3}, {"softcap": None}, {"alibi": ""}, {"dropout_p": 0.0}, {"bias": "pairs shared"}]
)
def test_a_feature_left_out_is_refused(change: dict[str, Any], dtype: torch.dtype) -> None:
    plain = random_case(0, 1, 2, 1, 100, 100, 24, 24, dtype)
    mask = P.causal().compile(100, block=16)
    right = ALL_ON if "bias" in change else ALL_ON | {"bias": ""}  # which leaves less of the others to be seen
    wrong = ours(random_features(plain, 0, **(right | change)), mask, "cpu")
    with pytest.raises(AssertionError, match="error"):
        check(random_features(plain, 0, **right), torch.from_numpy(mask.to_dense()), wrong)
