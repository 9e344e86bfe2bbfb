"""Whole training steps through `eager`, `sdpa`, our dense and our sparse attention, interleaved in one process.

    python -m benchmarks.step                     # on a GPU the paper's shapes, on a CPU small versions of them
    python -m benchmarks.step --seconds 170       # begins no model after that long; the same line again does the rest
    python -m benchmarks.step --only "Path-256" --runs 3 --out /tmp/step.json

A step is forward, loss, backward and AdamW's update. One model with random weights takes turns with every attention,
so that all see the same weights and the same hour of the machine; the first loss of each is kept beside its time, and
all dense ones have the same. Times are medians of the rounds; attention's share is one minus the time of a step where
every token gets its own value, over the time of the step. Memory is what a step takes at most beyond weights and
moments: activations and gradients. Models of Transformers are made from their configs: nothing is downloaded, no
dropout, no torch.compile; bf16 autocast on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import package_version, provenance, result_path, write
from benchmarks.steps.models import ATTENTIONS, WITHOUT, Model, build
from benchmarks.steps.settings import FULL, SMALL, Setting
from sparseflash.tools.bench import peak_mb
from sparseflash.train.devices import resolve_device

ROUNDS = 3  # that a model gets even when time is up


class Steps:
    """A model, its optimizer, and a clock."""

    def __init__(self, model: Model) -> None:
        self.model, self._gpu = model, model.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(model.module.parameters(), lr=1e-4, fused=self._gpu)

    def take(self) -> None:
        """One training step."""
        self._optimizer.zero_grad(set_to_none=True)
        self.model.loss().backward()
        self._optimizer.step()

    def seconds(self, attention: str) -> float:
        """Of one step."""
        self.model.use(attention)
        self._wait()
        begun = time.perf_counter()
        self.take()
        self._wait()
        return time.perf_counter() - begun

    def peak(self, attention: str) -> float | None:
        """Memory that a step takes beyond weights and moments, in MB."""
        self.model.use(attention)
        self._optimizer.zero_grad(set_to_none=True)
        with peak_mb(self.model.device.type) as peak:
            self.take()
        return peak()

    def _wait(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()


def measure(
    setting: Setting,
    device: torch.device,
    runs: int,
    deadline: float = float("inf"),
    progress: Callable[[str], object] = lambda what: None,
) -> list[dict[str, Any]]:
    """A row for each attention.

    Args:
        setting: the model.
        device: where.
        runs: timed rounds; a round is a step of each.
        deadline: no round past the third begins after this reading of `time.monotonic`.
        progress: told what is being done.

    Raises:
        ImportError: the model needs Transformers, which is not here.
    """
    model = build(setting, device)
    steps = Steps(model)
    found: dict[str, dict[str, Any]] = {}
    for name in ATTENTIONS:
        row = found[name] = {"attention": name, "density": model.density(name)}
        if name not in model.attentions:
            row["left_out"] = f"the scores of {setting.tokens:,} tokens do not fit"
            continue
        progress(f"{setting.model}: {name}, loss")
        model.use(name)
        try:
            with torch.no_grad():
                row["loss"] = float(model.loss())
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
    for name in (*ATTENTIONS, WITHOUT):
        if "left_out" in (row := found.setdefault(name, {})):
            continue
        progress(f"{setting.model}: {name}, first steps")
        try:
            steps.seconds(name)  # compiles, and gives the optimizer its moments
            row["extra_mb"] = steps.peak(name)
        except torch.OutOfMemoryError:
            row["left_out"] = "out of memory"
    times: dict[str, list[float]] = {name: [] for name, row in found.items() if "left_out" not in row}
    for run in range(runs):
        if run >= ROUNDS and time.monotonic() > deadline:
            break
        for name, taken in times.items():
            progress(f"{setting.model}: round {run + 1} of {runs}, {name}")
            taken.append(steps.seconds(name))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, median in medians.items():
        found[name] |= {
            "step_ms": 1e3 * median,
            "spread_ms": 1e3 * (max(times[name]) - min(times[name])),
            "runs": len(times[name]),
            "over_sdpa": medians["sdpa"] / median if "sdpa" in medians else None,
            "attention_share": max(0.0, 1 - medians[WITHOUT] / median) if WITHOUT in medians else None,
        }
    precision = "bfloat16" if device.type == "cuda" else "float32"
    shared = {**asdict(setting), "parameters": sum(p.numel() for p in model.module.parameters()), "dtype": precision}
    return [shared | {k: v for k, v in found[name].items() if v is not None} for name in ATTENTIONS]


def run(
    *,
    small: bool | None = None,
    seconds: float = float("inf"),
    out: Path | None = None,
    runs: int = 7,
    device: str | None = None,
    only: Sequence[str] = (),
    settings: Sequence[Setting] | None = None,
    say: Callable[[str], object] = print,
    progress: Callable[[str], object] = lambda what: None,
) -> Path:
    """Measure every model that the result file lacks, and rewrite the file after each.

    Args:
        small: small versions of the models; default on a CPU.
        seconds: begin no model after so long.
        out: the result file; default today's of this machine.
        runs: timed rounds.
        device: default a GPU if there is one.
        only: names of models; default all.
        settings: others than those of benchmarks/steps/settings.py.
        say: takes a line for each row, and for what is left out.
        progress: told what is being done.

    Raises:
        ValueError: an unknown name, or a file that was measured on another device.
    """
    begun, on = time.monotonic(), resolve_device(device)
    chosen = settings or (SMALL if (on.type == "cpu" if small is None else small) else FULL)
    if unknown := set(only) - {setting.model for setting in chosen}:
        raise ValueError(f"no model {sorted(unknown)[0]!r}; there are {', '.join(repr(s.model) for s in chosen)}")
    path, here = out or result_path("step"), provenance()
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "device": here["device"]}
    if before["device"] != here["device"]:
        raise ValueError(f"{path} was measured on {before['device']}, this is {here['device']}: write to another file")
    rows: list[dict[str, Any]] = before["rows"]
    for setting in chosen:
        done = any(all(row.get(name) == value for name, value in asdict(setting).items()) for row in rows)
        if done or (only and setting.model not in only):
            continue
        if time.monotonic() - begun > seconds:
            say("time is up: run it again for the rest")
            break
        try:
            fresh = measure(setting, on, runs, begun + seconds, progress)
        except ImportError as error:
            say(f"{setting.model} left out: {error}")
            continue
        for row in fresh:
            say(described(row))
        rows += fresh
        write("step", rows, path, transformers=package_version("transformers"), runs=runs)
        gc.collect()
        if on.type == "cuda":
            torch.cuda.empty_cache()
    return path


def described(row: dict[str, Any]) -> str:
    """A line for people."""
    start = f"{row['model']}, {row['tokens']:,} tokens, {row['attention']}: "
    if "left_out" in row:
        return f"{start}{row['left_out']}"
    extra = f", {row['extra_mb']:,.0f} MB" if "extra_mb" in row else ""
    share = f", {row['attention_share']:.0%} of it attention" if "attention_share" in row else ""
    over = f", {row['over_sdpa']:.2f} of sdpa's speed" if "over_sdpa" in row else ""
    return (
        f"{start}{row['step_ms']:,.1f} ms (spread {row['spread_ms']:,.1f}){over}{share}{extra}, loss {row['loss']:.5f}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="begin no model after that long; default 480")
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="small versions; default on a CPU")
    parser.add_argument("--out", type=Path, help="result file; default results/<device>/<date>-step.json")
    parser.add_argument("--runs", type=int, default=7, help="timed rounds; default 7")
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL", help="names of models; default all")
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--threads", type=int, default=2, help="torch threads on a CPU; default 2")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    path = run(
        small=given.small, seconds=given.seconds, out=given.out, runs=given.runs, device=given.device, only=given.only,
        progress=lambda what: print(f"\r{what:<79}\r", end="", flush=True),
    )  # fmt: skip
    print(f"written: {path}" if path.exists() else "nothing was measured")


if __name__ == "__main__":
    main()
