"""Tiles in the order in which threads hold scores: where each bit goes, and that they are made once."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from sparseflash.kernels.triton import tiles as triton_tiles
from sparseflash.kernels.triton.tiles import fragments, ordered
from tests.laws.kernels.oracle_tables import build


def tiles(BQ: int, BK: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Tiles in the natural order, and their bits [T, BQ, BK]."""
    dense = np.random.default_rng(BQ + BK).random((count, BQ, BK)) < 0.5
    dense[0] = True  # and so is the sign bit of every word
    mask = dense.transpose(1, 0, 2).reshape(1, BQ, count * BK)
    table = build(mask, (BQ, BK), [[0]], all_partial=True)
    return table.tiles.bits, dense


@pytest.mark.parametrize(("BQ", "BK"), [(16, 16), (16, 128), (64, 32), (128, 128), (32, 256), (256, 64)])
def test_every_bit_is_where_a_thread_looks_for_it(BQ: int, BK: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "_TILES_AT_ONCE", 2)
    bits, dense = tiles(BQ, BK, 3)
    words = fragments(bits, BK)
    assert words.shape == (3, BQ, 4 * -(-BK // 128))
    c = np.arange(BK)
    word, bit = c // 128 * 4 + c % 8 // 2, c % 128 // 8 * 2 + c % 2
    assert np.array_equal(words.numpy()[..., word] >> bit & 1, dense)
    total = np.bitwise_count(words.numpy().view(np.uint32)).sum()
    assert total == dense.sum(), "nothing beside the tile's bits is set"


def test_they_are_made_once_and_go_with_the_table() -> None:
    bits, _ = tiles(16, 32, 2)
    with torch.inference_mode():
        made, in_fragments = ordered(bits, 32, torch.float16)
    assert in_fragments
    assert ordered(bits, 32, torch.float16)[0] is made
    assert not made.is_inference(), "a table first used while evaluating serves a later backward pass"
    gc.collect()  # what other tests left behind
    held = len(triton_tiles._known)
    del bits
    gc.collect()
    assert len(triton_tiles._known) == held - 1


def test_other_architectures_read_the_table_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tiles, "family", lambda _: "sm_80")
    bits, _ = tiles(16, 32, 2)
    assert ordered(bits, 32, torch.float16)[0] is bits
    assert not ordered(bits, 32, torch.float16)[1]


def test_single_precision_reads_the_table_as_it_is() -> None:
    bits, _ = tiles(16, 32, 2)
    assert ordered(bits, 32, torch.float32)[0] is bits
