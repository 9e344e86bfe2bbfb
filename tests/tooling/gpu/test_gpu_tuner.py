"""The launch tuner: candidates, gates ahead of time, and what is chosen from measurements."""

from __future__ import annotations

import itertools
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.gpu import contenders, gates
from benchmarks.gpu.contenders import Attend
from benchmarks.gpu.gates import GATED_SOURCE, STEPS, asked, candidates, fitting
from benchmarks.gpu.machine import cpu
from benchmarks.gpu.parallel import turns
from benchmarks.gpu.settings import Setting
from benchmarks.record import RESULTS, Growing
from sparseflash.kernels import candidates as candidate_kernels
from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.launch import COMMITTED, FILE, Launch, committed, parsed

KEY = "sm_90", 64, "half"
TABLE = COMMITTED.usual
FORWARD = TABLE[KEY].forward
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles; not for the interpreter")


def other(number: int) -> Launch:
    """A candidate that is not the committed launch."""
    launch = candidates(KEY, "forward")[number]
    assert isinstance(launch, Launch)
    return launch


@pytest.mark.parametrize("kernel", STEPS)
def test_candidates_begin_with_the_committed_launch_and_divide_every_block(kernel: str) -> None:
    for D in tune.HEAD_DIMS:
        found = candidates(key := ("sm_90", D, "half"), kernel)
        assert len(found) == len(set(found)) > 30
        if kernel not in gates.CANDIDATES:
            assert found[0] == getattr(TABLE[key], kernel)
        for launch, block in itertools.product(found, (16, 32, 64, 128, 256)):
            if isinstance(launch, GluonLaunch):
                assert 16 * launch.warps == launch.BM
                continue
            step = launch.within((block, block))
            assert block % step.BM == block % step.BN == 0
        if kernel != "gluon":
            like = TABLE[key].keys if kernel == "one_pass" else found[0]
            unlike = [sum(a != b for a, b in zip(launch, like, strict=True)) for launch in found]
            assert unlike == sorted(unlike)


def test_every_form_of_a_launch_is_tried() -> None:
    for kernel in ("forward", "keys", "queries", "one_pass"):
        assert {gates.form_of(launch) for launch in candidates(KEY, kernel)} == {"plain", "tma"}
    gluon = [launch for launch in candidates(KEY, "gluon") if isinstance(launch, GluonLaunch)]
    assert {gates.form_of(launch) for launch in gluon} == {"plain", "persistent"}
    assert {(x.BM, x.warps, x.persistent) for x in gluon} == {(64, 4, 0), (64, 4, 2), (128, 8, 0), (128, 8, 1)}
    assert not candidates(("sm_80", 64, "half"), "gluon")
    assert {gates.form_of(launch) for launch in candidates(("sm_80", 64, "half"), "keys")} == {"plain"}


def test_a_row_of_a_file_names_its_launch() -> None:
    for kernel, launch, fields, words in (
        ("keys", Launch(64, 128, 4, 3, tma=True), {"tma": True}, "64x128, 4 warps, 3 stages, tma"),
        ("gluon", GluonLaunch(64, 128, 4, 3, 2), {"persistent": 2}, "64x128, 4 warps, 3 stages, persistent 2"),
        ("forward", Launch(64, 128, 4, 3), {}, "64x128, 4 warps, 3 stages"),
    ):
        row = asked(KEY, kernel, launch)
        assert row["launch"] == {"BM": 64, "BN": 128, "warps": 4, "stages": 3, **fields}
        assert gates.launch_of(row) == launch
        assert gates.spelled(row["launch"]) == words
    gone = asked(KEY, "forward", FORWARD)
    gone["launch"]["ahead"] = True
    assert gates.launch_of(gone) is None, "a kernel that is no more"
    for path in sorted(RESULTS.glob("*/*-tune.json")):
        rows = json.loads(path.read_text())["rows"]
        assert sum(gates.launch_of(row) is not None for row in rows) > len(rows) / 2


def test_a_candidate_takes_the_place_of_whatever_a_call_would_take() -> None:
    key, launch = ("sm_90", 128, "half"), Launch(16, 16, 4, 1)
    with tune.committed_as(key, "forward", launch):
        for block, tma, split in itertools.product(((64, 64), (128, 128)), (False, True), (False, True)):
            assert committed(key, featured=False, split=split, block=block, tma=tma).forward == launch
    assert committed(key, featured=False, split=False, block=(128, 128), tma=True).forward != launch


def test_a_candidate_kernel_is_registered_while_it_is_timed() -> None:
    assert candidate_kernels.forward is candidate_kernels.backward is None
    with tune.committed_as(KEY, "one_pass", Launch(64, 64, 4, 3, tma=True)):
        assert candidate_kernels.backward is not None
        assert candidate_kernels.forward is None
    with tune.committed_as(KEY, "gluon", GluonLaunch(64, 64, 4, 3)):
        assert candidate_kernels.forward is not None
        assert candidate_kernels.backward is None
    assert candidate_kernels.forward is candidate_kernels.backward is None


@compiles
def test_gates_let_the_committed_launch_through_and_not_what_does_not_compile() -> None:
    right = gates.gate(asked(KEY, "forward", FORWARD))
    assert right["fits"]
    assert right["products"] > 2 * right["waits"]
    assert "does not compile" in gates.gate(asked(KEY, "forward", Launch(96, 128, 4, 3)))["why"]


@pytest.mark.parametrize(
    ("sass", "spilled", "shared", "why"),
    [
        (3 * "HGMMA;" + "WARPGROUP.DEPBAR;", 0, 1000, None),
        (3 * "HGMMA; WARPGROUP.DEPBAR;", 0, 1000, "serialised"),
        (3 * "HGMMA;" + "WARPGROUP.DEPBAR;", gates.MOST_SPILLED, 1000, None),
        (3 * "HGMMA;" + "WARPGROUP.DEPBAR;", gates.MOST_SPILLED + 8, 1000, "spills"),
        (3 * "HGMMA;" + "WARPGROUP.DEPBAR;", 0, 1 << 20, "too much shared memory"),
    ],
)
def test_gates_rule_out_what_does_not_fit_and_serialised_products(
    sass: str, spilled: int, shared: int, why: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machine code made up: a launch that spills takes a minute to compile."""
    from sparseflash.kernels.triton import report

    monkeypatch.setattr(report, "compile_case", lambda case: SimpleNamespace(asm={"sass": sass}))
    monkeypatch.setattr(report, "resources", lambda compiled: report.Resources(200, spilled, shared))
    found = gates.gate(asked(KEY, "forward", FORWARD))
    assert (found["fits"], found.get("why")) == (why is None, why)


def test_gates_of_other_kernels_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some-cpu" / "2026-01-01-gates.json"
    results = Growing("gates", path, skip=GATED_SOURCE)
    results.add(asked(KEY, "forward", other(1)), {"fits": False, "why": "spills"})
    results.add(asked(KEY, "forward", FORWARD), {"fits": False, "why": "spills"})
    known = gates.known_gates(tmp_path)
    assert len(known) == 2
    timed = fitting(KEY, "forward", known)
    assert timed[0] == FORWARD, "what is committed is timed whatever a gate says: others are compared with it"
    assert other(1) not in timed
    assert len(timed) == len(candidates(KEY, "forward")) - 1, "what no gate has seen is timed"
    elsewhere = "sm_90", 128, "half"
    assert len(fitting(elsewhere, "forward", known)) == len(candidates(elsewhere, "forward")), "another head dim"
    monkeypatch.setattr(gates, "source", lambda skip: "other kernels")
    assert gates.known_gates(tmp_path) == []


def row(launch: Launch, speed: float, noise: float = 0.001, kernel: str = "forward") -> dict[str, Any]:
    """A recorded measurement: so much faster than the committed launch on one mask, twice that on another."""
    times = {"ms": {"a": 1 / speed, "b": 2 / speed / 2}, "committed_ms": {"a": 1.0, "b": 2.0}}
    again = {"again_ms": {"a": 1 + noise, "b": 2 + 2 * noise}}
    return asked(KEY, kernel, launch) | times | again | {"source": "made up"}


def test_the_fastest_right_launch_is_chosen_if_it_is_faster_by_more_than_noise() -> None:
    assert gates.gain(row(other(1), 1.5)) == pytest.approx(1.5 * 2**0.5), "the geometric mean over masks"
    wrong = asked(KEY, "forward", other(3)) | {"failed": "full(): out: error 1 above 0.01"}
    rows = [row(FORWARD, 2**-0.5), row(other(1), 0.8), row(other(2), 0.9), wrong]
    chosen = tune.winner(KEY, "forward", rows)
    assert chosen is not None
    assert chosen[0] == other(2)
    assert chosen[1] == pytest.approx(0.9 * 2**0.5)
    noisy = [row(other(2), 0.9, noise=0.4)]
    assert tune.winner(KEY, "forward", noisy) is None, "the committed launch differs as much from itself"
    assert tune.winner(KEY, "forward", [row(other(2), 1.01 * 2**-0.5)]) is None, "1 % is not worth a change"
    assert tune.winner(KEY, "keys", rows) is None
    assert tune.winner(KEY, "forward", []) is None


def test_the_proposal_is_a_file_of_launches(tmp_path: Path) -> None:
    path = tmp_path / "2026-01-01-tune.json"
    results = Growing("tune", path)
    measured = {key: value for key, value in row(other(2), 0.9).items() if key.endswith("ms")}
    results.add(asked(KEY, "forward", other(2)), measured)
    written = tune.write_proposal(results)
    assert written == tmp_path / "2026-01-01-launches.toml"
    text = written.read_text()
    assert "# sm_90 half 64: forward 1.27x\n" in text
    assert not other(2).tma
    assert parsed(text) == COMMITTED._replace(usual=TABLE | {KEY: TABLE[KEY]._replace(forward=other(2))})
    tiled = other(2)._replace(tma=True)
    results.add(asked(KEY, "queries", tiled), row(tiled, 0.9, kernel="queries"))
    results.add(asked(KEY, "one_pass", tiled), measured)
    text = tune.write_proposal(results).read_text()
    assert "# sm_90 half 64: forward 1.27x, queries 1.27x, one_pass 1.27x (" in text
    assert "tma): make it the committed kernel" in text
    assert parsed(text).tma[KEY]["queries"] == tiled
    assert text.startswith(FILE.read_text()[:200])
    assert not list(tmp_path.glob("*.part"))


TIMED_ON = [Setting("causal()", 128, 16, 32, dtype="float32", heads=1, batch=1)]


def test_a_candidate_is_in_the_table_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Launch] = []
    monkeypatch.setattr(tune, "ours", _watched(seen, 1.0))
    found = tune.time_candidate(KEY, "forward", other(1), cpu(), TIMED_ON, runs=3)
    assert seen[0] == other(1), "what is compared with dense attention is the candidate"
    # A call that compiles, a warm-up and three rounds of the candidate, the committed launch, and that again.
    assert seen[1:] == 5 * [other(1), FORWARD, FORWARD]
    assert committed(KEY, featured=False, split=False, block=(128, 128), tma=False).forward == FORWARD
    for name in ("ms", "committed_ms", "again_ms"):
        assert list(found[name]) == ["causal(), block 32"]
        assert found[name]["causal(), block 32"] > 0


def _watched(seen: list[Launch], factor: float) -> Any:
    def ours(mask: Any, device: torch.device) -> Attend:
        right = contenders.ours(mask, device)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            seen.append(TABLE[KEY].forward)
            out, lse = right(q, k, v)
            return out * factor, lse

        return attend

    return ours


def test_a_candidate_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Launch] = []
    monkeypatch.setattr(tune, "ours", _watched(seen, 1.01))
    found = tune.time_candidate(KEY, "forward", other(1), cpu(), TIMED_ON)
    assert found["failed"].startswith("causal(): out: error")
    assert seen == [other(1)]


def test_measuring_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "settings", lambda D, dtype: TIMED_ON)
    monkeypatch.setattr(tune, "fitting", lambda key, kernel, gates: candidates(key, kernel)[:2])
    path = tmp_path / "tune.json"
    todo = [(KEY, "forward"), (KEY, "keys")]
    assert not tune.measured(todo, cpu(), Growing("tune", path), [], 0)
    assert tune.measured(todo, cpu(), Growing("tune", path), [], 60)
    rows = json.loads(path.read_text())["rows"]
    order = [(one["kernel"], one["launch"]) for one in rows]
    assert order == [
        (kernel, asked(KEY, kernel, candidates(KEY, kernel)[i])["launch"])
        for i in (0, 1)
        for kernel in ("forward", "keys")
    ]
    before = path.read_bytes()
    assert tune.measured(todo, cpu(), Growing("tune", path), [], 60)
    assert tune.measured([(KEY, "queries")], cpu(), Growing("tune", path), [], 60, forms=["persistent"]), (
        "it has no such form"
    )
    assert path.read_bytes() == before


def test_a_candidate_that_has_to_wait_for_its_turn_is_timed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "settings", lambda D, dtype: TIMED_ON)
    (lock := tmp_path / "lock").touch()
    found = tune._in_turn(asked(KEY, "forward", other(1)), cpu(), lock)
    assert list(found["ms"]) == ["causal(), block 32"]


def test_who_is_timed_waits_until_nobody_prepares(tmp_path: Path) -> None:
    (lock := tmp_path / "lock").touch()
    happened: list[str] = []

    def time_it() -> None:
        with turns(lock) as alone:
            ready.set()
            alone()
            happened.append("timed")

    ready = threading.Event()
    with turns(lock):
        other_row = threading.Thread(target=time_it)
        other_row.start()
        assert ready.wait(10), "both may prepare"
        other_row.join(0.3)
        happened.append("prepared")
    other_row.join(10)
    assert happened == ["prepared", "timed"]


@compiles
def test_the_exponentials_of_the_micro_kernel_are_those_that_it_counts() -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.gpu.exp2_kernel import BLOCK, exp2_kernel

    signature = {"x_ptr": "*fp32", "y_ptr": "*fp32", "rounds": "i32", "BLOCK": "constexpr"}
    source = ASTSource(exp2_kernel, signature, {"BLOCK": BLOCK})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    loop = compiled.asm["sass"].split("LBB1:")[1].split("BRA LBB1")[0]
    assert loop.count("MUFU.EX2") == BLOCK // 128, "one for each element of a thread, in every round"
    assert "FMUL" not in loop, "no other work for the exponential's sake"
