"""How far attention is from float64: by dtype, number of keys, magnitude of the scores and softcap, beside SDPA.

python -m benchmarks.numerics                    # on a CPU: the CPU backend and torch's SDPA
python -m benchmarks.numerics --device cuda      # on a GPU: the Triton kernels and SDPA there
python -m benchmarks.numerics_page               # docs/numerics.md and its pictures, from the committed results

Operands are normal, rounded to the dtype first, so that what is measured is the arithmetic alone. The truth is masked
dense attention and its gradients in float64 on the same operands. An error is the root mean square of the difference
over that of the truth. Nothing is timed: it may run beside other work.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

import sparseflash as sf
from benchmarks.record import write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEYS = tuple(1 << power for power in range(8, 21, 2))
SPREADS = (1.0, 4.0, 16.0, 64.0, 256.0, 1e3, 1e4, 1e6, 1e9, 1e20, 1e36, 1e38)
CAPS = (0.5, 2.0, 10.0, 50.0, 1e3)
QUERIES, HEADS, DIM = 64, 1, 64
NAMES = ("out", "dq", "dk", "dv")
AT_ONCE = 1 << 23  # scores in float64

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One row of the page.

    Attributes:
        sweep: what is varied.
        dtype: a name in `DTYPES`.
        keys: how many.
        spread: standard deviation of the scores.
        softcap: cap of the scores, or None.
    """

    sweep: str
    dtype: str
    keys: int
    spread: float = 1.0
    softcap: float | None = None

    @property
    def scale(self) -> float:
        """The product of a normal query and key has the standard deviation sqrt(DIM)."""
        return self.spread / math.sqrt(DIM)


def settings(longest: int) -> Iterator[Setting]:
    """All rows, for at most so many keys."""
    for dtype in DTYPES:
        yield from (Setting("keys", dtype, keys) for keys in KEYS if keys <= longest)
        yield from (Setting("spread", dtype, 1024, spread) for spread in SPREADS)
        yield from (Setting("softcap", dtype, 1024, 10.0, cap) for cap in CAPS)


def operands(setting: Setting, device: str) -> list[Tensor]:
    """q, k, v and the cotangent of the output, [1, HEADS, n, DIM]."""
    generator = torch.Generator().manual_seed(0)
    lengths = QUERIES, setting.keys, setting.keys, QUERIES
    dtype = DTYPES[setting.dtype]
    return [torch.randn(1, HEADS, n, DIM, generator=generator).to(device, dtype) for n in lengths]


def truth(setting: Setting, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> list[Tensor]:
    """Output and gradients in float64, a few queries at a time."""
    q, k, v, dout = (x.double() for x in (q, k, v, dout))
    cap, scale = setting.softcap, setting.scale
    outs, dqs, dk, dv = [], [], torch.zeros_like(k), torch.zeros_like(v)
    for first in range(0, QUERIES, step := max(1, AT_ONCE // setting.keys)):
        some, d = q[:, :, first : first + step], dout[:, :, first : first + step]
        s = some @ k.mT * scale
        softcap_grad = torch.ones(()).double() if cap is None else 1 - (s / cap).tanh().square()
        p = (s if cap is None else cap * (s / cap).tanh()).softmax(-1)
        out = p @ v
        ds = p * (d @ v.mT - (d * out).sum(-1, keepdim=True)) * softcap_grad * scale
        outs.append(out)
        dqs.append(ds @ k)
        dk += ds.mT @ some
        dv += p.mT @ d
    return [torch.cat(outs, 2), torch.cat(dqs, 2), dk, dv]


def errors(attend: Attend, expected: list[Tensor], q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> dict[str, Any]:
    """RMS error over RMS truth of output and gradients; None where something is not finite."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    found = [out, *torch.autograd.grad(out, leaves, dout)]
    result: dict[str, Any] = {}
    for name, got, want in zip(NAMES, found, expected, strict=True):
        # Divided first: a gradient may be as large as float32 holds, and its square larger than float64 holds.
        largest = want.abs().max()
        error = ((got.detach().double() - want) / largest).square().mean().sqrt() / (
            want / largest
        ).square().mean().sqrt()
        result[name] = float(error) if bool(torch.isfinite(error)) else None
    return result


def measure(setting: Setting, device: str) -> dict[str, Any]:
    """The errors of our kernels and of SDPA; with a softcap, which SDPA does not know, of eager attention instead."""
    q, k, v, dout = operands(setting, device)
    expected = truth(setting, q, k, v, dout)
    cap, scale = setting.softcap, setting.scale

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sf.attention(q, k, v, scale=scale, softcap=cap)

    def other(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cap is None:
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        return (cap * (q @ k.mT * (scale / cap)).tanh()).softmax(-1) @ v

    row = asdict(setting)
    for name, attend in (("ours", ours), ("sdpa" if cap is None else "eager", other)):
        found = errors(attend, expected, q, k, v, dout)
        row |= {f"{name}_{part}": error for part, error in found.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--longest", type=int, default=KEYS[-1], help="keys")
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(setting, arguments.device) for setting in track(list(settings(arguments.longest)), "measuring")]
    for row in rows:
        print({name: value if not isinstance(value, float) else float(f"{value:.3g}") for name, value in row.items()})
    if not arguments.dry_run:
        print("written:", write("numerics", rows, backend="cpu" if arguments.device == "cpu" else "triton"))


if __name__ == "__main__":
    main()
