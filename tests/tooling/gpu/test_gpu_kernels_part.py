"""Part "kernels" whole, on a CPU: rows, refusals, resumption, and the page that is made of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report
from benchmarks.gpu import decode, kernels, profile
from benchmarks.gpu.contenders import Attend, _sdpa
from benchmarks.gpu.machine import cpu
from benchmarks.gpu.settings import Setting
from benchmarks.masks import Mask
from sparseflash.patterns import Pattern

TINY: dict[str, Any] = {"head_dim": 16, "dtype": "float32", "batch": 1}
SETTINGS = (
    Setting("full()", 256, block=64, heads=2, **TINY),
    Setting("bigbird()", 1024, block=128, group=2, heads=2, **TINY),
)
SIZES = {"side": 64, "elements": 1 << 10, "copied": 1 << 16}


def peers(
    mask: Mask, pattern: Pattern, tokens: int, block: int, device: torch.device, every_form: bool
) -> tuple[dict[str, Attend], dict[str, str]]:
    """Dense SDPA for every mask: right for one of the two."""
    return _sdpa(False, device), {"fa4": "ImportError: not here"}


PROTOCOL = kernels.Protocol(runs=2, seconds=5, rows=6, peers=peers)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little to decode, and a profiler that is not there."""
    row = decode.Decode(512, 0.5, 2, 4, 2, 16, "float32").asked()
    monkeypatch.setattr(decode, "asked", lambda: iter([row]))
    monkeypatch.setattr(profile, "asked", lambda: iter([{**SETTINGS[0].asked(), "kind": "traffic"}]))
    monkeypatch.setattr("shutil.which", lambda name: None)


def go(path: Path, said: list[str], seconds: float = 100, again: bool = False, at_once: int = 1) -> bool:
    return kernels.run(
        cpu(), seconds, path, lambda: iter(SETTINGS), PROTOCOL, said.append, again, sizes=SIZES, at_once=at_once
    )  # fmt: skip


def rows_in(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return found


def test_the_part_measures_everything_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "h200" / "2026-01-01-kernels.json"
    said: list[str] = []
    assert not go(path, said, seconds=0), "no time: no row"
    assert "time is up, 5 of its rows are missing" in said[-1]
    assert not path.exists()
    assert go(path, said)
    rates, dense, sparse, decoded, traffic = sorted(rows_in(path), key=lambda row: _order(row["kind"]))
    assert min(rates["matrix"], rates["exponentials"], rates["bytes"]) > 0
    for row in (dense, sparse):
        for which in ("fwd", "bwd"):
            assert row[f"ours_{which}_ms"] > 0
            assert row[f"runs_{which}"] == 2
            assert row[f"share_{which}"] == pytest.approx(row[f"floor_{which}_ms"] / row[f"ours_{which}_ms"])
    # Useful work: 4 D operations a pair forward, 2.5 times that backward.
    for which, factor in (("fwd", 1.0), ("bwd", 2.5)):
        work = factor * 4 * 16 * 256 * 256 * 2
        assert dense[f"tflops_{which}"] == pytest.approx(work / dense[f"ours_{which}_ms"] / 1e9)
    assert dense["over_sdpa_fwd"] == pytest.approx(dense["sdpa_fwd_ms"] / dense["ours_fwd_ms"])
    assert "sdpa_fwd_ms" not in sparse, "dense SDPA does not compute a sparse mask: it has no figures beside one"
    assert "error" in sparse["left_out"]["sdpa"]
    assert sparse["left_out"]["fa4"] == "ImportError: not here"
    assert decoded["bytes"] == 2 * 2 * 2 * 256 * 16 * 4, "k and v of half the cache, 2 samples, 2 key heads"
    assert "ncu is not on the PATH" in traffic["left_out"]

    before = path.read_bytes()
    assert go(path, said)
    assert path.read_bytes() == before, "nothing was missing"

    text = "\n".join(report.pages(tmp_path).values())
    assert "timed on a GPU yet" not in text
    assert "### Forward" in text
    assert "### Decoding" in text
    assert text.count("not measured |") > 5, "targets speak of other settings"
    assert "ncu is not on the PATH" in text
    assert "| 256 tokens, D 16, block 64 |" in text


def test_rows_that_are_prepared_side_by_side_are_the_same_rows(tmp_path: Path) -> None:
    one_by_one, abreast = tmp_path / "one-kernels.json", tmp_path / "two-kernels.json"
    said: list[str] = []
    assert go(one_by_one, said)
    assert go(abreast, said, at_once=2)

    def fields(path: Path) -> set[tuple[str, ...]]:
        return {tuple(row) for row in rows_in(path)}

    assert fields(abreast) == fields(one_by_one)
    assert not [row for row in rows_in(abreast) if "failed" in row]
    before = abreast.read_bytes()
    assert go(abreast, said, at_once=2)
    assert abreast.read_bytes() == before, "nothing was missing"


def _order(kind: str) -> int:
    return ("rates", "attention", "decode", "traffic").index(kind)


def test_a_faster_wrong_kernel_is_a_failure_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(mask: object, device: torch.device) -> Attend:
        return lambda q, k, v: ((v + 0 * k).repeat_interleave(q.shape[1] // k.shape[1], 1) + 0 * q, None)

    path = tmp_path / "kernels.json"
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "ours", wrong)
        assert go(path, said)
    attention = [row for row in rows_in(path) if row["kind"] == "attention"]
    assert len(attention) == 2
    for row in attention:
        assert "error" in row["failed"]
        assert not [key for key in row if key.startswith(("ours", "tflops", "share"))]
    assert sum("FAILED, no figures" in line for line in said) == 2
    assert go(path, said)
    assert all("failed" in row for row in rows_in(path) if row["kind"] == "attention"), "rows that are there stay"
    assert go(path, said, again=True)
    assert not [row for row in rows_in(path) if "failed" in row], "--again measures them again"


def test_a_row_that_raises_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: Setting, machine: object, card: object, protocol: object) -> dict[str, Any]:
        raise RuntimeError(f"no memory for {setting.mask}")

    monkeypatch.setattr(kernels, "measure", broken)
    path = tmp_path / "kernels.json"
    assert go(path, [])
    failed = [row["failed"] for row in rows_in(path) if "failed" in row]
    assert failed == [f"RuntimeError: no memory for {setting.mask}" for setting in SETTINGS]
    assert len(rows_in(path)) == 5


def test_a_device_that_is_gone_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "measure", broken)
    monkeypatch.setattr("benchmarks.gpu.machine.Machine.alive", lambda self: False)
    said: list[str] = []
    assert not go(tmp_path / "kernels.json", said)
    assert "the same command goes on behind it" in said[-1]
    assert [row["kind"] for row in rows_in(tmp_path / "kernels.json")] == ["rates", "attention"]


def settings_of_the_issue() -> Iterator[Setting]:
    from benchmarks.gpu.settings import BLOCKS, GROUPS, HEAD_DIMS, LENGTHS, random_name
    from benchmarks.masks import DENSITIES, GPU_MASKS

    for block in BLOCKS:
        masks = [m for m in GPU_MASKS if not m.startswith("random")] + [random_name(d, block) for d in DENSITIES]
        assert len(masks) == 15
        for mask in masks:
            for tokens in LENGTHS:
                for dim in HEAD_DIMS:
                    yield from (Setting(mask, tokens, dim, block, group) for group in GROUPS)


def test_every_setting_that_is_asked_for_has_a_row_and_the_targets_come_first() -> None:
    from benchmarks.gpu.settings import every
    from benchmarks.gpu.targets import TARGETS

    listed = list(every())
    assert len(listed) == len(set(listed))
    assert set(listed) >= set(settings_of_the_issue())
    made_up = {f"{name}_{which}": 1.0 for which in ("fwd", "bwd") for name in ("tflops", "over_flex", "over_fa4")}
    rows = [setting.asked() | made_up for setting in listed[:8]] + [decode.Decode().asked() | {"share": 1.0}]
    for target in TARGETS:
        assert target.verdict(rows)[0], f"{target.what}: none of the first 8 settings measures it"
    assert min(setting.shape[0] * setting.seq_len for setting in listed) >= 16384
