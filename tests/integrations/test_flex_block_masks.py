"""Block masks of ``sparseflash.flex`` beside torch's own: each expected value is what torch gives for the same call."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as theirs
from torch.utils import _pytree as pytree

import sparseflash as sf
from sparseflash import flex as ours
from sparseflash import patterns as P
from sparseflash.integrations.flex import from_flex, to_flex

pytestmark = [
    # Said by FlexAttention once a process when it is not compiled; its plain implementation is what we compare with.
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # raised inside torch's compiler
]
B, H = 2, 4
TABLES = (
    *("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"),
    *("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"),
)
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def of_each_sample(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (k >= 40 * b)


def of_each_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 30 * h


def at_random(seed: int, unit: int) -> MaskMod:
    """Cells that are seen or not by chance, for every sample and head, and some rows that see nothing."""
    table = torch.rand(B, H, 500 // unit + 1, 500 // unit + 1, generator=torch.Generator().manual_seed(seed)) < 0.3
    table[:, :, 3] = False
    return lambda b, h, q, k: table[b, h, q // unit, k // unit]


MASK_MODS: dict[str, MaskMod] = {
    "causal": causal,
    "sample": of_each_sample,
    "head": of_each_head,
    "cells": at_random(0, 50),
    "tokens": at_random(1, 1),
    "all": ours.noop_mask,
    "none": lambda b, h, q, k: q < 0,
}
SHAPES = {
    "square": (256, 256, 128),
    "ragged": (300, 200, 64),
    "rectangles": (300, 300, (64, 128)),
    "larger blocks": (500, 300, 384),
    "blocks that divide none": (301, 299, (40, 200)),
    "one block": (100, 100, 1024),
    "single tokens": (20, 30, 1),
}
mask_mods = pytest.mark.parametrize("mask_mod", MASK_MODS.values(), ids=MASK_MODS)
shapes = pytest.mark.parametrize(("q_len", "kv_len", "block"), SHAPES.values(), ids=SHAPES)


def both(mask_mod: MaskMod, *arguments: Any, **named: Any) -> tuple[Any, Any]:
    """Ours and torch's, of the same call."""
    mine, torchs = (flex.create_block_mask(mask_mod, *arguments, device="cpu", **named) for flex in (ours, theirs))
    return mine, torchs


def assert_same(mine: theirs.BlockMask, torchs: theirs.BlockMask) -> None:
    """All that torch's own tests ask of a block mask."""
    assert isinstance(mine, ours.BlockMask)
    for name in TABLES:
        got, want = getattr(mine, name), getattr(torchs, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert got.dtype == want.dtype, name
            if "num_blocks" in name:
                assert torch.equal(got, want), name
            else:  # past the counted ones, entries mean nothing
                counted = (
                    torch.arange(want.shape[-1]) < getattr(torchs, name.replace("indices", "num_blocks"))[..., None]
                )
                assert got.shape == want.shape
                assert torch.equal(got[counted], want[counted]), name
    assert (mine.shape, mine.BLOCK_SIZE, tuple(mine.seq_lengths)) == (
        torchs.shape,
        torchs.BLOCK_SIZE,
        tuple(torchs.seq_lengths),
    )
    assert mine.numel() == torchs.numel()
    assert mine.sparsity() == pytest.approx(torchs.sparsity())
    assert torch.equal(mine.to_dense(), torchs.to_dense())
    assert mine.to_dense().dtype == torchs.to_dense().dtype
    assert (str(mine), repr(mine)) == (str(torchs), repr(torchs))
    assert mine.to_string((3, 5), limit=2) == torchs.to_string((3, 5), limit=2)
    for flatten in (True, False):
        got_tuple, want_tuple = mine.as_tuple(flatten), torchs.as_tuple(flatten)
        assert [type(x) for x in got_tuple] == [type(x) for x in want_tuple]
        assert got_tuple[-1] is want_tuple[-1]


@shapes
@mask_mods
def test_what_a_mask_tells(mask_mod: MaskMod, q_len: int, kv_len: int, block: Any) -> None:
    mine, torchs = both(mask_mod, B, H, q_len, kv_len, BLOCK_SIZE=block)
    assert_same(mine, torchs)
    assert_same(mine.to("cpu"), torchs.to("cpu"))
    for again in (copy.copy(mine), copy.deepcopy(ours.create_block_mask(causal, 1, 1, 40, 40, device="cpu"))):
        assert again.recorded is not None
    assert_same(copy.copy(mine), torchs)


def test_sizes_that_are_left_out_are_one() -> None:
    assert_same(*both(causal, None, None, 200, 300))
    assert_same(*both(causal, 3, None, 200, 300))
    assert_same(*both(causal, None, 5, 200, 300))


def test_the_further_keywords() -> None:
    mine, torchs = both(causal, B, None, 300, 300, BLOCK_SIZE=64, separate_full_blocks=False)
    assert_same(mine, torchs)
    assert mine.full_kv_indices is None
    if "compute_dq_write_order" in theirs.create_block_mask.__annotations__:
        for order in (True, False):
            more = {"compute_dq_write_order": True, "dq_kv_order": order}
            mine, torchs = both(at_random(2, 50), B, H, 300, 300, BLOCK_SIZE=64, **more)
            assert_same(mine, torchs)
            assert torch.equal(mine.dq_write_order, torchs.dq_write_order)
            assert mine.dq_kv_order_spt is torchs.dq_kv_order_spt


INDICES: dict[str, Any] = {
    "sample": 0,
    "last sample": -1,
    "sample and head": (0, 1),
    "slices": (slice(0, 2), slice(1, 2)),
    "head": (slice(None), 3),
    "query block": (slice(None), slice(None), 2),
    "query blocks": (slice(None), slice(None), slice(1, 3)),
    "one query block as a tensor": (slice(0, 1), slice(None), torch.tensor([1])),
    "query blocks as a tensor": (0, slice(None), torch.tensor([3, 0], dtype=torch.int32)),
    "samples as a tensor": torch.tensor([1, 1, 0]),
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("name", ["causal", "cells"])
def test_parts_of_a_mask(name: str, index: Any) -> None:
    mine, torchs = both(MASK_MODS[name], B, H, 256, 200, BLOCK_SIZE=64)
    assert_same(mine[index], torchs[index])
    assert_same(mine, torchs)


def test_an_index_of_keys_is_refused() -> None:
    with pytest.raises(IndexError, match="samples, heads and query blocks, got 4 indices"):
        ours.create_block_mask(causal, B, H, 256, 256, device="cpu")[0, 0, 0, 0]


def test_a_part_has_no_mask_mod_until_it_is_given_one() -> None:
    """Decoding, as programs write it: the row of query blocks that is due, and a mask_mod that is moved."""
    q, k, v = torch.randn(3, B, H, 256, 16, dtype=torch.float64).unbind(0)
    outs = []
    for flex in (ours, theirs):
        whole = flex.create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
        part = whole[:, :, 2]
        with pytest.raises(RuntimeError, match="sliced BlockMask"):
            flex.flex_attention(q[:, :, 128:192], k, v, block_mask=part)
        part.mask_mod = lambda b, h, i, j: causal(b, h, i + 128, j)
        part.seq_lengths = (64, 256)
        outs.append(flex.flex_attention(q[:, :, 128:192], k, v, block_mask=part))
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(outs[0], ours.flex_attention(q, k, v, block_mask=P.causal())[:, :, 128:192])


@pytest.mark.parametrize("full", [True, False], ids=["full blocks", "partial alone"])
@pytest.mark.parametrize("more", [{}, {"seq_lengths": (250, 190)}, {"compute_q_blocks": False}], ids=str)
def test_masks_of_lists_of_blocks(full: bool, more: dict[str, Any]) -> None:
    _, made = both(of_each_head, 1, H, 256, 192, BLOCK_SIZE=64)
    tables = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
    masks = [
        flex.BlockMask.from_kv_blocks(*tables[: 4 if full else 2], BLOCK_SIZE=64, mask_mod=of_each_head, **more)
        for flex in (ours, theirs)
    ]
    assert_same(*masks)
    assert_same(ours.BlockMask(*_fields(masks[1])), masks[1])
    lengths = masks[1].seq_lengths
    q, k = (torch.randn(B, H, n, 16, dtype=torch.float64) for n in lengths)
    got = ours.flex_attention(q, k, k, block_mask=masks[0])
    torch.testing.assert_close(got, ours.flex_attention(q, k, k, block_mask=masks[1]))
    if full:  # without, blocks that are seen are not listed; there torch's plain implementation asks mask_mod alone
        torch.testing.assert_close(got, theirs.flex_attention(q, k, k, block_mask=masks[1]))


def _fields(mask: theirs.BlockMask) -> tuple[Any, ...]:
    return mask.seq_lengths, *(getattr(mask, name) for name in TABLES), mask.BLOCK_SIZE, mask.mask_mod


def test_lists_that_do_not_fit_are_refused_as_by_torch() -> None:
    counts, indices = torch.ones(1, 1, 2).int(), torch.zeros(1, 1, 2, 2).int()
    for flex in (ours, theirs):
        with pytest.raises(RuntimeError, match="at least 2 dimensions"):
            flex.BlockMask.from_kv_blocks(counts[0, 0], indices[0, 0, 0])
        with pytest.raises(AssertionError, match="must be both provided or omitted"):
            flex.BlockMask.from_kv_blocks(counts, indices, full_kv_num_blocks=counts)


def dense(x: list[Tensor], mask_mod: MaskMod) -> tuple[Tensor, Tensor]:
    """Output and largest scores by torch's dense operations, over torch's own mask of all pairs.

    Torch's function has neither gradients nor largest scores on a CPU, but these are what it is made of.
    """
    q, k, v = x
    groups = q.shape[1] // k.shape[1]
    seen = theirs.create_mask(mask_mod, B, H, q.shape[2], k.shape[2], device="cpu")
    scores = (q @ k.repeat_interleave(groups, 1).mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
    return torch._safe_softmax(scores, -1) @ v.repeat_interleave(groups, 1), scores.detach().amax(-1)


def operands(q_len: int, kv_len: int, groups: int = 1, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (B, H, q_len, 16), (B, H // groups, kv_len, 16), (B, H // groups, kv_len, 24)
    return [torch.randn(size, generator=draw, dtype=dtype).requires_grad_() for size in sizes]


@shapes
@mask_mods
def test_attention_and_its_gradient(mask_mod: MaskMod, q_len: int, kv_len: int, block: Any) -> None:
    groups = 2 if q_len == 300 else 1
    x = operands(q_len, kv_len, groups)
    mine, torchs = both(mask_mod, B, H, q_len, kv_len, BLOCK_SIZE=block)
    aux = theirs.AuxRequest(lse=True, max_scores=True)
    q, k, v = x
    out, told = ours.flex_attention(q, k, v, block_mask=mine, enable_gqa=groups > 1, return_aux=aux)
    q, k, v = (one.detach() for one in x)
    lse = theirs.AuxRequest(lse=True)
    want, want_told = theirs.flex_attention(q, k, v, block_mask=torchs, enable_gqa=groups > 1, return_aux=lse)
    torch.testing.assert_close(out, want)
    assert out.stride() == want.stride()
    assert isinstance(told, theirs.AuxOutput)
    assert told.lse is not None
    assert told.max_scores is not None
    assert want_told.lse is not None
    assert not told.max_scores.requires_grad
    torch.testing.assert_close(told.lse.detach().to(want_told.lse.dtype), want_told.lse, rtol=1e-6, atol=1e-6)
    by_hand, largest = dense(x, mask_mod)
    torch.testing.assert_close(told.max_scores, largest)
    up = torch.randn_like(out)
    pairs = [torch.autograd.grad((y * up).sum(), x) for y in (out, by_hand)]
    torch.testing.assert_close(*pairs, rtol=1e-7, atol=1e-9)


def test_what_comes_beside_the_output() -> None:
    q, k, v = (x.detach() for x in operands(100, 100))
    for mask in (None, *both(causal, None, None, 100, 100)):
        torchs = None if mask is None else theirs.create_block_mask(causal, None, None, 100, 100, device="cpu")
        for asked in itertools.product((True, False), repeat=2):
            told = ours.flex_attention(q, k, v, block_mask=mask, return_aux=ours.AuxRequest(*asked))[1]
            assert isinstance(told, theirs.AuxOutput)
            assert [x is not None for x in told] == list(asked)
        out, lse = ours.flex_attention(q, k, v, block_mask=mask, return_lse=True)
        want_out, want_lse = theirs.flex_attention(q, k, v, block_mask=torchs, return_lse=True)
        torch.testing.assert_close(out, want_out)
        torch.testing.assert_close(lse.to(want_lse.dtype), want_lse)


def test_the_largest_scores_are_those_that_the_softmax_saw() -> None:
    q, k, v = (x.detach() for x in operands(70, 130))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    mine = ours.create_block_mask(of_each_head, None, H, 70, 130, device="cpu", BLOCK_SIZE=32)
    aux = ours.AuxRequest(max_scores=True)
    away = (torch.arange(70)[:, None] - torch.arange(130)).abs()
    seen = theirs.create_mask(of_each_head, B, H, 70, 130, device="cpu")
    want = 2 * torch.tanh(0.7 * q @ k.mT / 2) - slopes[:, None, None] * away
    want = want.masked_fill(~seen, -torch.inf).amax(-1)
    for slope in (slopes, slopes.expand(B, H)):
        got = ours.flex_attention(q, k, v, block_mask=mine, scale=0.7, softcap=2.0, alibi_slopes=slope, return_aux=aux)[
            1
        ].max_scores
        assert got is not None
        torch.testing.assert_close(got, want)
    pattern = ours.flex_attention(q, k, v, block_mask="local(9)", return_aux=aux)[1].max_scores
    scores = q @ k.mT / 4
    seen = torch.from_numpy(sf.parse("local(9)").compile((70, 130)).to_dense())
    torch.testing.assert_close(pattern, scores.masked_fill(~seen, -torch.inf).amax(-1))
    call = torch.compile(
        lambda q: ours.flex_attention(q, k, v, block_mask=mine, return_aux=aux)[1].max_scores, backend="eager"
    )
    torch._dynamo.reset()
    assert mine.kv_indices.shape == (1, H, 3, 5)  # tables that were handed out do not matter
    torch.testing.assert_close(call(q), ours.flex_attention(q, k, v, block_mask=mine, return_aux=aux)[1].max_scores)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_output_lies_as_the_queries_do(order: tuple[int, ...]) -> None:
    sizes = (2, 4, 64)
    back = [order.index(dim) for dim in range(3)]
    q = torch.randn(*(sizes[dim] for dim in order), 16).permute(*back, 3)
    assert q.shape == (2, 4, 64, 16)
    v = torch.randn(2, 4, 64, 24)
    want = theirs.flex_attention(q, q, v)
    got = ours.flex_attention(q.requires_grad_(), q, v)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.stride() == want.stride()
    torch._dynamo.reset()
    compiled = torch.compile(ours.flex_attention, backend="aot_eager", fullgraph=True, dynamic=True)(q, q, v)
    assert compiled.stride() == want.stride()
    got.sum().backward()


def test_expanded_queries() -> None:
    q, k = torch.randn(1, 4, 40, 16).expand(2, 4, 40, 16), torch.randn(2, 4, 40, 16)
    got, want = (flex.flex_attention(q, k, k) for flex in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.stride() == want.stride()


def test_our_masks_in_torchs_function_and_torchs_in_ours() -> None:
    q, k, v = (x.detach() for x in operands(200, 300))
    mine, torchs = both(at_random(3, 20), B, H, 200, 300, BLOCK_SIZE=64)
    outs = [flex.flex_attention(q, k, v, block_mask=mask) for flex in (ours, theirs) for mask in (mine, torchs)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    assert from_flex(mine) == from_flex(torchs)
    assert type(to_flex(mine)) is theirs.BlockMask
    assert_same(ours.BlockMask.of_torch(to_flex(mine)), torchs)
    torch.testing.assert_close(theirs.flex_attention(q, k, v, block_mask=to_flex(mine)), outs[0])


def test_a_mask_for_lengths_that_were_adjusted() -> None:
    mine, torchs = (mask._adjust(130, 200) for mask in both(causal, B, H, 256, 256, BLOCK_SIZE=64))
    assert_same(mine, torchs)
    q, k = (torch.randn(B, H, n, 16) for n in (130, 200))
    outs = (flex.flex_attention(q, k, k, block_mask=mask) for flex, mask in ((ours, mine), (theirs, torchs)))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_no_mask_by_its_private_name() -> None:
    q, k = torch.randn(B, H, 70, 16), torch.randn(B, H, 90, 16)
    mine, torchs = (flex._create_empty_block_mask(q, k) for flex in (ours, theirs))
    for name in TABLES:
        assert (getattr(mine, name) is None) == (getattr(torchs, name) is None)
    want = theirs.flex_attention(q, k, k, block_mask=torchs)
    for mask in (mine, torchs):
        for lengths in ((70, 90), (33, 90)):
            got = ours.flex_attention(q[:, :, : lengths[0]], k, k, block_mask=mask)
            torch.testing.assert_close(got, want[:, :, : lengths[0]], rtol=1e-5, atol=1e-5)


def test_every_public_name_is_there() -> None:
    assert set(theirs.__all__) <= set(ours.__all__)


def test_private_names_that_programs_import_are_torchs() -> None:
    names = (
        *("_mask_mod_signature", "_score_mod_signature", "_DEFAULT_SPARSE_BLOCK_SIZE", "_identity"),
        *("_ModificationType", "_vmap_for_bhqkv", "_get_mod_type", "_round_up_to_multiple"),
    )
    for name in names:
        assert getattr(ours, name) is getattr(theirs, name)
    for name in ("_nobody_has_this", "__nor_this__", "Tensor"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
            getattr(ours, name)
    with pytest.raises(ImportError, match="cannot import name"):
        from sparseflash.flex import create_block_masks  # type: ignore[attr-defined]  # noqa: F401


def test_attributes_that_are_set_and_tables_that_are_written_into_count() -> None:
    x = torch.randn(1, 1, 256, 16)
    other = lambda b, h, q, k: (q >= k) & (k % 3 != 1)  # noqa: E731
    for change in ("mask_mod", "kv_indices", "written"):
        mine, torchs = both(causal, None, None, 256, 256, BLOCK_SIZE=128)
        ours.flex_attention(x, x, x, block_mask=mine)
        for mask in (mine, torchs):
            if change == "mask_mod":
                mask.mask_mod = other
            elif change == "kv_indices":
                mask.kv_indices = mask.kv_indices.clone()
            else:
                mask.full_kv_num_blocks.zero_()
                mask.full_kv_indices.zero_()
        assert_same(mine, torchs)
        got = ours.flex_attention(x, x, x, block_mask=mine)
        assert torch.equal(got, ours.flex_attention(x, x, x, block_mask=torchs))
        usual = ours.flex_attention(x, x, x, block_mask=P.causal())
        assert torch.equal(got, usual) == (change == "kv_indices")


def test_masks_without_room_for_tables_are_used_all_the_same() -> None:
    mask = ours.create_block_mask(causal, 1 << 20, 1 << 10, 256, 256, device="cpu")
    assert mask.shape == (1 << 20, 1 << 10, 256, 256)
    assert from_flex(mask) == P.causal().compile(256)
    with pytest.raises(ValueError, match=r"1048576 x 1024 x 2 x 2 entries.*use a larger BLOCK_SIZE"):
        _ = mask.kv_indices


def new_masks(number: int, tokens: int = 256) -> list[ours.BlockMask]:
    masks = []
    for i in range(number):
        documents = torch.arange(tokens) // (i + 3) ** 2
        mask_mod = lambda b, h, q, k, d=documents: (d[q] == d[k]) & (q >= k)  # noqa: E731
        masks.append(ours.create_block_mask(mask_mod, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=32))
    return masks


def test_a_new_mask_at_every_step_is_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(x: Tensor, mask: ours.BlockMask) -> Tensor:
        return ours.flex_attention(x, x * 2, x, block_mask=mask).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for mask in new_masks(6):
        x, again = (torch.randn(2, 2, 256, 16, generator=torch.Generator().manual_seed(0)) for _ in range(2))
        compiled(x.requires_grad_(), mask).backward()
        step(again.requires_grad_(), mask).backward()
        torch.testing.assert_close(x.grad, again.grad)
    assert counter.frame_count == 1
    for mask in (new_masks(1, 192)[0],):  # of other lengths than x
        with pytest.raises(ValueError, match="the mask is for"):
            compiled(x, mask)


def test_a_mask_closed_over_by_a_compiled_function() -> None:
    torch._dynamo.reset()
    mask, x = new_masks(1)[0], torch.randn(2, 2, 256, 16)
    call = torch.compile(lambda x: ours.flex_attention(x, x, x, block_mask=mask), backend="inductor", fullgraph=True)
    torch.testing.assert_close(call(x), ours.flex_attention(x, x, x, block_mask=mask))


class Model(torch.nn.Module):
    def forward(self, x: Tensor, mask: ours.BlockMask) -> Tensor:
        out = ours.flex_attention(x, x, x, block_mask=mask)
        assert isinstance(out, Tensor)
        return out


@pytest.mark.parametrize("strict", [False, True])
def test_one_exported_program_serves_all_masks(strict: bool, tmp_path: Any) -> None:
    first = ours.create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCK_SIZE=32)
    x = torch.randn(2, 2, 256, 16)
    length = torch.export.Dim.DYNAMIC
    program = torch.export.export(Model(), (x, first), dynamic_shapes=({}, [{0: length}, None]), strict=strict)
    program._example_inputs = None  # torch warns of what it does not load as plain tensors, in a line that fails
    torch.export.save(program, tmp_path / "program.pt2")
    for exported in (program, torch.export.load(tmp_path / "program.pt2")):
        call = exported.module()
        for mask in (first, *new_masks(3)):
            torch.testing.assert_close(call(x, mask), Model()(x, mask))


def test_masks_as_pytrees() -> None:
    made = new_masks(1)[0]
    listed = ours.BlockMask.from_kv_blocks(made.kv_num_blocks, made.kv_indices, BLOCK_SIZE=32, mask_mod=causal)
    x = torch.randn(1, 1, 256, 16)
    for mask in (made, listed):
        leaves, spec = pytree.tree_flatten({"mask": mask})
        assert all(isinstance(leaf, Tensor) for leaf in leaves)
        back = pytree.tree_unflatten(leaves, spec)["mask"]
        assert_same(back, mask)
        assert torch.equal(*(ours.flex_attention(x, x, x, block_mask=m) for m in (mask, back)))
        assert pytree.tree_flatten({"mask": back})[1] == spec
        named, _ = pytree.tree_flatten_with_path(mask)
        assert [leaf for _, leaf in named] == leaves or len(named) == len(leaves)
    assert pytree.tree_flatten(made)[1] == pytree.tree_flatten(new_masks(2)[1])[1]
    assert pytree.tree_flatten(made)[1] != pytree.tree_flatten(listed)[1]
    loaded = pytree.treespec_loads(pytree.treespec_dumps(pytree.tree_flatten(made)[1]))
    bare = pytree.tree_unflatten(pytree.tree_leaves(made), loaded)
    assert torch.equal(*(ours.flex_attention(x, x, x, block_mask=m) for m in (made, bare)))
    with pytest.raises(ValueError, match=r"came out of an exported program.*create_block_mask\(mask_mod"):
        _ = bare.kv_indices
    with pytest.raises(TypeError, match="holds its mask_mod, which cannot be saved"):
        pytree.treespec_dumps(pytree.tree_flatten(listed)[1])
