"""Find launches: the offline tuner behind `kernels/launches.toml`.

    python -m benchmarks.tune gates    # no GPU: which candidates fit, and are not serialised
    python -m benchmarks.tune measure  # on the GPU: times these beside the committed launch, the likeliest first
    python -m benchmarks.tune propose  # from what was measured: a new launches.toml, to look at and commit

Each goes on where it stopped; --seconds bounds a run; --head-dim, --kernel and --form name a part. Results go to
results/<device>/<date>-gates.json and -tune.json, the proposal to <date>-launches.toml beside the latter. Gates taken
on one machine hold on every other, as long as the kernels are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.contenders import ours
from benchmarks.gpu.correctness import disagreement, drawn_rows, rows_of
from benchmarks.gpu.gates import (
    CANDIDATES,
    DTYPES,
    FORMS,
    GATED_SOURCE,
    AnyLaunch,
    asked,
    candidates,
    fitting,
    form_of,
    gain,
    gated,
    is_of,
    known_gates,
    launch_of,
    spelled,
)
from benchmarks.gpu.kernels import passes
from benchmarks.gpu.launch_file import written
from benchmarks.gpu.machine import Machine, gpu
from benchmarks.gpu.operands import operands
from benchmarks.gpu.parallel import Alone, nobody_else, processes, turns
from benchmarks.gpu.settings import COMMON, Setting, random_name
from benchmarks.gpu.work import Pass
from benchmarks.masks import GPU_MASKS
from benchmarks.record import Growing, Row
from sparseflash.kernels import candidates as candidate_kernels
from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.launch import COMMITTED, Key, family
from sparseflash.tools.timing import Call, time_interleaved

HEAD_DIMS = (128, 64, 32, 256)
PASS_OF: dict[str, Pass] = {"forward": "fwd", "gluon": "fwd", "keys": "bwd", "queries": "bwd", "one_pass": "bwd"}
RUNS, SECONDS = 12, 2.0  # of a mask
AHEAD_OF = 0.02  # by which share a launch must at least be faster than the committed one


def settings(D: int, dtype: str) -> list[Setting]:
    """What launches are timed on: dense, few blocks, very few, PARTIAL blocks, and blocks smaller than a step."""
    tokens, named = (16384, "bfloat16") if dtype == "half" else (4096, "float32")
    return [
        Setting("full()", tokens, D, dtype=named),
        Setting(random_name(0.1, 128), tokens, D, dtype=named),
        Setting(random_name(0.02, 128), tokens, D, dtype=named),
        Setting(COMMON, tokens, D, dtype=named),
        Setting(random_name(0.1, 64), tokens, D, 64, dtype=named),
    ]


@contextmanager
def committed_as(key: Key, kernel: str, launch: AnyLaunch | None) -> Iterator[None]:
    """While it is open, calls without features take this launch; None for what is committed."""
    with ExitStack() as stack:
        if isinstance(launch, GluonLaunch):
            from sparseflash.kernels.candidates import gluon_forward

            forward = partial(gluon_forward.attempt, {key: launch})
            stack.enter_context(mock.patch.object(candidate_kernels, "forward", forward))
        elif launch is not None and kernel == "one_pass":
            from sparseflash.kernels.candidates import one_pass

            backward = partial(one_pass.attempt, {key: launch})
            stack.enter_context(mock.patch.object(candidate_kernels, "backward", backward))
        elif launch is not None:
            usual = {key: COMMITTED.usual[key]._replace(**{kernel: launch})}
            stack.enter_context(mock.patch.dict(COMMITTED.usual, usual))
            for other in (COMMITTED.tma, COMMITTED.narrow, COMMITTED.split):
                rest = {name: kept for name, kept in other.get(key, {}).items() if name != kernel}
                stack.enter_context(mock.patch.dict(other, {key: rest}))
        yield


def time_candidate(
    key: Key,
    kernel: str,
    launch: AnyLaunch,
    machine: Machine,
    timed_on: Sequence[Setting],
    runs: int = RUNS,
    alone: Alone = nobody_else,
) -> dict[str, Any]:
    """Its times beside the committed launch's, on each mask; the committed launch twice, whose difference is noise."""
    row: dict[str, Any] = {"ms": {}, "committed_ms": {}, "again_ms": {}}
    which = PASS_OF[kernel]
    prepared: dict[str, dict[str, list[Call]]] = {}
    for setting in timed_on:
        pattern = GPU_MASKS[setting.mask].pattern(setting.seq_len)
        attend = ours(pattern.compile(setting.seq_len, block=setting.block), machine.device)
        given = operands(setting, machine)
        with committed_as(key, kernel, launch):
            sampled = drawn_rows(setting.seq_len, 8)
            wrong = disagreement(attend, *given[0], sampled, rows_of(pattern, sampled, setting.seq_len))
        if wrong:
            return {"failed": f"{setting.mask}: {wrong}"}

        def under(
            chosen: AnyLaunch | None, setting: Setting = setting, attend: Any = attend, given: Any = given
        ) -> list[Any]:
            def bound(call: Any) -> Any:
                def timed() -> Any:
                    with committed_as(key, kernel, chosen):
                        return call()

                return timed

            return [bound(call) for call in passes(attend, given)[which]]

        calls = {"ms": under(launch), "committed_ms": under(None), "again_ms": under(None)}
        for call in (each[0] for each in calls.values()):  # compiles
            call()
        prepared[f"{setting.mask}, block {setting.block}"] = calls
    alone()
    for mask, calls in prepared.items():
        for name, times in time_interleaved(calls, runs, machine.clock, seconds=SECONDS).times.items():
            row[name][mask] = 1e3 * statistics.median(times)
    return row


def noise(rows: Sequence[Row]) -> float:
    """The largest geometric mean over masks by which the committed launch differed from itself."""
    return max(
        abs(statistics.fmean(math.log(row["again_ms"][name] / ms) for name, ms in row["committed_ms"].items()))
        for row in rows
    )


def winner(key: Key, kernel: str, rows: Sequence[Row]) -> tuple[AnyLaunch, float] | None:
    """The fastest right launch of those measured and its gain; None where the committed one stays."""
    mine = [row for row in rows if "failed" not in row and is_of(row, key, kernel) and launch_of(row) is not None]
    if not mine:
        return None
    best = max(mine, key=gain)
    if gain(best) <= 1 + max(AHEAD_OF, noise(mine)):
        return None
    launch = launch_of(best)
    assert launch is not None
    return launch, gain(best)


def proposal(rows: Sequence[Row], head: str) -> str:
    """The file of launches with the winners of what was measured in it, and in comments by how much they won."""
    keys = list(dict.fromkeys((row["architecture"], row["head_dim"], row["dtype"]) for row in rows))
    usual, tma = dict(COMMITTED.usual), dict(COMMITTED.tma)
    lines = [
        f"# {head}",
        "# Launches that won on blocks of 64 alone belong into [... .narrow]: see the masks of the measurements.",
        "# Then check features and split lines: python -m sparseflash.kernels.triton.report sm_90 features split",
    ]
    for key in keys:
        notes = []
        for kernel in PASS_OF:
            if not (found := winner(key, kernel, rows)):
                continue
            launch, won = found
            notes.append(f"{kernel} {won:.2f}x")
            if isinstance(launch, GluonLaunch) or kernel in CANDIDATES:
                notes[-1] += f" ({spelled(asked(key, kernel, launch)['launch'])}): make it the committed kernel"
            elif launch.tma:
                tma[key] = tma.get(key, {}) | {kernel: launch}
            else:
                usual[key] = usual[key]._replace(**{kernel: launch})
                tma[key] = {name: kept for name, kept in tma.get(key, {}).items() if name != kernel}
        architecture, D, dtype = key
        lines.append(f"# {architecture} {dtype} {D}: {', '.join(notes) or 'as committed'}")
    return written(COMMITTED._replace(usual=usual, tma=tma), "\n".join(["#", *lines, ""]))


def write_proposal(results: Growing) -> Path:
    """Put the proposal beside the result file."""
    path = results.path.with_name(results.path.name.replace("-tune.json", "-launches.toml"))
    about = json.loads(results.path.read_text())
    where = f"{about['device']}, {about['date']}, triton {about['triton']}, commit {about['commit']}"
    head = f"Measured on {where}: {results.path.name}"
    current = [row for row in results.rows if row["source"] == results.source]
    temporary = path.with_suffix(".part")
    temporary.write_text(proposal(current, head))
    temporary.replace(path)
    return path


def measured(
    keys: Sequence[tuple[Key, str]],
    machine: Machine,
    results: Growing,
    gates: Sequence[Row],
    seconds: float,
    at_once: int = 1,
    forms: Sequence[str] = FORMS,
) -> bool:
    """Time what fits; whether all was timed. Several at once are prepared side by side, and timed alone."""
    by_turn = itertools.zip_longest(
        *(
            [asked(key, kernel, launch) for launch in fitting(key, kernel, gates) if form_of(launch) in forms]
            for key, kernel in keys
        )
    )
    todo = [row for turn in by_turn for row in turn if row is not None]

    if at_once == 1:
        return results.go_on(todo, lambda row, left: _timed(row, machine), seconds, alive=machine.alive)
    with TemporaryDirectory() as folder:
        (lock := Path(folder) / "lock").touch()
        one = partial(_in_turn, machine=machine, lock=lock)
        return results.go_on_abreast(todo, one, seconds, processes, at_once)


def _in_turn(row: Mapping[str, Any], machine: Machine, lock: Path) -> dict[str, Any]:
    with turns(lock) as alone:
        return _timed(row, machine, alone)


def _timed(row: Mapping[str, Any], machine: Machine, alone: Alone = nobody_else) -> dict[str, Any]:
    key = row["architecture"], row["head_dim"], row["dtype"]
    launch, timed_on = launch_of(row), settings(row["head_dim"], row["dtype"])
    assert launch is not None
    found = time_candidate(key, row["kernel"], launch, machine, timed_on, alone=alone)
    how = f"FAILED: {found['failed']}" if "failed" in found else f"{gain(found):.3f}x the committed launch's speed"
    print(f"  {row['kernel']} D {row['head_dim']} {spelled(row['launch'])}: {how}", flush=True)
    return found


def wanted(given: argparse.Namespace) -> Iterator[tuple[Key, str]]:
    """The kernels that a command names."""
    for D, kernel in itertools.product(given.head_dim, given.kernel):
        yield (given.architecture, D, given.dtype), kernel


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 0 if nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("gates", "measure", "propose"))
    parser.add_argument("--architecture", default="sm_90", choices=sorted({key[0] for key in COMMITTED.usual}))
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--kernel", nargs="+", default=list(PASS_OF), choices=list(PASS_OF))
    parser.add_argument("--form", nargs="+", default=FORMS, choices=FORMS, help="of candidates, beside their sizes")
    parser.add_argument("--dtype", default="half", choices=list(DTYPES))
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--workers", type=int, default=2, help="processes that compile, for gates")
    parser.add_argument("--at-once", type=int, default=1, help="candidates that are prepared side by side, for measure")
    given = parser.parse_args(arguments)
    if given.what == "gates":
        rows = [
            asked(key, kernel, launch)
            for key, kernel in wanted(given)
            for launch in candidates(key, kernel)
            if form_of(launch) in given.form
        ]
        return int(not gated(rows, Growing("gates", skip=GATED_SOURCE), given.workers, given.seconds))
    results = Growing("tune")
    if given.what == "propose":
        if not results.rows:
            print(f"{results.path} holds no measurements: python -m benchmarks.tune measure, on a GPU")
            return 1
        print(write_proposal(results).read_text())
        return 0
    if not torch.cuda.is_available():
        print("tune: torch sees no GPU here, nothing to measure; gates need none")
        return 0
    if (here := family(torch.device("cuda"))) != given.architecture:
        parser.error(f"this GPU is {here}, launches were asked for {given.architecture}")
    complete = measured(list(wanted(given)), gpu(), results, known_gates(), given.seconds, given.at_once, given.form)
    print("written:", results.path, write_proposal(results))
    return int(not complete)


if __name__ == "__main__":
    raise SystemExit(main())
