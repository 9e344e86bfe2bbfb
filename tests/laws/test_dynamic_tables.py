"""Tables from block indices: they list what the mask of the same token mask lists, and nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparseflash as sf
from sparseflash import LookupTable
from sparseflash import patterns as P
from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.tiles import unpack
from tests.laws.backend import BACKEND, BLOCKS, DEVICE, INTERPRETED
from tests.oracle import check, ours, random_case

SIZES = BLOCKS[:4]


@dataclass(frozen=True)
class Routed:
    """Indices of a router and everything that says what they mean."""

    indices: NDArray[np.int64]  # [B, H, nQ, k]; some out of range, some twice
    counts: NDArray[np.int64] | None
    shape: tuple[int, int]
    block: tuple[int, int]
    q_offset: int | None
    q_heads: int
    causal: bool
    seed: int

    def table(self, dtype: torch.dtype = torch.int64) -> LookupTable:
        return LookupTable.from_indices(
            torch.from_numpy(self.indices).to(DEVICE, dtype),
            None if self.counts is None else torch.from_numpy(self.counts).to(DEVICE, dtype),
            shape=self.shape, block=self.block, q_offset=self.q_offset, q_heads=self.q_heads, causal=self.causal,
        )  # fmt: skip

    def token_mask(self) -> NDArray[np.bool_]:
        """Bool [B, H, q_len, kv_len], one entry after the other."""
        (samples, heads, lines, k), (q_len, kv_len), (bq, bk) = self.indices.shape, self.shape, self.block
        seen = np.zeros((samples, heads, q_len, kv_len), bool)
        for b, h, row, entry in np.ndindex(samples, heads, lines, k):
            if self.counts is None or entry < self.counts[b, h, row]:
                column = int(self.indices[b, h, row, entry])
                if 0 <= column < -(-kv_len // bk):
                    seen[b, h, row * bq : (row + 1) * bq, column * bk : (column + 1) * bk] = True
        if self.causal:
            offset = kv_len - q_len if self.q_offset is None else self.q_offset
            seen &= np.arange(kv_len) <= np.arange(q_len)[:, None] + offset
        return seen


@st.composite
def routed(draw: st.DrawFn, longest: int = 40 if INTERPRETED else 300) -> Routed:
    shape = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    block = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    heads = draw(st.integers(1, 2))
    lines, columns = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    size = draw(st.integers(1, 2)), heads, lines, draw(st.integers(0, min(columns + 2, 6)))
    seed = draw(st.integers(0, 1 << 16))
    random = np.random.default_rng(seed)
    outside = draw(st.integers(0, 1))
    indices = random.integers(-outside, columns + outside, size)
    counts = random.integers(0, size[3] + 1, size[:3]) if draw(st.booleans()) else None
    q_offset = draw(st.none() | st.integers(-40, 40))
    return Routed(indices, counts, shape, block, q_offset, heads * draw(st.integers(1, 2)), draw(st.booleans()), seed)


def contents(side: BlockLists, tiles: Tiles, p: int, bk: int, flip: bool) -> dict[tuple[int, int], bytes]:
    """What a kernel reads of one pattern: (row, column) -> the bits of the block."""
    bits = unpack(tiles.bits.cpu().numpy().view(np.uint32), bk)
    found: dict[tuple[int, int], bytes] = {}
    lists = (side.full_indices, side.partial_indices, side.partial_tiles)  # on the device
    full_blocks, partial_blocks, tile_of = (x.tolist() for x in lists)
    for line, (a, b, c, d) in enumerate(side.ranges[p].tolist()):
        for i, partial in (*((i, False) for i in range(a, b)), *((i, True) for i in range(c, d))):
            other = (partial_blocks if partial else full_blocks)[i]
            tile = bits[tile_of[i]] if partial else np.ones_like(bits[0])
            assert not partial or (tile.any() and not tile.all()), "a PARTIAL block is empty or full"
            place = (other, line) if flip else (line, other)
            assert place not in found, "a block is listed twice"
            found[place] = tile.tobytes()
    return found


@given(routed())
def test_a_table_from_indices_lists_what_the_mask_lists(r: Routed) -> None:
    table = r.table()
    samples, heads = r.indices.shape[:2]
    assert (table.shape, table.block) == (r.shape, r.block)
    expected = np.arange(samples * heads).reshape(samples, heads).repeat(r.q_heads // heads, 1)
    np.testing.assert_array_equal(table.pattern_of.cpu().numpy(), expected)
    for p, token_mask in enumerate(r.token_mask().reshape(-1, *r.shape)):
        same = sf.lookup(P.BlockMask.from_dense(token_mask, r.block, r.q_offset))
        for mine, other, flip in ((table.rows, same.rows, False), (table.columns, same.columns, True)):
            got = contents(mine, table.tiles, p, r.block[1], flip)
            assert got == contents(other, same.tiles, 0, r.block[1], flip)
            assert all(x.dtype == torch.int32 for x in mine)
    for side in (table.rows, table.columns):
        weight = (side.ranges[..., 3] - side.ranges[..., 0]).gather(1, side.order.long())
        assert (weight[:, 1:] <= weight[:, :-1]).all(), "heavy lines are not first"
        lines = torch.arange(side.order.shape[1], dtype=torch.int32, device=DEVICE)
        assert torch.equal(side.order.sort(1).values, lines.expand_as(side.order))


@pytest.mark.interpreted
@given(routed())
def test_attention_over_a_table_from_indices(r: Routed) -> None:
    samples, heads = r.indices.shape[:2]
    case = random_case(r.seed, samples, heads, r.q_heads // heads, *r.shape, 16, 24, torch.float32)
    token_mask = torch.from_numpy(r.token_mask()).repeat_interleave(r.q_heads // heads, 1)
    check(case, token_mask, ours(case, r.table(torch.int32), BACKEND))


def test_blocks_are_128_tokens_a_side_unless_told() -> None:
    assert LookupTable.from_indices(torch.zeros(1, 1, 3, 1, dtype=torch.int64), shape=300).block == (128, 128)


def test_one_choice_may_serve_all_samples_and_heads() -> None:
    case = random_case(0, 3, 2, 2, 64, 96, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
    indices = torch.tensor([[0, 2], [5, 1], [3, 3], [4, 0]], device=DEVICE).view(1, 1, 4, 2)
    one = LookupTable.from_indices(indices, shape=(64, 96), block=16)
    all_of_them = LookupTable.from_indices(indices.expand(3, 4, 4, 2), shape=(64, 96), block=16)
    for a, b in zip(*(sf.attention(case.q, case.k, case.v, t, return_lse=True, backend=BACKEND)
                      for t in (one, all_of_them)), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b)  # on an Intel Xeon with AMX the last bits differ


def routed_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Block attention in the manner of MoBA: each query block sees the key blocks whose mean key it likes best."""
    of_queries, of_keys = (x.unflatten(2, (-1, 16)).mean(3) for x in (q, k))
    chosen = (of_queries.unflatten(1, (k.shape[1], -1)).mean(2) @ of_keys.mT).topk(3).indices
    counts = (chosen >= 0).sum(-1) - chosen[..., 0] % 2
    table = LookupTable.from_indices(
        chosen, counts, shape=(q.shape[2], k.shape[2]), block=16, q_heads=q.shape[1], causal=True
    )
    out: torch.Tensor = sf.attention(q, k, v, table, backend=None if q.is_cuda else BACKEND)
    return out.sin()


@pytest.mark.tier2
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("dynamic", [None, True])
def test_routing_and_attention_compile_into_one_graph(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    graph = torch.compile(routed_layer, fullgraph=True, dynamic=dynamic)
    for tokens in (80, 128):
        case = random_case(1, 2, 2, 2, tokens, 144, 16, 16, torch.float32).mapped(lambda x: x.to(DEVICE))
        operands = [x.requires_grad_() for x in (case.q, case.k, case.v)]
        plain, compiled = routed_layer(*operands), graph(*operands)
        torch.testing.assert_close(compiled, plain)
        gradients = [torch.autograd.grad(out.sum(), operands) for out in (plain, compiled)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_no_shape_depends_on_a_value() -> None:
    """Fake tensors have no values: asking for one, or for a shape that depends on one, raises."""
    with FakeTensorMode() as mode:
        indices, counts = torch.zeros(2, 2, 5, 3, dtype=torch.int64), torch.zeros(2, 2, 5, dtype=torch.int32)
        table = LookupTable.from_indices(indices, counts, shape=(70, 90), block=16, q_heads=4, causal=True)
        q, k = torch.zeros(2, 4, 70, 16), torch.zeros(2, 2, 90, 16)
        assert sf.attention(q, k, k, table).shape == q.shape
        assert table.columns.ranges.shape == (4, 6, 4)
        assert table.columns.ranges.fake_mode is mode  # type: ignore[attr-defined]


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    waiting = {"_local_scalar_dense", "item", "nonzero", "unique", "_unique2", "unique_dim", "masked_select", "equal"}
    with Calls() as seen:
        torch.tensor([1, 0, 1]).nonzero()
    assert seen.names & waiting
    with Calls() as seen:
        LookupTable.from_indices(torch.zeros(1, 2, 5, 3, dtype=torch.int64), shape=(70, 90), block=16, causal=True)
    assert "searchsorted" in seen.names
    assert not seen.names & waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to wait for")
def test_a_gpu_is_never_waited_for() -> None:
    case = random_case(1, 2, 2, 2, 80, 144, 16, 16, torch.float32).mapped(lambda x: x.cuda())
    operands = [x.requires_grad_() for x in (case.q, case.k, case.v)]
    routed_layer(*operands).sum().backward()  # edge tiles are copied once, kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        routed_layer(*operands).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_range_is_named_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    indices = torch.zeros(2, 3, 4, 5, dtype=torch.int64)
    counts = torch.full((2, 3, 4), 2)
    indices[1, 2, 3, 4] = 77

    def build() -> LookupTable:
        return LookupTable.from_indices(indices, counts, shape=64, block=16)

    monkeypatch.setenv("SPARSEFLASH_DEBUG", "1")
    build()  # the entry is past its row's count
    counts[1, 2, 3] = 5
    with pytest.raises(ValueError, match=r"batch 1, head 2, block row 3 name key block 77 .*: expected 0 to 3"):
        build()
    counts[0, 1, 2] = -1
    with pytest.raises(ValueError, match=r"counts of batch 0, head 1, block row 2 is -1: expected 0 to k = 5"):
        build()
    monkeypatch.delenv("SPARSEFLASH_DEBUG")
    assert build().rows.full_indices.max() <= 3


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"indices": [[0]]}, TypeError, "indices must be a tensor of ints .*, got list"),
        ({"indices": torch.zeros(1, 1, 4, 2)}, TypeError, r"indices must be .* ints .*, got torch.float32"),
        ({"indices": torch.zeros(4, 2).int()}, ValueError, r"indices must be \[B, H, nQ, k\] .*, got \(4, 2\)"),
        ({"shape": 65}, ValueError, r"nQ = 5 block rows for 65 queries in blocks of 16; got \(1, 2, 4, 2\)"),
        ({"shape": 6.5}, TypeError, "seq_len must be an int"),
        ({"block": 17}, ValueError, "block sizes are 16, .*got block=17"),
        ({"counts": torch.zeros(1, 2, 4)}, TypeError, "counts must be a tensor of ints .*, got torch.float32"),
        ({"counts": torch.zeros(1, 2).int()}, ValueError, r"counts must be .* = \(1, 2, 4\) .*, got \(1, 2\)"),
        ({"counts": torch.zeros(1, 2, 4, device="meta").int()}, ValueError, "on one device, got cpu and meta"),
        ({"q_heads": 3}, ValueError, "q_heads must be a multiple of the 2 heads of indices, got 3"),
        ({"q_heads": 4.0}, TypeError, "q_heads must be an int or None, got 4.0"),
        (
            {"indices": torch.zeros(1, 1, 1, 1).int().expand(1 << 15, 1 << 13, 4, 2)},
            ValueError, "2,147,483,648 entries is past what int32 can index",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"indices": torch.zeros(1, 2, 4, 2, dtype=torch.int64), "shape": 64, "block": 16}
    with pytest.raises(kind, match=message):
        LookupTable.from_indices(**(good | change))


def test_a_mask_first_used_with_fake_tensors_serves_real_ones() -> None:
    mask = P.local(13).compile(48, block=16)
    with FakeTensorMode():
        fake = torch.zeros(1, 1, 48, 16)
        assert sf.attention(fake, fake, fake, mask).shape == fake.shape
    assert type(sf.lookup(mask).pattern_of) is torch.Tensor
    assert sf.lookup(mask) is sf.lookup(mask)
    with FakeTensorMode():  # and the other way round
        fake = torch.zeros(1, 1, 48, 16)
        assert sf.attention(fake, fake, fake, mask).shape == fake.shape
