"""Every dtype, head dim and block size once with each kind of mask: what random drawing may leave out.

On the CPU backend a corner of it; with SPARSEFLASH_TEST_BACKEND=triton and a GPU all of it (``make gpu``). Small cases
come first, and memory that a call allocates holds NaN until something is written there.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from tests.laws.backend import BACKEND, COMPILED
from tests.laws.kernels.harness import poisoned
from tests.oracle import check, ours, random_case

HEAD_DIMS = (*((D, D) for D in (16, 32, 64, 96, 128, 192, 256)), (64, 128), (192, 128), (40, 72))
BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (256, 256), (128, 64), (16, 128), (64, 256))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _cells(q: object, k: object) -> object:
    return (q // 24 * 7 + k // 24 * 3) % 5 < 2  # type: ignore[operator]


MASKS: tuple[Pattern, ...] = (
    P.causal(),
    P.local(70) | P.global_tokens(2),
    P.documents([30, 1, 150, 90, 5000]),
    P.where(_cells),  # blocks of random codes
    P.local(20) & P.prefix(90),
    P.causal() & P.local(64) - P.local(0) - P.global_tokens([5]),  # query 0 sees nothing
    P.full(),
)


Sweep = tuple[torch.dtype, tuple[int, int], tuple[int, int], Pattern]


def sweep() -> list[Sweep]:
    """All head dims with all blocks; dtypes and masks take turns, so that each meets each head dim and each block."""
    turned = [
        (DTYPES[(i + j) % len(DTYPES)], dims, block, MASKS[(i + 3 * j) % len(MASKS)])
        for i, dims in enumerate(HEAD_DIMS)
        for j, block in enumerate(BLOCKS)
    ]
    return sorted(turned, key=lambda one: (sum(one[1]), sum(one[2])))


@pytest.mark.parametrize(("dtype", "dims", "block", "pattern"), sweep() if COMPILED else sweep()[:55:6], ids=str)
def test_attention_is_masked_dense_attention(
    dtype: torch.dtype, dims: tuple[int, int], block: tuple[int, int], pattern: Pattern
) -> None:
    tokens = 100 + sum(block)
    mask = pattern.compile((tokens, tokens + 37), block=block, q_offset=0)
    case = random_case(1, 1, 1, 2, tokens, tokens + 37, *dims, dtype)
    with poisoned():
        results = ours(case, mask, BACKEND)
    check(case, torch.from_numpy(mask.to_dense()), results)


def test_dtypes_and_masks_meet_every_head_dim_and_block() -> None:
    met = {(a, b) for one in sweep() for a, b in itertools.permutations(one, 2)}
    for turning in (DTYPES, MASKS):
        for fixed in (HEAD_DIMS, BLOCKS):
            assert met.issuperset(itertools.product(turning, fixed))
    assert met.issuperset(itertools.product(DTYPES, MASKS))
