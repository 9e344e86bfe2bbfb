"""The benchmarks run, and the page says what the result files say."""

from __future__ import annotations

import time

import torch

from benchmarks import compile_time, cpu, report


def test_the_page_is_generated_from_the_results() -> None:
    assert report.PAGE.read_text() == report.page(), "run python -m benchmarks.report"


def test_compile_time_measures_the_bar_of_a_million_tokens() -> None:
    """0.5 s on one core and 300 MB are the bars. CPU time is asked for: other work may share the core."""
    expression = "causal() & (local(1024) | butterfly(unit=128))"
    seconds = []
    for _ in range(3):
        begun = time.process_time()
        compile_time.build(expression, 1 << 20)
        seconds.append(time.process_time() - begun)
    assert min(seconds) < 0.5
    row = compile_time.measure(expression, 1 << 20)
    assert row["blocks"] == 110_556
    assert row["peak_mb"] < 300


def test_cpu_attention_is_measured_beside_sdpa() -> None:
    row = cpu.measure("local(64) | butterfly(unit=128)", 1024, torch.float32, runs=1)
    assert row["density"] < 1
    assert min(row[f"{who}_{part}_ms"] for who in ("ours", "sdpa") for part in ("fwd", "fwd_bwd")) > 0
