"""Masks from and to scipy matrices of block codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.tiles import unpack
from tests.strategies import Shape, expressions, per_head, shapes

FORMATS = ("coo", "csc", "csr", "dok", "lil")


@given(expressions() | per_head(2), shapes(), st.sampled_from(FORMATS), st.booleans())
def test_there_and_back_is_the_identity(pattern: Pattern, shape: Shape, layout: str, packed: bool) -> None:
    mask = shape.compile(pattern)
    tiles = mask.tiles if packed else unpack(mask.tiles, shape.block[1])
    dense = mask.to_dense().reshape(-1, *mask.shape)
    back = [
        BlockMask.from_scipy(mask.to_scipy(p).asformat(layout), mask.shape, mask.block, tiles, mask.q_offset)
        for p in range(mask.patterns)
    ]
    for head, p in enumerate(mask.pattern_of.ravel()):
        np.testing.assert_array_equal(back[p].to_dense(), dense[head])
    if mask.pattern_of.size == 1:
        assert back[0] == mask


@given(shapes(), st.integers(0, 1 << 16), st.sampled_from([bool, np.int8, np.uint32]))
def test_blocks_without_tiles_are_seen_whole(shape: Shape, seed: int, dtype: Any) -> None:
    (bq, bk), q_len, kv_len = shape.block, shape.q_len, shape.kv_len
    blocks = np.random.default_rng(seed).random((-(-q_len // bq), -(-kv_len // bk))) < 0.5
    mask = BlockMask.from_scipy(sparse.csr_array(blocks.astype(dtype)), (q_len, kv_len), shape.block)
    np.testing.assert_array_equal(mask.to_dense(), np.kron(blocks, np.ones((bq, bk), bool))[:q_len, :kv_len])
    assert mask == BlockMask.from_dense(mask.to_dense(), shape.block)


def test_the_result_is_canonical_whatever_is_given() -> None:
    tiles = np.zeros((4, 16, 16), bool)
    tiles[1], tiles[2, 3:, 5], tiles[3, 3:, 5] = True, True, True
    codes = np.array([[2, 3, 4], [5, 1, 3], [4, 0, 2]])
    mask = BlockMask.from_scipy(sparse.coo_array(codes), (40, 48), 16, tiles)
    assert mask.to_scipy().toarray().tolist() == [[0, 1, 2], [2, 1, 1], [3, 0, 0]]
    assert len(mask.tiles) == 2, "of the ragged row, bits past the lengths are dropped"
    assert mask == BlockMask.from_dense(mask.to_dense(), 16, mask.q_offset)


def test_stored_zeros_are_empty_and_scipy_adds_blocks_that_are_named_twice() -> None:
    rows, cols, data = [0, 0, 1, 1], [1, 1, 0, 1], np.array([1, 1, 0, 1])
    tiles = np.eye(16, dtype=bool)[None]
    twice = sparse.coo_array((data, (rows, cols)), shape=(2, 2))
    expected = BlockMask.from_scipy(sparse.csr_array(np.array([[0, 2], [0, 1]])), 32, 16, tiles)
    assert BlockMask.from_scipy(twice, 32, 16, tiles) == expected
    unsorted = sparse.csr_array((data, np.array(cols), np.array([0, 2, 4])), shape=(2, 2))
    assert BlockMask.from_scipy(unsorted, 32, 16, tiles) == expected
    assert unsorted.nnz == 4, "the argument is left as it was"


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"codes": np.eye(4)}, TypeError, "takes a scipy.sparse matrix of booleans or ints, got ndarray"),
        ({"codes": sparse.eye_array(4)}, TypeError, "of booleans or ints, got one of float64"),
        ({"seq_len": (65, 48)}, ValueError,
         r"65 x 48 tokens in blocks of 16 x 16 are 5 x 3 blocks; the matrix has shape \(4, 4\)"),
        ({"codes": 3 * sparse.eye_array(4, dtype=np.int32)}, ValueError,
         r"block \(0, 0\) has code 3: expected 0 to 1 with 0 tiles"),
        ({"codes": -sparse.eye_array(4, dtype=np.int32), "tiles": np.ones((2, 16, 16), bool)}, ValueError,
         "has code -1: expected 0 to 3 with 2 tiles"),
        ({"tiles": np.ones((1, 16, 32), bool)}, ValueError,
         r"booleans \[T, 16, 16\] or uint32 \[T, 16, 1\], got bool \[1, 16, 32\]"),
        ({"tiles": np.ones((1, 16, 1), np.int64)}, ValueError, r"got int64 \[1, 16, 1\]"),
        ({"block": 17}, ValueError, "got block=17"),
        ({"q_offset": 0.5}, TypeError, "q_offset must be an int"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"codes": sparse.eye_array(4, dtype=bool), "seq_len": 64, "block": 16}
    with pytest.raises(kind, match=message):
        BlockMask.from_scipy(**(good | change))


def test_a_mask_of_one_run_a_row_comes_back_as_runs() -> None:
    mask = P.causal().compile(4096, block=16)
    assert len(BlockMask.from_scipy(mask.to_scipy(), 4096, 16, mask.tiles).runs) == len(mask.runs) == 2 * 256 - 1


def test_the_former_name_of_codes_works_and_warns() -> None:
    matrix = sparse.eye_array(4, dtype=bool)
    with pytest.warns(DeprecationWarning, match="from_scipy: letters= is now codes=") as met:
        mask = BlockMask.from_scipy(letters=matrix, seq_len=64, block=16)  # type: ignore[call-arg]
    assert met[0].filename == __file__
    assert mask == BlockMask.from_scipy(codes=matrix, seq_len=64, block=16)
    with pytest.raises(TypeError, match="codes and letters, its former name, are both given"):
        BlockMask.from_scipy(codes=matrix, letters=matrix, seq_len=64, block=16)  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="Runs.letter is now Runs.code"):
        assert mask.runs.letter is mask.runs.code
