"""The description of a mask that the commands share."""

from __future__ import annotations

import dataclasses
import io
import itertools
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import sparseflash as sf
from sparseflash.cli.mask_summary import BINS, MaskSummary, histogram


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
