"""What users of FlexAttention write, in every shape that PyTorch's own tests of it use, beside torch's results.

Source of the cases: PyTorch, test/inductor/test_flex_attention.py, and attention-gym, attn_gym/masks and attn_gym/mods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

from sparseflash import flex as ours

# Said by FlexAttention once a process when it is not compiled; its plain implementation is what we compare with.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
B, H, N = 2, 4, 96
INF = float("inf")
Mod = Callable[..., Tensor]


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).double()


OF_HEAD, OF_SAMPLE, OF_TOKEN, PAIRS = numbers(H), numbers(B + 3), numbers(2 * N), numbers(2 * N, 2 * N)
NEAREST = torch.randint(0, 9, (B, N, N), generator=torch.Generator().manual_seed(0))
MANY = numbers(B + 3, 2 * N, 4)
SLOPES = torch.exp2(-(torch.arange(4 * H) + 1) * 8.0 / (4 * H))
DOCUMENT, HALF = torch.arange(4 * N) // 17, torch.arange(4 * N) >= N // 2
BIDIRECTIONAL, ONE = torch.tensor([5, 40, 0, 90, 17]), torch.ones((), dtype=torch.int32)
WIDTH = 8


def causal(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i >= j, s, -INF)


def not_causal(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where(i <= j, s, -INF)


def neighbors(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    rows, columns = (i // WIDTH - j // WIDTH).abs(), (i % WIDTH - j % WIDTH).abs()
    return torch.where((rows <= 3) | (columns <= 3), s, -INF)


def dependent(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    number = BIDIRECTIONAL[b]
    return torch.where(((i <= number) & (j <= number)) | (i >= j), s, -INF)


def all_dimensions(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return s + OF_TOKEN[i] + OF_SAMPLE[b] + OF_HEAD[h % H]


def packed_alibi(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return torch.where((i >= j) & (DOCUMENT[i] == DOCUMENT[j]), s + (j - i) * SLOPES[h], -INF)


SCORE_MODS: dict[str, Mod] = {
    "identity": lambda s, b, h, i, j: s,
    "times two": lambda s, b, h, i, j: s * 2,
    "causal": causal,
    "inverse causal": not_causal,
    "relative, causal": lambda s, b, h, i, j: torch.where(i >= j, s + (i - j), -INF),
    "relative, not causal": lambda s, b, h, i, j: not_causal(s + (i - j), b, h, i, j),
    "alibi, causal": lambda s, b, h, i, j: causal(s + (j - i) * SLOPES[h], b, h, i, j),
    "alibi of both sides": lambda s, b, h, i, j: s - (i - j).abs() * SLOPES[h],
    "packed alibi": packed_alibi,
    "head offset": lambda s, b, h, i, j: s * OF_HEAD[h % H],
    "factor of queries": lambda s, b, h, i, j: s * OF_TOKEN[i],
    "odd keys": lambda s, b, h, i, j: torch.where(j % 2 == 0, s, -INF),
    "documents": lambda s, b, h, i, j: torch.where((i >= j) & (DOCUMENT[i] == DOCUMENT[j]), s, -INF),
    "halves": lambda s, b, h, i, j: torch.where(HALF[i] == HALF[j], s, -INF),
    "dependent": dependent,
    "neighbors": neighbors,
    "softcap": lambda s, b, h, i, j: 20 * torch.tanh(s / 20),
    "softcap, causal": lambda s, b, h, i, j: causal(0.5 * torch.tanh(s / 0.5), b, h, i, j),
    "all dimensions": all_dimensions,
    "captured number": lambda s, b, h, i, j: s + ONE,
    "indexed twice": lambda s, b, h, i, j: s + MANY[b][i][2],
    "captured reduction": lambda s, b, h, i, j: s + MANY[b, i].sum(),
    "relative": lambda s, b, h, i, j: s + (i - j),
    "alibi": lambda s, b, h, i, j: s + (j - i) * SLOPES[h],
    "relative table": lambda s, b, h, i, j: s + OF_TOKEN[(i - j) + N],
    "dense table": lambda s, b, h, i, j: s + PAIRS[i % N, j % N],
    "floor division": lambda s, b, h, i, j: s - i // (1 + j),
    "latent": lambda s, b, h, i, j: s + torch.dot(MANY[b, i], MANY[b, j]),
    "graph distances": lambda s, b, h, i, j: s + OF_TOKEN[NEAREST[b % B, i % N, j % N]] * OF_HEAD[h % H],
    "sandwich": lambda s, b, h, i, j: s + torch.cos((i - j) * SLOPES / 3).sum() * (h + 1) / H,
}
# Kernels compute no other function of a score.
REFUSED: dict[str, Mod] = {
    "squared": lambda s, b, h, i, j: s * s,
    "activation": lambda s, b, h, i, j: torch.log(torch.nn.functional.gelu(s) + 1),
    "silu": lambda s, b, h, i, j: torch.nn.functional.silu(s),
    "trigonometry": lambda s, b, h, i, j: torch.sin(torch.cos(s)) + torch.tan(b),
    "padded": lambda s, b, h, i, j: torch.where(s <= b, s, -INF),
}
# Samples, query heads, key samples, key heads, queries, keys, head dim, value dim, BLOCK_SIZE of a causal mask or None.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, Any]] = {
    "plain": (B, H, B, H, N, N, 16, 16, None),
    "fewer queries": (B, H, B, H, N // 2, N, 16, 16, None),
    "more queries": (B, H, B, H, N, 40, 16, 8, None),
    "grouped": (B, 4 * H, B, H, 37, 37, 16, 16, 128),
    "one key sample": (5, H, 1, 2, N, N, 16, 16, (128, 256)),
    "blocks": (B, H, B, H, 67, 77, 8, 24, (32, 16)),
    "one token": (B, H, B, H, 1, 77, 16, 16, None),
}


def operands(shape: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    samples, heads, key_samples, key_heads, q_len, kv_len, dim, value_dim, _ = shape
    q = numbers(samples, q_len, heads, dim).transpose(1, 2)
    return q, numbers(key_samples, key_heads, kv_len, dim), numbers(key_samples, key_heads, kv_len, value_dim)


@pytest.mark.tier2
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", SCORE_MODS | REFUSED)
def test_score_mods_of_torchs_tests(name: str, shape: str) -> None:
    sizes = SHAPES[shape]
    q, k, v = operands(sizes)
    score_mod = (SCORE_MODS | REFUSED)[name]
    results = []
    for flex in (ours, theirs):
        mask = None
        if sizes[-1] is not None:
            mask = flex.create_block_mask(
                lambda b, h, i, j: i >= j, None, None, sizes[4], sizes[5], "cpu", BLOCK_SIZE=sizes[-1]
            )

        def call(flex: Any = flex, mask: Any = mask) -> list[Tensor]:
            aux = ours.AuxRequest(lse=True)
            key, value = (x.expand(len(q), -1, -1, -1) for x in (k, v)) if flex is theirs else (k, v)
            out, told = flex.flex_attention(
                q, key, value, score_mod, mask, enable_gqa=sizes[1] != sizes[3], return_aux=aux
            )
            return [out, told.lse]

        if name in REFUSED and flex is ours:
            with pytest.raises(NotImplementedError, match="It runs in torch, over the same mask"):
                call()
            return
        results.append(call())
    (out, lse), (want, want_lse) = results
    # torch's plain implementation adds biases in float32, and its log-sum-exp is in float32.
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    for size, got, expected in zip(out.shape, out.stride(), want.stride(), strict=True):
        assert got == expected or size == 1
    torch.testing.assert_close(lse, want_lse.to(lse.dtype), rtol=1e-5, atol=1e-5)


def block_diffusion(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    half = N // 2
    noised, of_key = q < half, k < half
    block, block_of_key = (q % half) // 8, (k % half) // 8
    inside = (block == block_of_key) & (noised == of_key)
    before = (block > block_of_key) & noised & ~of_key
    return inside | before | ((block >= block_of_key) & ~noised & ~of_key)


def natten(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Windows that are moved inside at the rim, as NATTEN's."""
    rows = N // WIDTH
    y, x = (q // WIDTH).clamp(1, rows - 2), (q % WIDTH).clamp(1, WIDTH - 2)
    return ((y - k // WIDTH).abs() <= 1) & ((x - k % WIDTH).abs() <= 1)


GLOBAL = torch.zeros(4 * N, dtype=torch.bool)
GLOBAL[[0, 11, 50]] = True
OFFSETS = torch.cumsum(torch.tensor([0, 20, 13, 30, 33]), 0)
PREFIX_OF = torch.tensor([0, 0, 0, 3] + [3] * 20)
ANCESTORS = torch.ones(4 * N, 4 * N, dtype=torch.bool).tril() & (torch.rand(4 * N, 4 * N) < 0.5)
IMAGES = torch.tensor([[0, 30], [30, 60], [40, 96]])
CHOSEN = torch.tensor([[0, 2], [1, 3], [2, 5], [4, 5], [0, 1], [3, 4]])


def shared_prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    same, of_prefix = DOCUMENT[q] == DOCUMENT[k], PREFIX_OF[DOCUMENT[q]] == DOCUMENT[k]
    return (same & (q >= k)) | of_prefix


def in_documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Positions within documents, of a mask of each."""
    start = DOCUMENT * 17
    here, there = q - start[q], k - start[k]
    return (DOCUMENT[q] == DOCUMENT[k]) & (here >= there) & (here - there <= 7)


def of_images(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    interval = IMAGES[(k // 32).clamp(max=2)]
    return (q >= interval[..., 0]) & (q < interval[..., 1])


def selected(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (CHOSEN[(q // 16).clamp(max=5)] == (k // 16).unsqueeze(-1)).any(-1)


def sheared(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.floor(q / 16) * 16 + 20 > k


MASK_MODS: dict[str, Mod] = {
    "causal": lambda b, h, q, k: q >= k,
    "everything": ours.noop_mask,
    "half of the queries": lambda b, h, q, k: q < N // 2,
    "window": lambda b, h, q, k: (q >= k) & (q - k <= 10),
    "dilated": lambda b, h, q, k: ((q - k).abs() <= 24) & ((q - k).abs() % 4 == 0),
    "global and window": lambda b, h, q, k: ((q - k).abs() <= 10) | GLOBAL[q] | GLOBAL[k],
    "prefix": ours.or_masks(lambda b, h, q, k: k < 20, lambda b, h, q, k: q >= k),
    "batches": lambda b, h, q, k: (q // 24 == k // 24) & (q % 24 >= k % 24),
    "documents": in_documents,
    "clamped documents": lambda b, h, q, k: DOCUMENT[q.clamp(0, 90)] == DOCUMENT[k.clamp(0, 90)],
    "halves": lambda b, h, q, k: HALF[q] == HALF[k],
    "two stretches": lambda b, h, q, k: (k < 16) | (k >= 64),
    "block diffusion": block_diffusion,
    "natten": natten,
    "shared prefix": shared_prefix,
    "tree": lambda b, h, q, k: (k < 20) | ANCESTORS[q, (k - 20).clamp(min=0)] & (k >= 20),
    "images": of_images,
    "selected blocks": selected,
    "rounded": sheared,
    "samples": lambda b, h, q, k: (q >= k) & (k < BIDIRECTIONAL[b] + 3),
    "heads": lambda b, h, q, k: (q - k).abs() <= 10 * (h + 1),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MASK_MODS)
def test_masks_of_torchs_tests_and_of_attention_gym(name: str, shape: str) -> None:
    sizes = SHAPES[shape]
    mask_mod = MASK_MODS[name]
    q, k, v = operands(sizes)
    made, torchs = (
        flex.create_block_mask(
            mask_mod, sizes[0], sizes[1], sizes[4], sizes[5], "cpu", BLOCK_SIZE=64 if sizes[-1] is None else sizes[-1]
        )
        for flex in (ours, theirs)
    )
    assert torch.equal(made.to_dense(), torchs.to_dense())
    assert torch.equal(made.kv_num_blocks, torchs.kv_num_blocks)
    out, lse = ours.flex_attention(q, k, v, block_mask=made, enable_gqa=sizes[1] != sizes[3], return_lse=True)
    seen = theirs.create_mask(mask_mod, sizes[0], sizes[1], sizes[4], sizes[5], device="cpu")
    key, value = (x.expand(len(q), -1, -1, -1).repeat_interleave(sizes[1] // sizes[3], 1) for x in (k, v))
    scores = (q @ key.mT / math.sqrt(sizes[6])).masked_fill(~seen, -INF)
    torch.testing.assert_close(out, torch._safe_softmax(scores, -1) @ value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-9, atol=1e-9)


def test_how_many_run() -> None:
    """Programs by shapes: 357 run, 35 are refused by name."""
    assert (len(SCORE_MODS) + len(MASK_MODS)) * len(SHAPES) == 357
    assert len(REFUSED) * len(SHAPES) == 35
