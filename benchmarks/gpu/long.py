"""Sequences of a million tokens, and tensors of more than 2^31 elements, against row-sampled dense attention."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from benchmarks.gpu.contenders import ours
from benchmarks.gpu.correctness import disagreement, drawn_rows, rows_of
from benchmarks.gpu.machine import Machine, gpu
from sparseflash import patterns as P
from sparseflash.patterns import Pattern


@dataclass(frozen=True)
class Long:
    """One case.

    Attributes:
        name: what it is about.
        pattern: of the mask.
        seq_len, heads, kv_heads, head_dim: of operands in [batch, tokens, heads, dim] memory, as models have them.
        rows: queries that are compared.
    """

    name: str
    pattern: Pattern
    seq_len: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 12

    @property
    def elements(self) -> int:
        """Of q."""
        return self.seq_len * self.heads * self.head_dim


MILLION = 1 << 20
CASES = (
    Long("a million tokens", P.causal() & (P.local(1024) | P.butterfly(unit=128)), MILLION, 2, 1, 64),
    Long("a million tokens that see a heavy line", P.local(256) | P.global_tokens(16), MILLION, 1, 1, 128),
    Long("2.4 x 10^9 elements of q, k and v", P.causal() & P.local(512), MILLION, 18, 18, 128),
)


def wrong(case: Long, machine: Machine, dtype: torch.dtype = torch.bfloat16) -> str | None:
    """What disagrees, or None; the last head is compared, whose addresses are the largest."""
    generator = torch.Generator(machine.device).manual_seed(0)

    def draw(heads: int) -> torch.Tensor:
        shape = 1, case.seq_len, heads, case.head_dim
        return torch.randn(shape, generator=generator, device=machine.device, dtype=dtype).transpose(1, 2)

    rows = drawn_rows(case.seq_len, case.rows)
    mask = case.pattern.compile(case.seq_len)
    token_mask = rows_of(case.pattern, rows, case.seq_len)
    operands = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    return disagreement(ours(mask, machine.device), *operands, rows, token_mask)


def main(machine: Machine, cases: tuple[Long, ...] = CASES, dtype: torch.dtype = torch.bfloat16) -> int:
    """Go through the cases; 1 if one is wrong."""
    bad = 0
    for case in cases:
        found = wrong(case, machine, dtype)
        machine.empty_cache()
        bad += found is not None
        print(f"{case.name}: {case.pattern}, {case.elements:,} elements in q: {found or 'agrees'}", flush=True)
    print(f"{len(cases) - bad} of {len(cases)} cases agree with masked dense attention of their sampled queries")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(gpu()))
