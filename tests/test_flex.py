"""FlexAttention's block masks to ours and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import (
    BlockMask as FlexMask,
)
from torch.nn.attention.flex_attention import (
    and_masks,
    create_block_mask,
    flex_attention,
    noop_mask,
)
from torch.utils._python_dispatch import TorchDispatchMode

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.integrations import flex
from sparseflash.integrations.flex import from_flex, to_flex
from sparseflash.integrations.mask_mods import MaskMod, Recording
from sparseflash.patterns import BlockMask, Pattern
from tests.oracle import random_case
from tests.strategies import Shape, expressions, leaves, per_head, per_sample, shapes

# Said by FlexAttention once a process when it is not compiled; its plain implementation is what we compare with.
unfused = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
inside_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler


def created(mod: MaskMod, q_len: int, kv_len: int, block: int = 64, B: int | None = None, H: int | None = None) -> Any:
    return create_block_mask(mod, B, H, q_len, kv_len, device="cpu", BLOCK_SIZE=block)


@given(expressions() | per_head(2) | per_sample(), shapes(300))
def test_there_and_back_is_the_identity(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    theirs = to_flex(mask)
    assert from_flex(theirs, q_offset=mask.q_offset) == mask
    assert theirs.full_kv_num_blocks is not None
    assert theirs.kv_num_blocks.sum() + theirs.full_kv_num_blocks.sum() == mask.nnz
    assert theirs.full_kv_num_blocks.sum() == mask.full_blocks


TABLE = torch.from_numpy(np.random.default_rng(0).random((1, 30, 30)) < 0.4)
START = torch.zeros(1)
DOCUMENT = torch.tensor([0] * 70 + [1] * 130 + [2] * 100)
MODS: dict[str, tuple[MaskMod, Pattern]] = {
    "causal": (lambda b, h, q, k: q >= k, P.causal()),
    "window": (lambda b, h, q, k: (q >= k) & (q - k <= 77), P.causal() & P.local(77)),
    "document": (lambda b, h, q, k: DOCUMENT[q] == DOCUMENT[k], P.documents([70, 130, 100])),
    "prefix": (lambda b, h, q, k: (q >= k) | (k < 90), P.prefix(90)),
    "everything": (noop_mask, P.full()),
    "nothing": (lambda b, h, q, k: q < 0, P.full() - P.full()),
    "combined": (and_masks(lambda b, h, q, k: q >= k, lambda b, h, q, k: k >= 0), P.causal()),
    "tables": (
        lambda b, h, q, k: TABLE[h, q // 10, k // 10] & (START[b] <= k),
        P.from_blocks(TABLE[0].numpy(), unit=10),
    ),
    "a vector inside": (
        lambda b, h, q, k: (k == torch.tensor([3, 200])).any(),
        P.where(lambda q, k: (k == 3) | (k == 200) | (q < 0)),
    ),
}


@pytest.mark.parametrize("name", MODS)
@pytest.mark.parametrize("separate", [True, False], ids=["full apart", "all partial"])
def test_a_mask_mod_is_the_pattern_of_the_same_truth(name: str, separate: bool) -> None:
    mod, pattern = MODS[name]
    if not separate and "separate_full_blocks" not in inspect.signature(create_block_mask).parameters:
        pytest.skip("this torch always lists FULL blocks apart")
    apart = {} if separate else {"separate_full_blocks": False}
    theirs = create_block_mask(mod, None, None, 300, 300, device="cpu", BLOCK_SIZE=64, **apart)
    assert from_flex(theirs, B=1, H=1) == pattern.compile(300, block=64)


@pytest.mark.parametrize(("q_len", "kv_len"), [(300, 300), (256, 257), (17, 400), (400, 17)])
@pytest.mark.parametrize("block", [16, 128])
def test_ragged_and_unequal_lengths(q_len: int, kv_len: int, block: int) -> None:
    mask = from_flex(created(lambda b, h, q, k: (q >= k) | (k % 7 == 0), q_len, kv_len, block))
    same = P.where(lambda q, k: (q >= k) | (k % 7 == 0)).compile((q_len, kv_len), block=block, q_offset=0)
    assert mask == same
    assert mask.q_offset == 0, "a mask_mod counts queries from 0"
    assert from_flex(created(noop_mask, q_len, kv_len, block), q_offset=kv_len - q_len).q_offset == kv_len - q_len


def test_samples_and_heads() -> None:
    theirs = created(lambda b, h, q, k: (q - k).abs() <= 10 + 20 * h + 100 * b, 200, 200, B=2, H=3)
    expected = P.per_sample(*(P.per_head(*(P.local(10 + 20 * h + 100 * b) for h in range(3))) for b in range(2)))
    assert from_flex(theirs) == expected.compile(200, block=64)
    by_head = created(lambda b, h, q, k: (q - k).abs() <= 10 + h // 2, 200, 200, H=4)
    mask = from_flex(by_head)
    assert mask == P.per_head(*(P.local(10 + h // 2) for h in range(4))).compile(200, block=64)
    assert mask.patterns == 2


LENGTHS = torch.tensor([70, 200])


@pytest.mark.parametrize("B", [None, 2], ids=["one table", "a table each"])
def test_one_table_for_all_samples_is_asked_about_each_of_them(B: int | None) -> None:
    def keys_of_sample(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return k < LENGTHS[b]

    counts = torch.full((B or 1, 1, 4), 4).int()
    indices = torch.arange(4).int().expand(B or 1, 1, 4, 4)
    theirs = FlexMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=64, mask_mod=and_masks(keys_of_sample), seq_lengths=(200, 200)
    )
    short, long = P.where(lambda q, k: (q >= 0) & (k < 70)), P.full()
    assert from_flex(theirs, B=2) == P.per_sample(short, long).compile(200, block=64)
    with pytest.raises(
        ValueError, match=r"reads b, the index of the sample.*from_flex\(block_mask, B=\.\.\.\)|tables for B=2, got B=3"
    ):
        from_flex(theirs, B=B and 3)


def test_one_table_for_all_heads_is_asked_about_each_of_them() -> None:
    theirs = created(lambda b, h, q, k: (q >= k) & (q - k <= 10 + 20 * h), 200, 200)
    with pytest.raises(ValueError, match=r"reads h, the index of the head.*from_flex\(block_mask, H=\.\.\.\)"):
        from_flex(theirs)
    mask = from_flex(theirs, H=1)
    assert mask == (P.causal() & P.local(10)).compile(200, block=64)
    # Which blocks exist was decided by head 0; within them each head gets its own answer, as in FlexAttention.
    head_1 = from_flex(theirs, H=2).to_dense()[1]
    q, k = np.arange(200)[:, None], np.arange(200)
    listed = np.kron(theirs.to_dense()[0, 0].numpy(), np.ones((64, 64), bool))[:200, :200].astype(bool)
    np.testing.assert_array_equal(head_1, (q >= k) & (q - k <= 30) & listed)


class Window:
    width = 3

    def __call__(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q - k < self.width


def written(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scratch = b.new_zeros(2)
    scratch[0] = b
    return scratch[0] <= k


@pytest.mark.parametrize(
    ("mod", "looks"),
    [
        (and_masks(noop_mask, MODS["causal"][0]), (False, False)),
        (MODS["document"][0], (False, False)),
        (MODS["tables"][0], (True, True)),
        (lambda b, h, q, k: k < LENGTHS[b], (True, False)),
        (lambda b, h, q, k: q - k < torch.vmap(lambda n: n + h)(LENGTHS).sum(), (False, True)),
        (written, (True, True)),
        (Window(), (False, False)),
    ],
)
def test_what_a_mask_mod_looks_at_is_known(mod: MaskMod, looks: tuple[bool, bool]) -> None:
    recording = Recording.of(mod, torch.device("cpu"))
    assert looks == (recording.looks_at_sample, recording.looks_at_head)
    assert recording.same(Recording.of(mod, torch.device("cpu")))


def test_a_mask_mod_that_changed_is_not_the_same() -> None:
    """Whatever changes: a tensor in place, behind torch's back, a number read from one, a Python attribute."""
    offset, window = torch.tensor([0]), Window()
    mods: dict[str, tuple[MaskMod, Callable[[], Any]]] = {
        "in place": (lambda b, h, q, k: q + offset[0] >= k, lambda: offset.add_(1)),
        "behind torch": (lambda b, h, q, k: q + offset[0] >= k, lambda: offset.data.numpy().__setitem__(0, 7)),
        "a number": (lambda b, h, q, k: q + int(offset) >= k, lambda: offset.data.add_(1)),
        "an attribute": (window, lambda: setattr(window, "width", 4)),
    }
    for name, (mod, change) in mods.items():
        before = Recording.of(mod, torch.device("cpu"))
        change()
        assert not before.same(Recording.of(mod, torch.device("cpu"))), name


@pytest.mark.parametrize("size", [(512, 384), (48, 512)])
def test_other_block_sizes_are_cut_into_ours(size: tuple[int, int]) -> None:
    theirs = create_block_mask(MODS["prefix"][0], None, None, 1100, 900, device="cpu", BLOCK_SIZE=size)
    mask = from_flex(theirs, q_offset=0)
    assert mask.block == ({512: 256, 48: 16}[size[0]], {384: 128, 512: 256}[size[1]])
    assert mask == P.prefix(90).compile((1100, 900), block=mask.block, q_offset=0)


class Compared(TorchDispatchMode):
    """How many pairs of tokens `q >= k` was asked about."""

    pairs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.ge.Tensor:
            self.pairs += result.numel()
        return result


def test_only_partial_blocks_are_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "PAIRS_AT_ONCE", 3 * 64 * 64)  # several batches
    theirs = created(MODS["causal"][0], 640, 640)
    with Compared() as compared:  # type: ignore[no-untyped-call]
        mask = from_flex(theirs)
    assert compared.pairs == 10 * 64 * 64 + 1, "the diagonal has 10 blocks; one pair tells what the mask_mod looks at"
    assert mask == P.causal().compile(640, block=64)


def test_full_blocks_are_taken_at_their_word() -> None:
    full = created(noop_mask, 200, 150)
    deaf = FlexMask.from_kv_blocks(
        torch.zeros(4, dtype=torch.int32), torch.zeros(4, 3, dtype=torch.int32),  # no B and no H
        torch.full((4,), 3, dtype=torch.int32), torch.arange(3, dtype=torch.int32).repeat(4, 1),
        BLOCK_SIZE=64, mask_mod=lambda b, h, q, k: q < 0, seq_lengths=(200, 150),
    )  # fmt: skip
    assert from_flex(deaf) == from_flex(full) == P.full().compile((200, 150), block=64, q_offset=0)


def output(mask: BlockMask, theirs: Any, heads: int, batch: int, run: Callable[..., Any]) -> None:
    """FlexAttention over our mask is our attention, in float64."""
    case = random_case(3, batch, heads, 2, *mask.shape, 16, 16, torch.float64)
    out = run(case.q, case.k, case.v, block_mask=theirs, enable_gqa=True)
    torch.testing.assert_close(out, sf.attention(case.q, case.k, case.v, mask))


@unfused
@inside_dynamo
@pytest.mark.parametrize(
    ("pattern", "lengths", "block"),
    [
        (P.causal() & (P.local(30) | P.strided(7)), (100, 100), (16, 32)),
        (P.per_head(P.causal(), P.local(9), P.full(), P.documents([50, 83])), (61, 133), (64, 16)),
        (P.per_sample(P.streaming(3, 20), ~P.butterfly(8)), (130, 130), (32, 256)),
        (P.full() - P.full(), (40, 50), (16, 16)),
    ],
    ids=str,
)
def test_flex_attention_over_our_mask(pattern: Pattern, lengths: tuple[int, int], block: tuple[int, int]) -> None:
    mask = pattern.compile(lengths, block=block)
    torch._dynamo.reset()
    output(mask, to_flex(mask), heads=2, batch=2, run=flex_attention)


@inside_dynamo
def test_compiled_flex_attention_over_one_mask_and_another() -> None:
    """The second has more tiles: the sizes of its tables must not keep FlexAttention from compiling."""
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, fullgraph=True)
    for pattern in (P.local(30), P.documents([20, 25, 200]) & P.strided(3)):
        mask = pattern.compile(100, block=32)
        case = random_case(4, 1, 2, 1, 100, 100, 16, 16, torch.float32)
        out = compiled(case.q, case.k, case.v, block_mask=to_flex(mask))
        torch.testing.assert_close(out, sf.attention(case.q, case.k, case.v, mask))


@given(leaves | per_head(2), shapes(200), st.integers(0, 1 << 16))
def test_the_mask_mod_is_right_everywhere(pattern: Pattern, shape: Shape, seed: int) -> None:
    mask = shape.compile(pattern)
    random = np.random.default_rng(seed)
    q, k = (torch.from_numpy(random.integers(0, n, 200)) for n in mask.shape)
    for head in range(mask.pattern_of.shape[1]):
        b, h = torch.zeros((), dtype=torch.int64), torch.tensor(head)
        dense = mask.to_dense().reshape(-1, *mask.shape)[head]
        np.testing.assert_array_equal(to_flex(mask).mask_mod(b, h, q, k).numpy(), dense[q, k])


def kv_blocks(**changes: Any) -> Any:
    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    given: dict[str, Any] = {"BLOCK_SIZE": 64, "mask_mod": noop_mask, "seq_lengths": (100, 100)}
    tables = {"kv_num_blocks": counts, "kv_indices": indices}
    return FlexMask.from_kv_blocks(**(tables | given | changes))


@pytest.mark.parametrize(
    ("mask", "kind", "message"),
    [
        (lambda: "causal", TypeError, "from_flex takes a BlockMask of torch.nn.attention.flex_attention, got 'causal'"),
        (lambda: kv_blocks(BLOCK_SIZE=(64, 0)), ValueError, "at least 1 token, got BLOCK_SIZE=0"),
        (lambda: kv_blocks(seq_lengths=(129, 100)), ValueError, "3 block rows of 64 cover 129 .* block mask has 2"),
        (lambda: kv_blocks(seq_lengths=(100, 60), kv_indices=torch.tensor([[0, 1], [1, 0]]).int()[None, None]),
         ValueError, "row 1 of sample 0, head 0 lists key block 1: expected 0 to 0 for 60 keys in blocks of 64"),
        (lambda: kv_blocks(kv_num_blocks=torch.tensor([[[1, 2]]]).int()), ValueError,
         r"lists block \(1, 0\) of sample 0, head 0 twice"),
        (lambda: kv_blocks(mask_mod=lambda b, h, q, k: q - k), TypeError, "must return booleans, got torch.int64"),
        (lambda: created(noop_mask, 200, 200)[:1], RuntimeError, "from a sliced BlockMask"),
    ],
)  # fmt: skip
def test_bad_flex_masks_are_named(mask: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        from_flex(mask())


def test_bad_masks_of_ours_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"to_flex takes a BlockMask \(pattern.compile\(...\)\), got causal\(\)"):
        to_flex(P.causal())  # type: ignore[arg-type]
    monkeypatch.setattr(flex, "LARGEST_TABLE", 15)
    with pytest.raises(ValueError, match="1 x 1 x 4 x 4 entries, more than 15: use larger blocks"):
        to_flex(P.causal().compile(64, block=16))


def test_the_core_does_without() -> None:
    import subprocess
    import sys

    code = "import sys, sparseflash as sf; sf.attention; print('torch.nn.attention.flex_attention' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
