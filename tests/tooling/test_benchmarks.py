"""The benchmarks run, and the page says what the result files say."""

from __future__ import annotations

import json
import re
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compile_time, cpu, grid_attention, grids, numerics, numerics_page, report
from benchmarks.masks import CPU_MASKS, MASKS
from sparseflash import patterns as P
from sparseflash import reference


def test_the_pages_and_their_plots_are_generated_from_the_results() -> None:
    assert report.outdated() == [], "run python -m benchmarks.report"


def test_the_pages_can_be_read() -> None:
    for name, text in report.pages().items():
        heads = re.findall(r"^\|.*\|\n\|(?:-+:?\|)+$", text, re.MULTILINE)
        assert all(head.splitlines()[1].count("|") - 1 <= 8 for head in heads), f"{name}: eight columns at most"
        assert text.count("<picture>") == 1, f"{name}: one plot"
        titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
        assert len(set(titles)) == len(titles), name
        for debris in ("FAILED", "[100%]", "SKIPPED", "-- Docs:"):
            assert debris not in text, f"{name}: {debris}"
    index = report.pages()[report.INDEX]
    assert len(index.splitlines()) < 60
    assert index.count("|---") == 4, "one short table"


def test_what_is_left_over_is_noticed(tmp_path: Path) -> None:
    machine = {"part": "cpu", "device": "Some CPU", "cores": 1, "threads": 1, "date": "2026-01-02 00:00 UTC"}
    row = {"expression": "local(8)", "seq_len": 64, "heads": 1, "head_dim": 16, "dtype": "float32", "density": 0.5}
    times = {f"{who}_{which}_ms": 2.0 for who in ("ours", "sdpa") for which in ("fwd", "fwd_bwd")}
    for day in ("2026-01-01", "2026-01-02"):
        path = tmp_path / "results" / "some-cpu" / f"{day}-cpu.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**machine, "date": f"{day} 00:00 UTC", "command": day, "rows": [row | times]}))
    (tmp_path / "gone.md").write_text(report.MARK)
    written = report.pages(tmp_path / "results")
    assert set(written) == {"README.md", "some-cpu.md"}
    assert "gone.md" in report.outdated(tmp_path / "results", tmp_path)
    newer, older = written["some-cpu.md"].split("<summary>Older: 2026-01-01</summary>")
    assert "`2026-01-02`" in newer
    assert "`2026-01-01`" in older


def test_the_page_of_errors_is_generated_from_the_results() -> None:
    assert numerics_page.PAGE.read_text() == numerics_page.page(), "run python -m benchmarks.numerics_page"


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("changes", [{}, {"spread": 10.0}, {"spread": 10.0, "softcap": 2.0}], ids=str)
def test_errors_against_float64_are_those_of_rounding(dtype: str, changes: dict[str, float]) -> None:
    row = numerics.measure(numerics.Setting("", dtype, 256, **changes), "cpu")
    other = "eager" if "softcap" in changes else "sdpa"
    for name in numerics.NAMES:
        assert 0 < row[f"ours_{name}"] < 50 * torch.finfo(numerics.DTYPES[dtype]).eps
        assert row[f"ours_{name}"] < 2 * row[f"{other}_{name}"] or dtype == "fp32"


def test_the_truth_of_the_page_of_errors_is_dense_attention() -> None:
    setting = numerics.Setting("", "fp32", 64, 3.0, 4.0)
    q, k, v, dout = (x.double() for x in numerics.operands(setting, "cpu"))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = reference.attention(*leaves, scale=setting.scale, softcap=setting.softcap)
    expected = [out, *torch.autograd.grad(out, leaves, dout)]
    for got, want in zip(numerics.truth(setting, q, k, v, dout), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_result_that_is_not_finite_is_told() -> None:
    row = numerics.measure(numerics.Setting("", "fp32", 64, 1e38), "cpu")
    assert row["sdpa_out"] is None  # its scores overflow
    assert numerics_page._shown(None) == "—"


# Bars on one core; CPU time is asked for, since other work may share the core.
BARS = [
    ("causal() & (local(1024) | butterfly(unit=128) | global_tokens(64))", 1 << 20, 0.25, 300),
    ("documents(random, near 1000)", 1 << 20, 2.0, 300),
    ("documents(random, near 1000)", 1 << 16, 0.030, 300),
    ("neighborhood((s, s), 8, 'morton')", 1 << 20, 0.5, 300),
    ("full()", 1 << 24, 0.1, 300),
]


@pytest.mark.alone
@pytest.mark.parametrize(("name", "tokens", "seconds", "megabytes"), BARS)
def test_compiling_stays_under_its_bars(name: str, tokens: int, seconds: float, megabytes: float) -> None:
    pattern = MASKS[name].pattern(tokens)
    spent = []
    for _ in range(4):
        begun = time.process_time()
        compile_time.build(pattern, tokens)
        spent.append(time.process_time() - begun)
    assert min(spent) < seconds
    tracemalloc.start()
    compile_time.build(pattern, tokens)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < megabytes * 1e6


@pytest.mark.alone
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(
    ("pattern", "tokens", "seconds"),
    [
        (P.neighborhood((21, 45, 80), kernel_size=(7, 21, 27)), 75_600, 2.0),
        (P.neighborhood((33, 45, 80), kernel_size=(7, 21, 27)), 118_800, 3.0),
        (P.radial(33, 3600, decay=0.2), 118_800, 1.2),
        (P.from_blocks(np.tri(21, dtype=bool), unit=1560), 32_760, 0.2),
    ],
    ids=["Wan 720p", "HunyuanVideo 720p", "radial, HunyuanVideo 720p", "frames causal in time"],
)
def test_videos_compile_under_their_bars(pattern: P.Pattern, tokens: int, seconds: float, block: int) -> None:
    row = grids.measure("", (tokens,), pattern, block)
    assert row["compile_ms"] < 1e3 * seconds
    assert row["stored_over_allowed"] < 3.5


def test_the_shapes_of_models_have_patterns_that_fit_them() -> None:
    for name, shape, pattern in grids.cases():
        last = int(np.prod(shape)) - 1
        assert pattern.allows(np.array([last]), np.array([last])).all(), name


def test_attention_over_grids_is_measured_beside_all_queries_of_sdpa() -> None:
    for name, shape, patterns in grid_attention.cases():
        assert all(pattern.known_size == int(np.prod(shape)) for pattern in patterns), name
        assert len(set(patterns)) == len(patterns), name
    pattern = P.neighborhood((64, 64), kernel_size=9)
    (row,) = grid_attention.measure("small", (64, 64), [pattern], "float32", runs=3)
    assert row["grid"] == "small: 64 x 64, 4,096 tokens, float32"
    assert row["density"] == pattern.compile(4096).density
    assert row["sdpa_queries"] == 2048
    assert row["over_sdpa"] == row["sdpa_fwd_ms"] / row["ours_fwd_ms"] > 1
    assert row["of_ideal_fwd"] == row["over_sdpa"] * row["density"]


def test_flex_attention_s_mods_mean_the_patterns() -> None:
    q, k = torch.arange(1024)[:, None], torch.arange(1024)[None, :]
    for name, mask in MASKS.items():
        if mask.mod is not None:
            theirs = mask.mod(1024)(0, 0, q, k).expand(1024, 1024).numpy()
            np.testing.assert_array_equal(mask.pattern(1024).compile(1024).to_dense(), theirs, err_msg=name)


def test_compile_time_is_measured_beside_create_block_mask() -> None:
    row = compile_time.measure("butterfly(unit=128)", 1024)
    assert row["blocks"] == 32
    assert row["compile_ms"] > 0
    mod = MASKS["butterfly(unit=128)"].mod
    assert mod is not None
    assert compile_time.measure_flex(mod(1024), 1024)["flex_ms"] > 0


def test_cpu_masks_mean_the_same_for_flex_attention() -> None:
    q, k = torch.arange(1024)[:, None], torch.arange(1024)[None, :]
    for name, mask in CPU_MASKS.items():
        if mask.mod is not None:
            theirs = mask.mod(1024)(0, 0, q, k).expand(1024, 1024).numpy()
            np.testing.assert_array_equal(mask.pattern(1024).compile(1024).to_dense(), theirs, err_msg=name)


def test_cpu_attention_is_measured_beside_sdpa_and_pays() -> None:
    setting = cpu.Setting(1024, heads=2)
    threads = torch.get_num_threads()
    try:
        # Two threads that share their cores with other work wait for each other at the end of every product.
        torch.set_num_threads(1)
        rows = cpu.measure(setting, CPU_MASKS, runs=2, with_flex=False, progress=lambda what: None)
    finally:
        torch.set_num_threads(threads)
    assert [row["expression"] for row in rows] == list(CPU_MASKS)
    for row in rows:
        # A wide margin: at 1,024 tokens a call is short, and other work may share the cores.
        assert row["of_ideal_fwd"] > 0.05, row["expression"]
        assert row["of_ideal_fwd_bwd"] > 0.05, row["expression"]
    memory = cpu.measure_memory(setting, {"causal()": CPU_MASKS["causal()"]})
    assert memory[0]["extra_fwd_mb"] < 500
