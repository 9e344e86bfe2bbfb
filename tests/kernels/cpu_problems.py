"""Attention problems of every shape at random, for checks of the compiled CPU kernel that its laws have no room for.

``python -m tests.kernels.cpu_problems FIRST COUNT [SECONDS]`` runs problems FIRST, FIRST + 1, ... in this process, at
most for so many seconds: each is compared with masked dense attention, and what a sanitizer finds ends the process.
SPARSEFLASH_CPU_LIBRARIES names the folder of libraries to load, SPARSEFLASH_CPU the level.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import sparseflash as sf
from sparseflash import LookupTable
from sparseflash import patterns as P
from sparseflash.kernels.cpu import levels, native
from tests.laws.test_decode import check as check_decoded
from tests.oracle import BIASES, Case, check, random_case, random_features

LIBRARIES = "SPARSEFLASH_CPU_LIBRARIES"
DIMS = (1, 7, 8, 9, 13, 16, 24, 32, 40, 64, 72, 96, 128)
BLOCKS = (16, 32, 64, 128, 256)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"), 3e38)


def use_libraries_of_environment() -> None:
    """Load the kernel from another folder than the package's, as one that was built with a sanitizer."""
    if folder := os.environ.get(LIBRARIES):
        name = os.environ[native.VARIABLE]
        # Whatever sources it is of: a test may have put a fault into them.
        native._chosen.append(native.Library(Path(folder) / f"{name}{levels.SUFFIX}", name))


@dataclass(frozen=True)
class Problem:
    """Operands, a mask, and what it says pair by pair."""

    case: Case
    table: LookupTable
    truth: torch.Tensor
    lengths: tuple[int, ...] = ()  # of decoding
    finite: bool = True

    def results(self) -> list[torch.Tensor]:
        """Out, lse and gradients, or of decoding out and lse."""
        c = self.case
        if self.lengths:
            named = c.features.arguments(c.features.sinks)
            del named["dropout_p"], named["seed"]
            lengths = torch.tensor(self.lengths)
            return list(sf.decode(c.q, c.k, c.v, self.table, lengths=lengths, scale=c.scale, return_lse=True, **named))
        given = (c.q, c.k, c.v, c.features.sinks, c.features.bias)
        leaves = [x.detach().requires_grad_() for x in given if x is not None]
        q, k, v = leaves[:3]
        named = c.arguments(leaves)
        out, lse = sf.attention(q, k, v, self.table, scale=c.scale, return_lse=True, backend="cpu", **named)
        torch.autograd.backward((out, lse), (c.dout, c.dlse))
        return [out.detach(), lse.detach(), *(x.grad for x in leaves if x.grad is not None)]

    def check(self, results: list[torch.Tensor]) -> None:
        """Compare with masked dense attention. Where numbers are not finite the laws say what holds; not here."""
        if not self.finite:
            return
        if self.lengths:
            check_decoded(self.case, self.truth, self.lengths, *results)
        else:
            check(self.case, self.truth, results)


def problem(seed: int) -> Problem:
    """The problem of a number."""
    dice = random.Random(seed)
    dtype = dice.choice([torch.float32, torch.bfloat16, torch.float16])
    batch, heads, group = dice.choice([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 1, 3), (1, 1, 4)])
    decoding = dice.random() < 0.25
    longest = dice.choice([20, 100, 300])
    kv_len = dice.randint(1, longest)
    q_len = kv_len if decoding else dice.randint(1, longest)
    block = dice.choice(BLOCKS), dice.choice(BLOCKS)
    dim = dice.choice(DIMS)
    v_dim = dim if dice.random() < 0.5 else dice.choice(DIMS)
    if dice.random() < 0.05:
        dim, v_dim, q_len, kv_len = 576, dice.choice([512, 576, 31]), min(q_len, 60), min(kv_len, 60)
        q_len = kv_len if decoding else q_len
    new = dice.randint(1, 16) if decoding else q_len
    case = random_case(seed, batch, heads, group, new, kv_len, dim, v_dim, dtype)
    if dice.random() < 0.5:
        case = random_features(
            case, seed, softcap=dice.choice([None, 0.5, 20.0]), alibi=dice.choice(["", "head", "sample"]),
            sinks=dice.choice([0.0, 1.0]), dropout_p=0.0 if decoding else dice.choice([0.0, 0.3]),
            bias="" if decoding else dice.choice(["", *BIASES]),
        )  # fmt: skip
    table, truth = _dynamic(dice, batch, heads * group, q_len, kv_len, block) if dice.random() < 0.15 else (
        _compiled(dice, batch, heads * group, q_len, kv_len, block, decoding)
    )  # fmt: skip
    case = replace(case, q_offset=table.q_offset)
    finite = dice.random() < 0.8
    if not finite:
        case = _poisoned(case, dice)
    q, k, v, dout = (_laid(x, dice) for x in (case.q, case.k, case.v, case.dout))
    case = replace(case, q=q, k=k, v=v, dout=dout)
    lengths = tuple(dice.randint(0, kv_len) for _ in range(batch)) if decoding else ()
    if decoding:
        truth = truth.expand(batch, heads * group, kv_len, kv_len)
    return Problem(case, table, truth, lengths, finite)


def _pattern(dice: random.Random, q_len: int, kv_len: int) -> P.Pattern:
    square = max(4, int(max(q_len, kv_len) ** 0.5) + 1)
    makers: list[Callable[[], P.Pattern]] = [
        P.full, P.causal, lambda: P.local(dice.randint(0, 80)), lambda: P.strided(dice.randint(1, 9)),
        lambda: P.butterfly(dice.randint(1, 40)), lambda: P.bigbird(dice.randint(1, 40), 3, 1, 1),
        lambda: P.global_tokens(dice.randint(0, 9)), lambda: P.streaming(dice.randint(0, 9), dice.randint(1, 60)),
        lambda: P.neighborhood((square, square * 2), (2, 1)), lambda: P.where(lambda q, k: (3 * q + k) % 5 == 0),
        lambda: ~P.full(), lambda: P.local(9) - P.local(2),
    ]  # fmt: skip
    found = dice.choice(makers)()
    return found & dice.choice(makers)() if dice.random() < 0.2 else found


def _compiled(
    dice: random.Random, batch: int, heads: int, q_len: int, kv_len: int, block: tuple[int, int], decoding: bool
) -> tuple[LookupTable, torch.Tensor]:
    def one() -> P.Pattern:
        return _pattern(dice, q_len, kv_len)

    pattern = one()
    if heads > 1 and dice.random() < 0.4:
        pattern = P.per_head(*(one() if i % 3 else pattern for i in range(heads)))
    if batch == 2 and dice.random() < 0.4:
        pattern = P.per_sample(pattern, one())
    offset = 0 if decoding else dice.choice([None, 0, dice.randint(-20, 20)])
    mask = pattern.compile((q_len, kv_len), block=block, q_offset=offset)
    return sf.lookup(mask), torch.from_numpy(mask.to_dense())


def _dynamic(
    dice: random.Random, batch: int, heads: int, q_len: int, kv_len: int, block: tuple[int, int]
) -> tuple[LookupTable, torch.Tensor]:
    (bq, bk), samples = block, dice.choice([1, batch])
    lines, columns = -(-q_len // bq), -(-kv_len // bk)
    rows = [[[*dice.sample(range(columns), dice.randint(0, columns))] for _ in range(lines)] for _ in range(samples)]
    # A row with fewer blocks names one that is not there in the rest of its room.
    indices = torch.tensor([[chosen + [columns] * (columns - len(chosen)) for chosen in sample] for sample in rows])
    table = LookupTable.from_indices(indices[:, None], shape=(q_len, kv_len), block=block, q_offset=0, q_heads=heads)
    seen = torch.zeros((samples, 1, q_len, kv_len), dtype=torch.bool)
    for b, sample in enumerate(rows):
        for row, chosen in enumerate(sample):
            for col in chosen:
                seen[b, 0, row * bq : (row + 1) * bq, col * bk : (col + 1) * bk] = True
    return table, seen


def _poisoned(case: Case, dice: random.Random) -> Case:
    """A few rows of operands are not finite, or so large that sums of them are not."""
    changed = {}
    for name in dice.sample(["q", "k", "v", "dout"], dice.randint(1, 2)):
        x = getattr(case, name).clone()
        for _ in range(dice.randint(1, 3)):
            at = tuple(dice.randrange(n) for n in x.shape)
            x[at[:3] if dice.random() < 0.5 else at] = dice.choice(NOT_FINITE)
        changed[name] = x
    return replace(case, **changed)


def _laid(x: torch.Tensor, dice: random.Random) -> torch.Tensor:
    """The same numbers with any strides and any offset, in memory that ends where they end."""
    order = [0, 1, 2]
    dice.shuffle(order)
    strides, size = [0, 0, 0], x.shape[3] + dice.choice([0, 0, 1, 3, 8])
    for axis in order:
        strides[axis] = size
        size *= x.shape[axis]
    offset = dice.choice([0, 0, 1, 3, 8])
    extent = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=False)) + x.shape[3]
    memory = torch.full((offset + extent,), float("nan"), dtype=x.dtype)
    laid = memory.as_strided(x.shape, (*strides, 1), offset)
    laid.copy_(x)
    return laid


def numbered(first: int, count: int, seconds: float = 1e9) -> Iterator[int]:
    """Numbers from `first` on, for at most so many seconds of this process."""
    until = time.process_time() + seconds
    for seed in range(first, first + count):
        if time.process_time() > until:
            return
        yield seed


def main(arguments: list[str]) -> None:
    use_libraries_of_environment()
    assert native.library() is not None, native.missing()
    torch.set_num_threads(2)
    first, count, *rest = (float(x) for x in arguments)
    done = 0
    for seed in numbered(int(first), int(count), *rest):
        # Said before it runs: a sanitizer leaves no time after.
        print(f"problem {seed}", file=sys.stderr, flush=True)
        one: Any = problem(seed)
        one.check(one.results())
        done += 1
    print(f"{done} problems on {native.library().name}")  # type: ignore[union-attr]


if __name__ == "__main__":
    main(sys.argv[1:])
