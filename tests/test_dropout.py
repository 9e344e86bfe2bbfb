"""Dropout's bits as random numbers: mean, independence of rows, columns, heads and seeds, uniform bytes.

Every bound is at 6 standard deviations of the statistic under true randomness. The bits are fixed by the seeds here, so
a test that passes passes always.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import sparseflash as sf
from sparseflash.kernels import dropout
from sparseflash.reference import dropout_mask

SEEDS = (0, 1, -1, 2**31, 2**32, 2**63 - 1)
EXPECTED = [
    "011110000111011110010010",
    "111010011110111010011011",
    "001010001000111010101100",
    "011001000010000000100010",
]


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_kept_share(p: float) -> None:
    for seed in SEEDS:
        kept = dropout_mask((2, 3, 256, 300), p, seed).double()
        one = (p * (1 - p)) ** 0.5  # of one bit
        assert abs(kept.mean() - (1 - p)) < 6 * one / kept.numel() ** 0.5
        for dims in ((0, 1, 2), (0, 1, 3), (2, 3)):  # of every column, row, head
            means = kept.mean(dims)
            assert (means - (1 - p)).abs().max() < 6 * one / (kept.numel() / means.numel()) ** 0.5


def test_rows_columns_heads_and_seeds_are_uncorrelated() -> None:
    signs = torch.stack([dropout_mask((2, 2, 128, 4096), 0.5, seed) for seed in (0, 1, 2**32)]).double() * 2 - 1
    rows = signs.flatten(0, 3)  # one line a (seed, sample, head, query)
    correlation = rows @ rows.T / rows.shape[1] - torch.eye(len(rows))
    assert correlation.abs().max() < 6.5 / rows.shape[1] ** 0.5  # 6 for one of them; there are a million pairs
    columns = signs.flatten(0, 3).T[:1024]
    correlation = columns @ columns.T / columns.shape[1] - torch.eye(len(columns))
    assert correlation.abs().max() < 6.5 / columns.shape[1] ** 0.5


def test_neighbouring_rows_are_not_shifts_of_each_other() -> None:
    signs = dropout_mask((1, 1, 64, 2048), 0.5, 3).double()[0, 0] * 2 - 1
    for shift in range(1, 64):
        a, b = signs[:, shift:], signs[:, :-shift]
        correlation = a @ b.T / a.shape[1]
        assert correlation.abs().max() < 6.5 / a.shape[1] ** 0.5, f"shift {shift}"


def test_every_byte_of_the_hash_is_uniform() -> None:
    rows = dropout.row_keys(torch.tensor(11), torch.arange(4)[:, None], torch.arange(128))
    hashed = dropout._mixed(
        rows[..., None] + (torch.arange(2048) + 1).to(torch.int32) * dropout._signed(dropout.GOLDEN)
    )
    for place in range(4):
        counts = torch.bincount(((hashed >> (8 * place)) & 255).flatten(), minlength=256).double()
        expected = hashed.numel() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5, f"byte {place}"


def test_bits_stay_what_they_are() -> None:
    """Written down once: a change of the hash would change every training run that resumes."""
    bits = dropout_mask((1, 2, 2, 24), 0.5, 2024)[0].int()
    text = ["".join(map(str, row.tolist())) for head in bits for row in head]
    assert text == EXPECTED


def test_the_hash_in_plain_integers() -> None:
    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    def absorb(x: int, y: int) -> int:
        return mix(((x ^ y) + 0x9E3779B9) % 2**32)

    seed, p = -(2**40) - 77, 0.3
    kept = dropout_mask((2, 2, 5, 9), p, seed)
    for b, h, i, j in itertools.product(range(2), range(2), range(5), range(9)):
        word = seed % 2**64
        row = absorb(absorb(absorb(0, word % 2**32), word >> 32), b * 2 + h)
        row = absorb(row, absorb(0, i))
        hashed = mix((row + (j + 1) * 0x9E3779B9) % 2**32)
        assert kept[b, h, i, j] == (hashed >> 8 < round((1 - p) * 2**24))


def test_all_24_bits_count() -> None:
    rows, keys = dropout.row_keys(torch.tensor(5), torch.tensor(0), torch.tensor(0)), torch.arange(64)
    for key in keys:
        low, high = 0, dropout.ONE  # the smallest limit that keeps this key, found by halving
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if dropout.keep_mask(rows, key, middle) else (middle + 1, high)
        hashed = dropout._mixed(rows + (key + 1).to(torch.int32) * dropout._signed(dropout.GOLDEN))
        assert low - 1 == (int(hashed) >> 8) % dropout.ONE


def test_the_mean_over_seeds_is_attention_without_dropout() -> None:
    q, k, v = torch.randn(3, 1, 2, 24, 16, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    mask, runs = sf.patterns.causal().compile(24, block=16), 1500
    outs = torch.stack([sf.attention(q, k, v, mask, dropout_p=0.25, seed=seed) for seed in range(runs)])
    far = (outs.mean(0) - sf.attention(q, k, v, mask)).abs() / (outs.std(0) / runs**0.5 + 1e-12)
    assert far.max() < 6


def test_seeds_of_the_default_generator() -> None:
    q = torch.randn(1, 1, 30, 16)

    def draw(seed: int | torch.Tensor | None = None) -> torch.Tensor:
        return sf.attention(q, q, q, dropout_p=0.5, seed=seed)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw())
    assert not torch.equal(first, second)
    assert torch.equal(draw(5), draw(torch.tensor(5)))
    state = torch.get_rng_state()
    sf.attention(q, q, q)
    sf.attention(q, q, q, dropout_p=0.5, seed=2)
    assert torch.equal(state, torch.get_rng_state()), "only dropout without a seed draws"


def test_checkpointing_draws_the_same_bits_again() -> None:
    from torch.utils.checkpoint import checkpoint

    q = torch.randn(1, 1, 30, 16, requires_grad=True)

    def layer(q: torch.Tensor) -> torch.Tensor:
        return sf.attention(q, q, q, sf.patterns.causal(), dropout_p=0.5).square()

    gradients = []
    for run in (layer, lambda q: checkpoint(layer, q, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(run(q).sum(), q)[0])
    assert torch.equal(*gradients)
