"""Part "kernels": attention compared with other implementations, and with the limits of the GPU.

Everything about one setting is timed in one process, in turn, on the same operands: random, and so many sets of them
that no call finds its own in the cache. A contender that does not agree with masked dense attention has no figures; for
ours that is a failure of the row.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.gpu import decode, profile, rates
from benchmarks.gpu.contenders import Attend, ours, peers, prepare_torch
from benchmarks.gpu.correctness import disagreement, drawn_rows, rows_of
from benchmarks.gpu.machine import Machine
from benchmarks.gpu.operands import Operands, operands
from benchmarks.gpu.parallel import Alone, nobody_else, processes, turns
from benchmarks.gpu.settings import Setting, every
from benchmarks.gpu.work import PASSES, Pass, Rates, attention_work
from benchmarks.masks import GPU_MASKS
from benchmarks.record import Growing
from sparseflash.patterns.advice import WastefulPattern
from sparseflash.tools.bench import peak_mb
from sparseflash.tools.timing import Call, time_interleaved

Key = tuple[str, Pass]
Peers = Callable[..., tuple[dict[str, Attend], dict[str, str]]]
BEFORE_DECODING, BEFORE_TRAFFIC = 8, 18  # settings that are measured before
AGAIN = "ours again"  # the same calls under another name: the difference is noise


@dataclass(frozen=True)
class Protocol:
    """How long and how closely is measured.

    Attributes:
        runs: timed rounds at most.
        seconds: no further round of a setting begins after that long, but for the first three.
        rows: queries that are compared with masked dense attention.
        peers: who else is timed.
    """

    runs: int = 30
    seconds: float = 6.0
    rows: int = 24
    peers: Peers = peers


def measure(
    setting: Setting, machine: Machine, card: Rates, protocol: Protocol, alone: Alone = nobody_else
) -> dict[str, Any]:
    """One row: everybody's times, and what they mean; `alone` is called before anybody is timed."""
    batch, heads, kv_heads = setting.shape
    mask, tokens = GPU_MASKS[setting.mask], setting.seq_len
    pattern = mask.pattern(tokens)
    compiled = pattern.compile(tokens, block=setting.block)
    sets = operands(setting, machine)
    row: dict[str, Any] = {
        "shape": [batch, heads, kv_heads], "density": compiled.density, "token_density": compiled.token_density,
        "sets": len(sets), "left_out": {},
    }  # fmt: skip
    rows = drawn_rows(tokens, protocol.rows)
    token_mask = rows_of(pattern, rows, tokens)
    mine = ours(compiled, machine.device)
    if wrong := disagreement(mine, *sets[0], rows, token_mask):
        return row | {"failed": wrong}
    others, row["left_out"] = protocol.peers(mask, pattern, tokens, setting.block, machine.device, setting.every_form)
    contenders = {"ours": mine, AGAIN: mine}
    for name, attend in others.items():
        if wrong := disagreement(attend, *sets[0], rows, token_mask):
            row["left_out"][name] = wrong
        else:
            contenders[name] = attend
    row |= peaks(mine, sets[0], machine)
    calls: dict[Key, list[Call]] = {}
    for name, attend in contenders.items():
        calls |= {(name, which): each for which, each in passes(attend, sets).items()}
    alone()
    found = time_interleaved(
        calls,
        protocol.runs,
        machine.clock,
        may_fail=lambda key: key[0] not in ("ours", AGAIN),
        seconds=protocol.seconds,
    )
    row["left_out"] |= {name: why for (name, _), why in found.failed.items()}
    pairs = compiled.token_density * tokens**2
    for which in PASSES:
        itemsize = sets[0][0].element_size()
        work = attention_work(which, pairs, batch, heads, kv_heads, tokens, setting.head_dim, itemsize)
        floor, bound = work.floor(card)
        row |= {f"floor_{which}_ms": 1e3 * floor, f"bound_{which}": bound}
        row |= figures(which, {name: times for (name, one), times in found.times.items() if one == which})
        row[f"tflops_{which}"] = work.operations / row[f"ours_{which}_ms"] / 1e9
        row[f"share_{which}"] = 1e3 * floor / row[f"ours_{which}_ms"]
    del calls, found, sets, mine, others, contenders
    torch._dynamo.reset()
    machine.empty_cache()
    return row


def figures(which: Pass, times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians, spreads and ratios to ours of one pass; of FlexAttention's forms also the best."""
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    found: dict[str, Any] = {}
    for name, taken in times.items():
        if name != AGAIN:
            found[f"{name}_{which}_ms"] = 1e3 * medians[name]
            found[f"{name}_{which}_ms_spread"] = 1e3 * (max(taken) - min(taken))
    forms = [name for name in medians if name.startswith("flex")]
    if len(forms) > 1:
        best = min(forms, key=medians.__getitem__)
        found |= {f"best flex_{which}_ms": 1e3 * medians[best], f"best flex_{which}": best}
        medians["best flex"] = medians[best]
    for name, median in medians.items():
        if name not in ("ours", AGAIN):
            found[f"over_{name}_{which}"] = median / medians["ours"]
    found[f"noise_{which}"] = abs(medians[AGAIN] / medians["ours"] - 1)
    found[f"runs_{which}"] = len(times["ours"])
    return found


def peaks(attend: Attend, given: Operands, machine: Machine) -> dict[str, float]:
    """Peak memory of one call of ours beyond its operands, in MB: forward, and forward with backward."""
    q, k, v, dout = given
    found = {}
    for which in PASSES:
        with torch.set_grad_enabled(which == "bwd"), peak_mb(str(machine.device)) as peak:
            result = attend(q, k, v)
            if which == "bwd":
                torch.autograd.grad(result[0], (q, k, v), dout)
        if (grown := peak()) is not None:
            found[f"peak_{which}_mb"] = grown
        del result
    return found


def passes(attend: Attend, sets: list[Operands]) -> dict[Pass, list[Call]]:
    """The calls that are timed: one for each set of operands, forward and backward alone."""
    return {"fwd": [_forward(attend, one) for one in sets], "bwd": [_backward(attend, one) for one in sets]}


def _forward(attend: Attend, given: Operands) -> Call:
    q, k, v, _ = (x.detach() for x in given)
    return torch.no_grad()(lambda: attend(q, k, v))


def _backward(attend: Attend, given: Operands) -> Call:
    """The backward pass alone: the forward pass runs once, on the first call."""
    q, k, v, dout = given
    out: list[torch.Tensor] = []

    def call() -> Any:
        if not out:
            result = attend(q, k, v)
            out.append(result[0] if isinstance(result, tuple) else result)
        return torch.autograd.grad(out[0], (q, k, v), dout, retain_graph=True)

    return call


def asked(settings: Iterator[Setting]) -> Iterator[dict[str, Any]]:
    """All rows of the part: the card's rates, the targets' settings, decoding, traffic, then the rest."""
    yield {"kind": "rates"}
    listed = [setting.asked() for setting in settings]
    yield from listed[:BEFORE_DECODING]
    yield from decode.asked()
    yield from listed[BEFORE_DECODING:BEFORE_TRAFFIC]
    yield from profile.asked()
    yield from listed[BEFORE_TRAFFIC:]


def run(
    machine: Machine,
    seconds: float,
    path: Path | None = None,
    settings: Callable[[], Iterator[Setting]] = every,
    protocol: Protocol | None = None,
    say: Callable[[str], object] = print,
    again: bool = False,
    sizes: Mapping[str, int] | None = None,
    at_once: int = 1,
) -> bool:
    """Measure what is missing; see :class:`benchmarks.record.Growing`.

    Args:
        machine: what is measured on.
        seconds: after which no row begins.
        path: of the result file; None for today's.
        settings: of the rows that are asked for.
        protocol: how they are measured.
        say: told how it goes.
        again: whether rows that failed are measured again.
        sizes: of the programs behind the rates.
        at_once: rows of attention that are prepared side by side, in processes of their own; each is timed alone.

    Returns:
        Whether all rows are there.
    """
    _prepare()
    protocol = protocol or Protocol()
    results = Growing("kernels", path)
    end = time.monotonic() + seconds

    def one(asked: Mapping[str, Any], left: float) -> Mapping[str, Any]:
        if asked["kind"] == "rates":
            return rates.measure(machine, **(sizes or {}))
        card = results.find({"kind": "rates"})
        if card is None:
            raise RuntimeError("the card's rates are measured first, and are missing")
        plain = {name: value for name, value in asked.items() if name != "kind"}
        if asked["kind"] == "decode":
            return decode.measure(decode.Decode(**plain), machine, rates.rates(card))
        if asked["kind"] == "traffic":
            return profile.measure(Setting(**plain), left)
        found = measure(Setting(**plain), machine, rates.rates(card), protocol)
        say(summary(found))
        return found

    def retried(row: Mapping[str, Any]) -> bool:
        return again and "failed" in row

    def go_on(rows: Iterator[dict[str, Any]]) -> bool:
        return results.go_on(rows, one, end - time.monotonic(), say, retried, machine.alive)

    if at_once > 1:
        go_on(iter([{"kind": "rates"}]))
        card = results.find({"kind": "rates"})
        if card is None or "failed" in card:
            return False
        with TemporaryDirectory() as folder:
            (lock := Path(folder) / "lock").touch()
            measure_one = partial(_in_turn, machine=machine, card=rates.rates(card), protocol=protocol, lock=lock)
            rows = (row for row in asked(settings()) if row["kind"] == "attention")
            if not results.go_on_abreast(rows, measure_one, end - time.monotonic(), processes, at_once, say, retried):
                return False
    rest = (row for row in asked(settings()) if at_once == 1 or row["kind"] != "attention")
    return go_on(rest)


def _prepare() -> None:
    warnings.simplefilter("ignore", WastefulPattern)
    prepare_torch()


def _in_turn(asked: Mapping[str, Any], machine: Machine, card: Rates, protocol: Protocol, lock: Path) -> dict[str, Any]:
    """One row of attention in a process of its own."""
    _prepare()
    plain = {name: value for name, value in asked.items() if name != "kind"}
    with turns(lock) as alone:
        found = measure(Setting(**plain), machine, card, protocol, alone)
    print(summary(found), flush=True)
    return found


def summary(row: Mapping[str, Any]) -> str:
    """One line a person can follow the run by."""
    if "failed" in row:
        return f"  FAILED, no figures: {row['failed']}"
    parts = [
        f"{which} {row[f'ours_{which}_ms']:.3f} ms, {row[f'tflops_{which}']:.0f} TFLOP/s, "
        f"{row[f'share_{which}']:.0%} of the floor's speed ({row[f'bound_{which}']})"
        for which in PASSES
    ]
    ratios = [f"{name.removeprefix('over_')} {value:.2f}x" for name, value in row.items() if name.startswith("over_")]
    left = [f"{name} left out: {why}" for name, why in row["left_out"].items()]
    return "\n".join(f"  {line}" for line in [*parts, ", ".join(ratios) or "nobody beside us", *left])
