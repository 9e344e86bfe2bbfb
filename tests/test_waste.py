"""Masks whose blocks are nearly empty are pointed out, with what would mend them."""

from __future__ import annotations

import warnings

import pytest

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.advice import WastefulPattern, advice


@pytest.mark.parametrize(
    ("pattern", "mended"),
    [
        (P.strided(7), "strided(7, unit=128)"),
        (P.causal() & P.strided(7), "causal() & strided(7, unit=128)"),
        (~P.per_head(~P.strided(7), ~P.strided(9)), "~per_head(~strided(7, unit=128), ~strided(9, unit=128))"),
        (P.fixed(128, 8), "fixed(16, 1, unit=128)"),
        (P.axial((96, 96)), "axial((96, 96), order='morton')"),
        (P.axial((128, 128)), "axial((128, 128), order='morton')"),
        (
            P.neighborhood((96, 96), kernel_size=(24, 3)),
            "neighborhood((96, 96), kernel_size=(16, 2), order='tile', stride=(16, 2), tile=(16, 2))",
        ),
    ],
    ids=str,
)
def test_the_advice_names_a_pattern_that_stores_less(pattern: Pattern, mended: str) -> None:
    with pytest.warns(WastefulPattern) as caught:
        mask = pattern.compile(9216)
    words = str(caught[0].message)
    assert words == advice(pattern, mask)
    assert caught[0].filename == __file__  # where it was compiled, not inside of the library
    assert f"{mask.density:.1%}" in words
    assert f"{mask.token_density:.2%}" in words
    assert mended in words
    assert P.parse(mended).compile(9216).density < mask.density / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pattern.compile(9216) is mask  # said once


def test_without_a_coarser_form_the_advice_says_what_costs_less() -> None:
    with pytest.warns(WastefulPattern, match="in stretches of a block"):
        P.dilated(1000, 8).compile(8192)


@pytest.mark.parametrize(
    ("pattern", "seq_len"),
    [(P.strided(7), 4096), (P.causal(), 16384), (P.local(1), 16384), (P.strided(7, unit=128), 16384)],
    ids=str,
)
def test_masks_that_use_their_blocks_are_left_alone(pattern: Pattern, seq_len: int) -> None:
    assert advice(pattern, pattern.compile(seq_len)) is None


@pytest.mark.parametrize(
    ("pattern", "mended"),
    [
        (P.neighborhood((128, 128), 8), "neighborhood((128, 128), 8, order='morton')"),
        (
            P.neighborhood((8, 32, 40), kernel_size=(5, 9, 17)),
            "neighborhood((8, 32, 40), kernel_size=(4, 12, 24), order='tile', stride=(4, 4, 8), tile=(4, 4, 8))",
        ),
    ],
    ids=str,
)
def test_whoever_asks_is_told_of_the_order_the_tile_and_the_stride(pattern: Pattern, mended: str) -> None:
    tokens = 16384 if "128" in mended else 10240
    mask = pattern.compile(tokens)
    assert advice(pattern, mask) is None
    words = advice(pattern, mask, asked=True)
    assert words is not None
    assert f"{mended} would store" in words
    assert P.parse(mended).compile(tokens).density < mask.density / 2


def test_windows_of_whole_tiles_need_no_advice() -> None:
    pattern = P.neighborhood((8, 32, 40), kernel_size=(2, 12, 24), order="tile", stride=(2, 4, 8), tile=(2, 4, 8))
    mask = pattern.compile(10240, block=64)
    assert mask.nnz == mask.full_blocks
    assert advice(pattern, mask, asked=True) is None
    assert pattern.coarser(64) == pattern
