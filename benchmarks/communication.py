"""Bytes that context parallel attention moves, and how even its work is, counted from the tables; no processes needed.

python -m benchmarks.communication            # prints and writes results/<device>/<date>-{communication,balance}.json
python -m benchmarks.communication --dry-run  # prints only
python -m benchmarks.communication --longest 1048576
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, get_args

from rich.progress import Progress

from benchmarks.masks import lengths as document_lengths
from benchmarks.record import write
from sparseflash import BlockMask
from sparseflash import patterns as P
from sparseflash.distributed import Plan, Sharding, plan
from sparseflash.distributed.comm_volume import Operands, received, ring_forward
from sparseflash.distributed.sharding import Partition
from sparseflash.patterns import Pattern

LENGTHS = (1 << 16, 1 << 20, 1 << 24)
RANKS = (2, 4, 8, 16, 32, 64)
BLOCK = 128
# One layer of a model with grouped queries, in half precision.
OPERANDS = Operands(q_heads=32, kv_heads=8, dim=128, v_dim=128, itemsize=2)

MASKS: dict[str, Callable[[int], Pattern]] = {
    "causal()": lambda n: P.causal(),
    "local(1024)": lambda n: P.local(1024),
    "butterfly(unit=128)": lambda n: P.butterfly(unit=128),
    "causal() & (local(1024) | butterfly(unit=128))": lambda n: P.causal() & (P.local(1024) | P.butterfly(unit=128)),
    "documents(random, near 1000)": lambda n: P.documents(document_lengths(n)),
    "causal() & documents(random, near 1000)": lambda n: P.causal() & P.documents(document_lengths(n)),
    "bigbird()": lambda n: P.bigbird(),
    "longformer(512)": lambda n: P.longformer(512),
}


def counted(mask: BlockMask, ranks: int, partition: Partition) -> Plan:
    """The plan of self-attention over a mask with this partition."""
    sharding = Sharding.of(mask, ranks, partition)
    return plan(mask, sharding, sharding)


def measure(name: str, mask: BlockMask) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of bytes and a row of balance, over all numbers of ranks."""
    seq_len = mask.shape[0]
    bytes_row: dict[str, Any] = {"expression": name, "seq_len": seq_len, "density": mask.density}
    balance_row: dict[str, Any] = {"expression": name, "seq_len": seq_len, "blocks": mask.nnz}
    for ranks in RANKS:
        for partition in get_args(Partition):
            whole = counted(mask, ranks, partition)
            balance_row[f"{partition}_{ranks}"] = _short(whole.work.max() / whole.work.mean())
            forward, backward = received(whole, OPERANDS)
            ring = ring_forward(seq_len, ranks, OPERANDS)
            bytes_row[f"{partition}_max_{ranks}"] = _short(forward.max() / ring)
            bytes_row[f"{partition}_mean_{ranks}"] = _short(forward.mean() / ring)
            if partition == "weight":
                bytes_row[f"ring_mb_{ranks}"] = _short(ring / 1e6)
                bytes_row[f"forward_mb_{ranks}"] = _short(forward.max() / 1e6)
                bytes_row[f"backward_mb_{ranks}"] = _short(backward.max() / 1e6)
    return bytes_row, balance_row


def _short(value: float) -> float:
    """Six digits: what is counted is exact, but nobody reads more."""
    return float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print without writing result files")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="leave out longer sequences")
    arguments = parser.parse_args()
    rows = []
    cases = [(n, name) for n in LENGTHS if n <= arguments.longest for name in MASKS]
    with Progress() as progress:
        print = progress.console.print
        task = progress.add_task("counting", total=len(cases))
        for seq_len, name in cases:
            progress.update(task, description=f"{name} at {seq_len:,}")
            moved, work = measure(name, MASKS[name](seq_len).compile(seq_len, block=BLOCK))
            rows.append((moved, work))
            print(
                f"{name:<48} {seq_len:>10,}  of a ring's bytes "
                + " ".join(f"{moved[f'weight_max_{r}']:7.2%}" for r in RANKS)
                + "  heaviest over mean "
                + " ".join(f"{work[f'weight_{r}']:5.2f}" for r in RANKS),
                markup=False,
                soft_wrap=True,
            )
            progress.advance(task)
    if not arguments.dry_run:
        for part, which in (("communication", 0), ("balance", 1)):
            print("written:", str(write(part, [row[which] for row in rows], ranks=RANKS, operands=vars(OPERANDS))))


if __name__ == "__main__":
    main()
