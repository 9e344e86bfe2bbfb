"""Goals: what the kernels are to reach on an H200, and whether measured rows reach it.

Thresholds are useful TFLOP/s, shares or ratios, all of the kind "at least", and hold on every row that they speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.settings import random_name

Row = dict[str, Any]
DENSE = ("full()", "causal()")


@dataclass(frozen=True)
class Target:
    """One line of the table.

    Attributes:
        what: in words.
        least: the threshold.
        find: the values that it speaks of, from all rows.
        reference: what others are reported to reach.
        form: how a value is printed.
    """

    what: str
    least: float
    find: Callable[[Sequence[Row]], Iterator[float]]
    reference: str = ""
    form: str = "{:.0f}"

    def verdict(self, rows: Sequence[Row]) -> tuple[list[float], str]:
        """The values, and "met", "not met" or "not measured"; a row that failed meets nothing."""
        values = sorted(self.find([row for row in rows if "failed" not in row]))
        if not values:
            return [], "not measured"
        missed = sum(value < self.least for value in values)
        return values, f"not met in {missed} of {len(values)}" if missed else "met"


def _of(rows: Sequence[Row], **fields: Any) -> Iterator[Row]:
    """Rows with these values; a tuple names several."""
    for row in rows:
        if all(row.get(k) in v if isinstance(v, tuple) else row.get(k) == v for k, v in fields.items()):
            yield row


USUAL = {"kind": "attention", "dtype": "bfloat16", "head_dim": 128, "block": 128, "group": 1}


def _rate(key: str, **fields: Any) -> Callable[[Sequence[Row]], Iterator[float]]:
    return lambda rows: (row[key] for row in _of(rows, **{**USUAL, **fields}) if key in row)


def _kept(density: float) -> Callable[[Sequence[Row]], Iterator[float]]:
    """Rates at a density over those of the dense mask at the same length and head dim, both passes."""

    def find(rows: Sequence[Row]) -> Iterator[float]:
        fields = {key: value for key, value in USUAL.items() if key != "head_dim"}
        for row in _of(rows, **fields, mask=random_name(density, 128)):
            same = {key: row[key] for key in ("seq_len", "head_dim", "heads", "batch")}
            for dense in _of(rows, **fields, **same, mask="full()", every_form=False):
                yield from (row[f"tflops_{which}"] / dense[f"tflops_{which}"] for which in ("fwd", "bwd"))

    return find


def _over(who: str, which: str) -> Callable[[Sequence[Row]], Iterator[float]]:
    """Ratios to a peer on every row; to FlexAttention's best form where several were measured."""

    def find(rows: Sequence[Row]) -> Iterator[float]:
        for row in _of(rows, kind="attention"):
            for key in (f"over_best {who}_{which}", f"over_{who}_{which}"):
                if key in row:
                    yield row[key]
                    break

    return find


def _fa4(rows: Sequence[Row]) -> Iterator[float]:
    yield from _over("fa4", "fwd")(rows)
    yield from _over("fa4", "bwd")(rows)


LONG = (1 << 14, 1 << 16)
TARGETS = (
    Target(
        "dense and causal forward, 16K and 64K", 600, _rate("tflops_fwd", mask=DENSE, seq_len=LONG),
        "FlexAttention about 390, cuDNN about 600, FA3 about 660",
    ),
    Target(
        "dense and causal backward, 16K and 64K", 480, _rate("tflops_bwd", mask=DENSE, seq_len=LONG),
        "FlexAttention about 280, cuDNN about 500, FA3 about 590",
    ),
    Target(
        "head dim 64, dense and causal forward", 430, _rate("tflops_fwd", mask=DENSE, head_dim=64),
        "FA2 324, FA3 497",
    ),
    Target(
        "blocks of 64 x 64, density 0.1, forward", 400,
        _rate("tflops_fwd", mask=random_name(0.1, 64), block=64), "FlashInfer 315",
    ),
    Target("share of own dense rate at density 0.1", 0.90, _kept(0.1), "best known 0.91 to 0.96", "{:.2f}"),
    Target("share of own dense rate at density 0.02", 0.80, _kept(0.02), "best known 0.5 to 0.8", "{:.2f}"),
    Target("FlexAttention's time over ours, forward", 1.4, _over("flex", "fwd"), "", "{:.2f}"),
    Target("FlexAttention's time over ours, backward", 1.6, _over("flex", "bwd"), "", "{:.2f}"),
    Target("FlashAttention-4's time over ours, both passes", 1.0, _fa4, "fastest known", "{:.2f}"),
    Target(
        "decoding, 64K cache, 5 % density: share of copy bandwidth", 0.80,
        lambda rows: (row["share"] for row in _of(rows, kind="decode", density=0.05)), "", "{:.2f}",
    ),
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """All of them in Markdown, for the rows of one device or for none."""
    lines = [
        "| goal (bf16, head dim 128 unless said) | at least | lowest | highest | verdict | others |",
        "|---" * 6 + "|",
    ]
    for target in TARGETS:
        values, verdict = target.verdict(rows)
        worst, best = (target.form.format(x) for x in (values[0], values[-1])) if values else ("", "")
        verdict = verdict.replace(" of ", "\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}")
        least = target.form.format(target.least)
        lines.append(f"| {target.what} | {least} | {worst} | {best} | {verdict} | {target.reference} |")
    return "\n".join(lines)
