"""Split lines, on the Triton launchers: the same laws, and the splits leave nothing out."""

# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-decorators
from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sparseflash.kernels.triton.common import entries, share
from tests.laws.kernels.harness import DEVICE, DTYPES, Problem, Results, check, random_mask, run

pytestmark = pytest.mark.interpreted


def masks(kinds: list[str], N: int, M: int) -> np.ndarray:
    """Stacked token masks [P, N, M]."""
    rng = np.random.default_rng(0)
    return np.stack([random_mask(rng, N, M, kind) for kind in kinds])


def exact(problem: Problem) -> Results:
    """Run a problem some of whose lines are cut, and hold it against float64."""
    rows, columns, *_ = problem.tables()
    assert rows.slots > 1 or columns.slots > 1
    tensors = problem.make()
    got = run(problem, tensors)
    check(problem, got, tensors)
    return got


@pytest.mark.parametrize(("kind", "longest"), [("dense", 3), ("codes", 1), ("codes", 2), ("empty rows", 1)])
def test_split_lines(kind: str, longest: int) -> None:
    exact(Problem(masks([kind], 40, 70), (16, 16), Hq=1, Hkv=1, DV=24, longest=longest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_a_step_smaller_than_the_block(dtype: torch.dtype) -> None:
    exact(Problem(masks(["codes"], 70, 100), (64, 32), Hq=1, Hkv=1, D=40, DV=64, dtype=dtype, longest=1))


@pytest.mark.parametrize("pattern_of", [[[0, 1, 2, 2]], [[0], [1]], [[1, 0, 0, 2], [2, 2, 1, 0]]], ids=str)
def test_a_group_of_heads_may_mix_patterns_cut_and_whole(pattern_of: list[list[int]]) -> None:
    m = masks(["local", "noise", "nothing"], 40, 50)
    m[1, 16:32] = False  # a line without entries in one pattern and with some in another
    problem = Problem(m, (16, 16), B=2, Hq=4, Hkv=2, pattern_of=pattern_of, longest=2)
    work = problem.tables().rows.work_items
    assert (work[:, :, 5] < 0).all(1).tolist() == [False, False, True], "nothing is never cut"
    exact(problem)


def test_a_rerun_is_bitwise_equal() -> None:
    problem = Problem(masks(["noise"], 20, 36), (16, 16), Hq=2, Hkv=1, longest=1)
    tensors = problem.make()
    for x, y in zip(run(problem, tensors), run(problem, tensors), strict=True):
        assert torch.equal(x, y)


def test_a_line_that_is_not_cut_gives_the_same_bits_beside_one_that_is() -> None:
    mask = masks(["local"], 80, 80)
    mask[:, 70] = True  # the last row of blocks and no other has more than three
    problem = Problem(mask, (16, 16), Hq=1, Hkv=1, longest=3)
    tensors = problem.make()
    cut, whole = exact(problem), run(replace(problem, longest=None), tensors)
    for name in ("out", "lse", "dq"):
        assert torch.equal(getattr(cut, name)[:, :, :64], getattr(whole, name)[:, :, :64]), name
    assert not torch.equal(cut.out[:, :, 64:], whole.out[:, :, 64:]), "it was not cut"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of the poison itself
def test_queries_and_keys_without_a_partner_leave_no_trace() -> None:
    mask = masks(["noise"], 40, 70)
    mask[:, :, [0, 5, 33, 69]] = False
    mask[:, 3:20] = False
    problem = Problem(mask, (16, 16), Hq=1, Hkv=1, longest=2)
    blind, unseen = (torch.from_numpy(~mask[0].any(axis)).to(DEVICE) for axis in (1, 0))
    tensors = problem.make()
    expected = exact(problem)
    for name in ("k", "v"):
        tensors[name] = tensors[name].masked_fill(unseen[:, None], float("nan"))
    tensors["dlse"] = tensors["dlse"].masked_fill(blind, float("nan"))
    got = run(problem, tensors)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
    assert (got.out[0, 0][blind] == 0).all()
    assert (got.lse[0, 0][blind] == float("-inf")).all()


@triton.jit
def _ranges(work_ptr, spans_ptr, other_ptr, to_ptr):
    """The entries of each split in its own line, and of the same share of another line."""
    low, high = share(work_ptr + tl.program_id(0) * 4, spans_ptr)
    for line in tl.static_range(2):
        span = spans_ptr if line == 0 else other_ptr
        for partial in tl.static_range(2):
            start, count = entries(span, low, high, partial == 1)
            at = to_ptr + ((tl.program_id(0) * 2 + line) * 2 + partial) * 2
            tl.store(at, start)
            tl.store(at + 1, start + count)


# No shrinking: the interpreter is too slow for it.
@settings(max_examples=30, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(st.integers(0, 300) | st.integers(0, 1 << 20), min_size=4, max_size=4),
    st.lists(st.integers(0, 300), min_size=2, max_size=2),
    st.lists(st.floats(0, 1), max_size=12),
)
def test_shares_of_any_line_are_a_partition(counts: list[int], starts: list[int], borders: list[float]) -> None:
    own, other = (
        [starts[0], starts[0] + full, starts[1], starts[1] + partial]
        for full, partial in ((counts[0], counts[1]), (counts[2], counts[3]))
    )
    full, whole = counts[0], counts[0] + counts[1]
    cuts = sorted({0, whole, *(round(whole * b) for b in borders)}) if whole else [0, 0]
    work = [
        [own[0] + min(x, full) for x in pair] + [own[2] + max(x - full, 0) for x in pair] for pair in pairwise(cuts)
    ]
    splits, mine, theirs = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (work, own, other))
    got = torch.empty((len(work), 2, 2, 2), dtype=torch.int32, device=DEVICE)
    _ranges[(len(work),)](splits, mine, theirs, got)
    for line, ranges in enumerate((own, other)):
        for partial in (0, 1):
            found = got[:, line, partial].tolist()
            assert found[0][0] == ranges[2 * partial]
            assert found[-1][1] == ranges[2 * partial + 1]
            assert all(a <= b for a, b in found)
            assert all(before[1] == after[0] for before, after in pairwise(found))
    size = torch.tensor([high - low for low, high in pairwise(cuts)])
    assert ((got[:, 0, :, 1] - got[:, 0, :, 0]).sum(1).cpu() - size).abs().max() <= 1, "far from what was dealt"
