"""The pieces of the GPU harness: rounds, files that grow, floors, sampled truth, profiles, targets, curves."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings

import sparseflash as sf
from benchmarks import report
from benchmarks.gpu import check, contenders, long, page, peers, plots, profile, small, targets
from benchmarks.gpu import work as work_of
from benchmarks.gpu.contenders import ours
from benchmarks.gpu.correctness import disagreement, drawn_rows, rows_of
from benchmarks.gpu.machine import Machine, cpu
from benchmarks.gpu.parallel import processes
from benchmarks.gpu.settings import COMMON, Setting, random_name
from benchmarks.masks import DENSITIES, GPU_MASKS
from benchmarks.record import Growing
from sparseflash import patterns as P
from sparseflash.tools.timing import time_interleaved, wall
from tests.strategies import compiled_for

CPU = torch.device("cpu")


def test_rounds_take_turns_and_go_through_the_operands() -> None:
    called: list[str] = []
    ticks = iter(range(100))

    def clock(call: Any) -> float:
        call()
        return float(next(ticks))

    def broken() -> None:
        raise ValueError("no\nmore")

    calls: dict[str, Any] = {
        "a": [lambda: called.append("a0"), lambda: called.append("a1")],
        "b": lambda: called.append("b"),
        "c": broken,
    }
    found = time_interleaved(calls, 3, clock, may_fail=lambda key: key == "c")
    assert called == ["a0", "a1", "b", "a1", "b", "a0", "b", "a1", "b"], "a warm-up of everything, then turns"
    assert found.times == {"a": [2.0, 4.0, 6.0], "b": [3.0, 5.0, 7.0]}
    assert found.first == {"a": 0.0, "b": 1.0}
    assert found.failed == {"c": "ValueError: no"}
    with pytest.raises(ValueError, match="no"):
        time_interleaved({"c": broken}, 1)
    assert len(time_interleaved({"a": lambda: None}, 50, wall, seconds=0).times["a"]) == 3, "a median needs three"


def test_a_file_that_grows_knows_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "part.json"
    results = Growing("part", path)
    asked: list[dict[str, Any]] = [{"n": 1}, {"n": 2, "of": None}]
    measured: list[Any] = []

    def measure(row: Any, left: float) -> dict[str, Any]:
        measured.append(row["n"])
        return {"ms": 10 * row["n"]}

    assert results.go_on(asked, measure, 60, lambda line: None)
    again = Growing("part", path)
    assert again.find({"n": 2, "of": None}) == {"n": 2, "of": None, "ms": 20, "source": again.source}
    assert again.go_on([*asked, {"n": 3}], measure, 60, lambda line: None)
    assert measured == [1, 2, 3]
    # Other kernels: every row is measured again, in the place of the old one.
    monkeypatch.setattr("benchmarks.record.source", lambda skip: "other")
    assert Growing("part", path).go_on(asked, measure, 60, lambda line: None)
    assert measured == [1, 2, 3, 1, 2]
    assert sorted(row["n"] for row in json.loads(path.read_text())["rows"]) == [1, 2, 3]
    assert not list(tmp_path.glob("*.part"))


def test_a_digest_of_the_kernels_leaves_out_what_no_gpu_runs(tmp_path: Path) -> None:
    from benchmarks.record import source

    (tmp_path / "forward.py").write_text("a")
    first = source(folder=tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "plan.py").write_text("b")
    assert source(folder=tmp_path) == first
    (tmp_path / "launch.py").write_text("c")
    second = source(folder=tmp_path)
    assert second != first
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "walk.py").write_text("d")
    assert source(folder=tmp_path) not in (first, second)
    (tmp_path / "triton" / "walk.py").unlink()
    assert source(("cpu/*.py", "launch.py"), tmp_path) == first


def test_operands_pass_the_cache() -> None:
    machine = Machine(CPU, wall, cache=60 << 20)
    assert [machine.sets(n << 20) for n in (1, 50, 119, 120, 500)] == [16, 3, 2, 1, 1]


def test_floors_follow_from_counts() -> None:
    rates = work_of.Rates(matrix=800e12, exponentials=4e12, bytes=4e12)
    # 16 heads, 16,384 tokens, all pairs: at head dim 128 products, at 32 exponentials.
    pairs = 16384.0**2
    seconds, bound = work_of.attention_work("fwd", pairs, 1, 16, 16, 16384, 128, 2).floor(rates)
    assert bound == "matrix"
    assert seconds == pytest.approx(4 * 128 * pairs * 16 / 800e12)
    assert work_of.attention_work("fwd", pairs, 1, 16, 16, 16384, 32, 2).floor(rates)[1] == "exponentials"
    forward, backward = (work_of.attention_work(w, pairs, 1, 16, 2, 16384, 128, 2) for w in work_of.PASSES)
    assert backward.operations == 2.5 * forward.operations
    # One query block of keys each: what is read and written is what counts.
    few = work_of.attention_work("bwd", 16384.0, 1, 16, 2, 16384, 128, 2)
    assert few.floor(rates)[1] == "bytes"
    assert few.bytes == 2 * 16384 * 128 * (2 * (16 + 4) + 2 * 16) + 4 * 16 * 16384


def test_the_io_model_is_the_paper_s() -> None:
    assert work_of.io_elements(1024, 64, 1.0, 1024 * 64) == 1024 * 64 + 1024 * 64, "all on chip: operands alone"
    n = [2.0**i for i in range(12, 18)]
    assert work_of.exponent(n, [work_of.dense_io_elements(int(x), 64) for x in n]) == pytest.approx(2, abs=0.02)
    assert work_of.exponent(n, [work_of.io_elements(int(x), 64, 1.0, 1e4) for x in n]) == pytest.approx(2, abs=0.05)
    assert work_of.exponent(n, [3 * x**1.5 for x in n]) == pytest.approx(1.5)
    assert work_of.exponent([5.0, 5.0], [1.0, 2.0]) is None


def test_useful_pairs_are_those_of_the_token_mask() -> None:
    mask = GPU_MASKS["bigbird()"].pattern(1024).compile(1024, block=128)
    assert mask.token_density * 1024**2 == pytest.approx(np.count_nonzero(mask.to_dense()))


@pytest.mark.parametrize("name", GPU_MASKS)
def test_sampled_truth_and_flex_attention_s_mods_mean_the_patterns(name: str) -> None:
    pattern = GPU_MASKS[name].pattern(1024)
    dense = pattern.compile(1024).to_dense()
    rows = drawn_rows(1024, 40)
    assert len(rows) == 40
    assert {0, 1023} <= set(rows.tolist())
    np.testing.assert_array_equal(rows_of(pattern, rows, 1024).numpy(), dense[rows.numpy()])
    make = GPU_MASKS[name].mod
    assert make is not None
    theirs = make(1024)(0, 0, torch.arange(1024)[:, None], torch.arange(1024)).expand(1024, 1024)
    np.testing.assert_array_equal(theirs.numpy(), dense)


def operands(group: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, dout = torch.randn(2, 1, 2 * group, 300, 16, generator=generator).unbind(0)
    k, v = torch.randn(2, 1, 2, 300, 16, generator=generator).unbind(0)
    return q, k, v, dout


def test_sampled_truth_finds_what_is_wrong() -> None:
    pattern = P.causal() & P.local(100)
    rows = drawn_rows(300, 60)
    token_mask = rows_of(pattern, rows, 300)
    right = ours(pattern.compile(300, block=32), CPU)
    assert disagreement(right, *operands(), rows, token_mask) is None

    def found(change: Any) -> str:
        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return change(*right(q, k, v), q, k, v)

        wrong = disagreement(attend, *operands(), rows, token_mask)
        assert wrong is not None
        return wrong

    assert found(lambda out, lse, q, k, v: (out * 1.001, lse)).startswith("out: error")
    assert found(lambda out, lse, q, k, v: (out, lse + 0.01)).startswith("lse: error")
    assert found(lambda out, lse, q, k, v: (out + 0 * q.sum() * float("nan"), lse)).startswith("out: error nan")
    assert found(lambda out, lse, q, k, v: (out.detach() + (out - out.detach()) * 1.01, lse)).startswith("dq: error")
    extra = found(lambda out, lse, q, k, v: (out + (v - v.detach()).repeat_interleave(2, 1), lse))
    assert extra.startswith("dv: error"), "its values are right, its gradients are not"
    elsewhere = next(row for row in range(300) if row not in rows)

    def misplaced(out: torch.Tensor, lse: torch.Tensor, q: torch.Tensor, *_: torch.Tensor) -> Any:
        nothing = (q - q.detach())[:, :, elsewhere]  # but its gradient
        return out + nothing[:, :, None] * (torch.arange(300) == 0)[:, None], lse

    assert found(misplaced) == "dq: a query without a cotangent has a gradient"
    assert found(lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))) == "RuntimeError: boom"
    # A window that is one key too long: one of 101 keys differs.
    near = ours((P.causal() & P.local(101)).compile(300, block=32), CPU)
    assert disagreement(near, *operands(), rows, token_mask) is not None
    # An attention that returns no lse is held to the rest.
    assert disagreement(lambda q, k, v: right(q, k, v)[0], *operands(), rows, token_mask) is None


def test_long_sequences_are_checked_by_their_sampled_queries(capsys: pytest.CaptureFixture[str]) -> None:
    case = long.Long("short", P.causal() & P.local(40), 700, 2, 1, 16)
    assert long.main(cpu(), (case,), torch.float32) == 0
    assert "1 of 1 cases agree" in capsys.readouterr().out
    assert max(case.elements for case in long.CASES) > 1 << 31
    assert max(case.seq_len for case in long.CASES) == 1 << 20


def test_the_small_sweep_makes_its_calls() -> None:
    assert small.sweep(CPU, head_dims=(16,), blocks=(32,)) == 9


def text_of(results: Path) -> str:
    """All pages of figures of these results."""
    return "\n".join(report.pages(results).values())


def test_steps_of_the_check_pass_fail_or_are_left_out(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    slow = "import sys, time; print('so far', flush=True); time.sleep(60)"
    todo = (
        check.Step("good", ("-c", f"open({str(taken)!r}, 'a').write('x'); print('1 passed')")),
        check.Step("bad", ("-c", "print('Falsifying example: 3'); raise SystemExit(1)")),
        check.Step("slow", ("-c", slow)),
        check.Step("tool", ("-c", ""), ("no-such-tool",)),
        check.Step("told", ("-c", "import os; raise SystemExit(os.environ['WHAT'] != 'this')"), (), {"WHAT": "this"}),
    )
    path, said = tmp_path / "h200" / "2026-01-01-check.json", list[str]()
    assert not check.run(60, path, lambda: iter(todo), longest=3, say=said.append)
    rows = {row["step"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: check.verdict(row) for name, row in rows.items()} == {
        "good": "passed (1 test)", "bad": "failed (exit status 1)", "slow": "not finished in 3 s",
        "tool": "not run (no-such-tool is not on the PATH)", "told": "passed",
    }  # fmt: skip
    assert "    Falsifying example: 3" in "\n".join(said)
    assert rows["slow"]["said"] == ["so far"]
    assert "FAILED: bad, slow" in said[-1]
    check.run(60, path, lambda: iter(todo), longest=3, say=said.append)
    assert taken.read_text() == "x", "a step that was taken is not taken again"
    at_once = tmp_path / "at-once" / "2026-01-01-check.json"
    assert not check.run(60, at_once, lambda: iter(todo), longest=3, say=said.append, at_once=5)
    again = {row["step"]: row for row in json.loads(at_once.read_text())["rows"]}
    assert again == rows
    assert "exit status 1" in text_of(tmp_path)


def test_steps_name_tests_that_are_there() -> None:
    from benchmarks.record import ROOT

    for step in check.steps():
        assert step.command[0] == "-m"
        name = step.command[1]
        module = ROOT / (name.replace(".", "/") + ".py") if name != "pytest" else ROOT / step.command[-1]
        assert module.exists(), step


def test_masks_are_made_beside_create_block_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "MASKS", ("causal()",))
    monkeypatch.setattr(peers, "WAYS", ("ours", "create_block_mask"))
    monkeypatch.setitem(peers.MOST_PAIRS, "create_block_mask", 600**2)
    path = tmp_path / "h200" / "2026-01-01-peers.json"
    assert peers.run(cpu(), 60, path, (512, 1024), lambda line: None)
    rows = json.loads(path.read_text())["rows"]
    assert [(row["seq_len"], row["way"], "ms" in row) for row in rows] == [
        (512, "ours", True), (512, "create_block_mask", True), (1024, "ours", True), (1024, "create_block_mask", False),
    ]  # fmt: skip
    assert "| `causal()` | 1,024 | create_block_mask |" in text_of(tmp_path)


# Written by hand after the columns that ncu's manual names.
PROFILE = """==PROF== Connected to process 12
a line of the program
"ID","Process ID","Kernel Name","Context","Stream","Metric Name","Metric Unit","Metric Value"
"0","12","forward_kernel","1","7","dram__bytes_read.sum","byte","1,000"
"0","12","forward_kernel","1","7","dram__bytes_write.sum","byte","24"
"0","12","forward_kernel","1","7","gpu__time_duration.sum","ns","50"
"0","12","forward_kernel","1","7","sm__issue_active.avg.pct_of_peak_sustained_active","%","61.5"
"1","12","void at::native::vectorized_elementwise_kernel<4>(int)","1","7","dram__bytes_read.sum","byte","9"
"2","12","keys_kernel","1","7","dram__bytes_read.sum","byte","3,000"
"3","12","prepare_kernel","1","7","dram__bytes_read.sum","byte","10"
"""


def test_a_profile_is_read() -> None:
    found = profile.read(PROFILE)
    assert found == {"bytes_fwd": 1024.0, "bytes_bwd": 3010.0, "shares": {"forward_kernel": {"issue": 61.5}}}
    assert profile.read("==ERROR== no counters") == {}


def test_what_is_profiled_runs() -> None:
    profile.once(Setting("causal()", 256, 16, 32, dtype="float32", heads=1, batch=1), cpu())


def made_up(rate: float) -> list[dict[str, Any]]:
    """Rows as a fast card might give them: the same rate everywhere, 2 x 10^12 bytes a second decoding."""
    rows: list[dict[str, Any]] = [{"kind": "rates", "matrix": 8e14, "exponentials": 4e12, "bytes": 4e12}]
    settings = [
        *(Setting(mask, n, d) for mask in ("full()", "causal()") for n in (1 << 14, 1 << 16) for d in (128, 64)),
        *(Setting(random_name(density, 128)) for density in DENSITIES),
        Setting(random_name(0.1, 64), block=64),
        *(Setting(COMMON, n) for n in (1 << 12, 1 << 14, 1 << 16)),
    ]
    for setting in settings:
        mask = GPU_MASKS[setting.mask].pattern(setting.seq_len).compile(setting.seq_len, block=setting.block)
        batch, heads, kv_heads = setting.shape
        row = setting.asked() | {"shape": [batch, heads, kv_heads], "density": mask.density, "left_out": {}}
        for which, factor in (("fwd", 4), ("bwd", 10)):
            ms = factor * setting.head_dim * mask.token_density * setting.seq_len**2 * batch * heads / rate / 1e9
            row |= {f"ours_{which}_ms": ms, f"ours_{which}_ms_spread": 0.0, f"noise_{which}": 0.0}
            row |= {f"tflops_{which}": rate, f"share_{which}": rate / 800, f"bound_{which}": "matrix"}
            row |= {f"over_flex_{which}": 1.5, f"peak_{which}_mb": setting.seq_len * 1e-3 * batch * heads}
        rows.append(row)
        if setting.mask.startswith("random"):
            traffic = {"bytes_fwd": 1e9 * mask.density, "bytes_bwd": 3e9 * mask.density}
            rows.append(setting.asked() | {"kind": "traffic"} | traffic)
    rows.append({"kind": "decode", "density": 0.05, "share": 0.5})
    return [{**row, "source": "made up"} for row in rows]


def test_targets_are_met_or_not() -> None:
    verdicts = {target.what: target.verdict(made_up(500.0))[1] for target in targets.TARGETS}
    assert verdicts["dense and causal forward, 16K and 64K"] == "not met in 4 of 4"
    assert verdicts["dense and causal backward, 16K and 64K"] == "met"
    assert verdicts["head dim 64, dense and causal forward"] == "met"
    assert verdicts["blocks of 64 x 64, density 0.1, forward"] == "met"
    assert verdicts["share of own dense rate at density 0.02"] == "met"
    assert verdicts["FlexAttention's time over ours, forward"] == "met"
    assert verdicts["FlexAttention's time over ours, backward"].startswith("not met in")
    assert verdicts["FlashAttention-4's time over ours, both passes"] == "not measured"
    assert verdicts["decoding, 64K cache, 5 % density: share of copy bandwidth"] == "not met in 1 of 1"
    assert {target.verdict([])[1] for target in targets.TARGETS} == {"not measured"}
    failed = [row | {"failed": "out: error"} for row in made_up(900.0)]
    assert {target.verdict(failed)[1] for target in targets.TARGETS} == {"not measured"}


def test_curves_are_fitted_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "h200" / "2026-01-01-kernels.json"
    path.parent.mkdir()
    head: dict[str, Any] = {
        "part": "kernels",
        "date": "2026-01-01",
        "command": "made up",
        "commit": "0",
        "device": "H200",
        "cores": 1,
    }
    head |= {"threads": 1, "torch": "2", "triton": "3", "numpy": "2"}
    result = head | {"rows": made_up(500.0)}
    path.write_text(json.dumps(result))
    by_density, _, traffic, by_length, memory = plots.curves(result["rows"])
    assert memory.exponents()["peak_bwd_mb"] == pytest.approx(1.0)
    assert by_density.x == sorted(by_density.x)
    assert by_density.exponents()["ours_fwd_ms"] == pytest.approx(1.0, abs=0.01), "time goes with the pairs"
    model = by_density.exponents()["IO model"]
    assert model is not None
    assert 0.3 < model < 1, "operands are moved whatever the density"
    assert traffic.exponents()["bytes_fwd"] == pytest.approx(1.0)
    assert by_length.against == "seq_len"
    text = text_of(tmp_path)
    assert "Rates of this card, best of many runs: 800 TFLOP/s" in text
    page.draw(result, path)
    assert "(results/h200/2026-01-01-kernels-curves.png)" in text
    assert (path.parent / "2026-01-01-kernels-curves.png").read_bytes().startswith(b"\x89PNG")
    plot = report.drawings(tmp_path)["h200.svg"]
    assert "H200: up to 500 TFLOP/s" in plot
    assert ">333</text>" in plot, "what FlexAttention reaches, whose time is 1.5 times ours"


def test_without_a_gpu_one_line_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import tune
    from benchmarks.gpu import __main__ as command

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 0
    assert command.main(["check"]) == 0
    assert capsys.readouterr().out == 2 * "make gpu: torch sees no GPU here, nothing to measure\n"
    assert tune.main(["measure"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(SystemExit):
        command.main(["chek"])
    assert "parts are check, kernels, step, peers, got chek" in capsys.readouterr().err


def test_training_steps_are_measured_by_their_module_if_it_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.gpu import __main__ as command

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert command.run_step(10)
    assert capsys.readouterr().out.startswith("step: benchmarks/step.py is not in this checkout")
    ran: list[list[str]] = []

    def run(arguments: list[str], **_: object) -> Any:
        ran.append(arguments)
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("subprocess.run", run)
    assert command.run_step(10)
    assert ran[0][1:] == ["-m", "benchmarks.step", "--seconds", "10"]


def test_flash_attention_4_gets_whole_blocks_or_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with its shapes and tables: [batch, tokens, heads, dim], and counts with indices of full blocks."""

    def flash_attn_func(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False, block_sparse_tensors: Any = None
    ) -> tuple[torch.Tensor, None]:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if block_sparse_tensors is not None:
            assert not block_sparse_tensors.mask_block_cnt.any()
            listed = torch.zeros(q.shape[1] // 64, k.shape[1] // 64, dtype=torch.bool)
            counts = block_sparse_tensors.full_block_cnt[0, 0]
            for row, (count, columns) in enumerate(zip(counts, block_sparse_tensors.full_block_idx[0, 0], strict=True)):
                listed[row, columns[:count].long()] = True
            mask = listed.repeat_interleave(64, 0).repeat_interleave(64, 1)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = sf.reference.attention(q, k, v, mask.tril() if causal else mask)
        assert isinstance(out, torch.Tensor)
        return out.transpose(1, 2), None

    class Tables(NamedTuple):
        mask_block_cnt: torch.Tensor
        mask_block_idx: torch.Tensor
        full_block_cnt: torch.Tensor
        full_block_idx: torch.Tensor

    for name, held in (
        ("flash_attn", {}),
        ("flash_attn.cute", {}),
        ("flash_attn.cute.interface", {"flash_attn_func": flash_attn_func}),
        ("flash_attn.cute.block_sparsity", {"BlockSparseTensorsTorch": Tables}),
    ):
        module = ModuleType(name)
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, name, module)
    q, k, v, dout = (x[:, :, :256] for x in operands())
    rows = drawn_rows(256, 20)
    for pattern in (P.full(), P.causal(), P.random_blocks(2, unit=64)):
        attend = contenders.flash_attention_4(pattern, 256, 64, CPU)
        assert disagreement(attend, q, k, v, dout, rows, rows_of(pattern, rows, 256)) is None
    with pytest.raises(NotImplementedError, match="PARTIAL blocks"):
        contenders.flash_attention_4(P.local(10), 256, 64, CPU)


def test_a_process_that_dies_leaves_its_lot_missing_and_the_next_one_is_measured(tmp_path: Path) -> None:
    results = Growing("check", tmp_path / "check.json")
    asked = [{"name": name} for name in ("dies", "lives", "later")]
    said: list[str] = []
    # The second of a lot may be done before the first one dies, or not.
    assert not results.go_on_abreast(asked, dies_or_lives, 60, processes, 2, said.append)
    assert results.find({"name": "dies"}) is None, "nothing is known of it"
    assert results.find({"name": "later"})
    assert not [row for row in results.rows if "failed" in row]
    assert any("not measured" in line for line in said)


def dies_or_lives(asked: Mapping[str, Any]) -> dict[str, Any]:
    if asked["name"] == "dies":
        os._exit(1)
    return {"lived": True}


def test_compiled_forms_are_few_and_hold_every_choice() -> None:
    choices: dict[str, tuple[Any, ...]] = {
        "dim": (16, 24, 32, 64, 72, 128),
        "dtype": ("fp16", "bf16", "fp32"),
        "on": ((), ("sinks",)),
    }
    few = compiled_for(choices, 6)
    forms: list[dict[str, Any]] = []

    @settings(max_examples=200, database=None)
    @given(few)
    def collect(form: dict[str, Any]) -> None:
        forms.append(form)

    collect()
    assert len({str(form) for form in forms}) == 6
    for name, values in choices.items():
        assert {form[name] for form in forms} == set(values)
    with pytest.raises(ValueError, match="5 forms cannot hold 6 choices"):
        compiled_for(choices, 5)
    assert find(compiled_for(choices, None), lambda form: form["dim"] == 128 and form["dtype"] == "fp32")
