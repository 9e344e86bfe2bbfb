"""The description of a mask that the commands share."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sparseflash as sf
from sparseflash.cli.mask_summary import BINS, MaskSummary, histogram
from sparseflash.cli.masks import mask_lines
from sparseflash.train import recipe


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_bins_follow_each_other_and_hold_every_row_once(counts: list[int]) -> None:
    bins = histogram(np.array(counts))
    assert 1 <= len(bins) <= BINS
    assert (bins[0].low, bins[-1].high) == (min(counts), max(counts))
    assert all(b.low == a.high + 1 for a, b in itertools.pairwise(bins))
    for each in bins:
        assert each.low <= each.high
        assert each.rows == sum(each.low <= count <= each.high for count in counts)


def test_the_table_shows_what_the_summary_says(tmp_path: Path) -> None:
    pattern = sf.parse("per_head(causal(), local(64) | global_tokens(3))")
    summary = MaskSummary.of(pattern, pattern.compile(4096, block=64), 0.5)
    out = io.StringIO()
    summary.print(Console(file=out, width=200), picture=Path("a[b].png"))
    text = out.getvalue()
    for words in ("2 distinct masks", "row 63 of mask 0: 64", "500.0 ms", "a[b].png", str(pattern)):
        assert words in text
    assert str(tuple(summary.to_dict()["grid"])) == "(64, 64)"
    assert set(summary.to_dict()) == {field.name for field in dataclasses.fields(summary)}


def test_files_are_named_whole_and_brackets_are_no_markup() -> None:
    pattern = sf.parse("causal()")
    out = io.StringIO()
    path = Path("a" * 60) / "[bold]folder" / "mask[1].png"
    MaskSummary.of(pattern, pattern.compile(256), 0.0).print(Console(file=out, width=40), picture=path)
    assert str(path) in out.getvalue()


def test_every_distinct_mask_of_a_model_gets_a_line() -> None:
    model = recipe("text", layers=3, pattern="local(8)").model
    one, *none = mask_lines(model, 256)
    assert (one, none) == ("mask: local(8): 256 x 256 tokens in blocks of 128 x 128, density 100.000%", [])
    mixed = dataclasses.replace(model, pattern=("local(8)", "full()", "local(8)"))
    assert [line.split(":")[0] for line in mask_lines(mixed, 256)] == ["mask of layers 1, 3", "mask of layer 2"]


def test_tokens_that_depend_on_the_image_have_no_density() -> None:
    model = recipe("path256", preset="path256-cpu").model
    (line,) = mask_lines(model, 64)
    assert line == "mask: neighborhood((64, 64), 16, order='morton'), over the lit pixels: a table for each batch"
    with pytest.raises(ValueError, match="not a whole number of blocks of 32"):
        mask_lines(model, 50)
    (dense,) = mask_lines(model, 64, "all")
    assert "4,096 x 4,096 tokens in blocks of 32 x 32" in dense
