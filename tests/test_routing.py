"""Routing: the chosen blocks are those of the definition, read literally, and nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparseflash as sf
from sparseflash.routing import Selection, topk_blocks, topk_table


@dataclass(frozen=True)
class Asked:
    """Arguments of a router and the lengths of its operands."""

    samples: int
    kv_heads: int
    group: int
    q_len: int
    kv_len: int
    seed: int
    k_blocks: int
    options: dict[str, Any]

    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Normal q and k in float64, where no two scores of different blocks are equal."""
        generator = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.samples, self.kv_heads * self.group, self.q_len, 8, generator=generator)
        k = torch.randn(self.samples, self.kv_heads, self.kv_len, 8, generator=generator)
        return q.double(), k.double()

    @property
    def q_offset(self) -> int:
        offset: int | None = self.options["q_offset"]
        return self.kv_len - self.q_len if offset is None else offset


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    q_len, kv_len = draw(st.integers(1, 100)), draw(st.integers(1, 100) | st.integers(200, 300))
    block = draw(st.sampled_from((16, 32, 64))), draw(st.sampled_from((16, 32)))
    local_blocks, sink_blocks = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    # A row's queries touch so many key blocks at most, the ones before them and the sinks not counted.
    own = -(-block[0] // block[1]) + 1
    least = max(1, (own + local_blocks - 1 if local_blocks else 0) + sink_blocks)
    options = {
        "block": block,
        "causal": draw(st.booleans()),
        "local_blocks": local_blocks,
        "sink_blocks": sink_blocks,
        "q_offset": draw(st.none() | st.integers(-40, 300)),
        "share_group": draw(st.booleans()),
        "query": draw(st.sampled_from(("mean", "first"))),
    }
    sizes = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3)), q_len, kv_len
    return Asked(*sizes, draw(st.integers(0, 1 << 16)), least + draw(st.integers(0, 4)), options)


def by_definition(a: Asked) -> list[set[int]]:
    """What each block row reads, row after row of [B, H, nQ]: the paper's definition in loops over tokens.

    Each query scores each block by its product with the block's mean key; the queries of a block, and of a group
    where it shares one choice, sum their scores; blocks in the future are out; local and sink blocks are in; the
    highest scores fill what is left.
    """
    (q, k), o = (x.numpy() for x in a.operands()), a.options
    bq, bk = o["block"]
    nq, nk = -(-a.q_len // bq), -(-a.kv_len // bk)
    found = []
    for b, h, row in np.ndindex(a.samples, a.kv_heads if o["share_group"] else a.kv_heads * a.group, nq):
        heads = range(h * a.group, (h + 1) * a.group) if o["share_group"] else [h]
        queries = range(row * bq, min((row + 1) * bq, a.q_len))
        positions = [i + a.q_offset for i in queries]
        scores, always = {}, set()
        for block in range(nk):
            keys = range(block * bk, min((block + 1) * bk, a.kv_len))
            if o["causal"] and keys[0] > positions[-1]:
                continue
            mean_key = np.mean([k[b, heads[0] // a.group, j] for j in keys], axis=0)
            voters = queries if o["query"] == "mean" else queries[:1]
            scores[block] = float(np.mean([q[b, head, i] @ mean_key for head in heads for i in voters]))
            local = any(p // bk - block in range(o["local_blocks"]) for p in positions)
            if local or block < o["sink_blocks"]:
                always.add(block)
        others = sorted(scores.keys() - always, key=lambda block: -scores[block])
        found.append(always | set(others[: a.k_blocks - len(always)]))
    return found


def chosen(selection: Selection) -> list[set[int]]:
    """The sets of chosen blocks, row after row of [B, H, nQ]."""
    rows, counts = selection.indices.flatten(0, 2).tolist(), selection.counts.flatten().tolist()
    for row, count in zip(rows, counts, strict=True):
        assert len(set(row[:count])) == count, "a block is chosen twice"
    return [set(row[:count]) for row, count in zip(rows, counts, strict=True)]


@given(asked())
def test_the_chosen_blocks_are_those_of_the_definition(a: Asked) -> None:
    selection = topk_blocks(*a.operands(), a.k_blocks, **a.options)
    bq, bk = a.options["block"]
    heads = a.kv_heads if a.options["share_group"] else a.kv_heads * a.group
    rows, columns = -(-a.q_len // bq), -(-a.kv_len // bk)
    assert selection.indices.shape == (a.samples, heads, rows, min(a.k_blocks, columns))
    assert chosen(selection) == by_definition(a)


@given(asked())
def test_the_table_lets_through_what_was_chosen(a: Asked) -> None:
    q, k = a.operands()
    table = topk_table(q, k, a.k_blocks, **a.options)
    bq, bk = a.options["block"]
    seen = np.zeros((a.samples * q.shape[1], a.q_len, a.kv_len), bool)
    rows = by_definition(a)
    per_head = len(rows) // a.samples
    nq = -(-a.q_len // bq)
    group = a.group if a.options["share_group"] else 1
    for head in range(len(seen)):
        b, h = divmod(head, q.shape[1])
        for row in range(nq):
            for block in rows[b * per_head + h // group * nq + row]:
                seen[head, row * bq : (row + 1) * bq, block * bk : (block + 1) * bk] = True
    if a.options["causal"]:
        seen &= np.arange(a.kv_len) <= np.arange(a.q_len)[:, None] + a.q_offset
    token_mask = torch.from_numpy(seen).unflatten(0, q.shape[:2])
    v = k.flip(-1)
    torch.testing.assert_close(sf.attention(q, k, v, table), sf.reference.attention(q, k, v, token_mask))


@pytest.mark.parametrize("k_blocks", [7, 8, 100])
def test_all_blocks_are_dense_causal_attention(k_blocks: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 100, 16, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    routed = sf.attention(q, k, v, topk_table(q, k, k_blocks, block=16))
    torch.testing.assert_close(routed, sf.attention(q, k, v, sf.patterns.causal()))


def test_the_first_query_of_a_block_knows_no_later_token() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 160, 16, generator=generator).unbind(0)
    later = [torch.cat([x[:, :, :85], torch.randn(1, 2, 75, 16, generator=generator)], 2) for x in (q, k, v)]

    def outs(query: Literal["mean", "first"]) -> list[torch.Tensor]:
        """What the tokens up to 84 get, from either sequence."""
        return [
            sf.attention(q, k, v, topk_table(q, k, 3, block=16, query=query))[:, :, :85]
            for q, k, v in ((q, k, v), later)
        ]

    assert torch.equal(*outs("first"))
    assert not torch.equal(*outs("mean")), "the mean query of block 5 should have changed its choice"


def test_broken_operands_displace_no_block_that_is_always_read() -> None:
    q, k = torch.ones(1, 1, 64, 16), torch.ones(1, 1, 64, 16)
    k[:, :, 20], k[:, :, 63], q[:, :, 50] = torch.nan, torch.inf, torch.inf
    for row, blocks in enumerate(chosen(topk_blocks(q, k, 2, block=16, sink_blocks=1))):
        assert blocks == {0, row}


def test_half_precision_is_scored_in_fp32() -> None:
    """Means that differ by 1/16 near 1,000 are equal in fp16, and so are their products in an autocast to bf16."""
    q = torch.ones(1, 1, 512, 16).half()
    for best in range(3):
        k = torch.full((1, 1, 512, 16), 1000.0).half()
        k[:, :, best * 128] += 8
        with torch.autocast("cpu", torch.bfloat16):
            assert chosen(topk_blocks(q, k, 2))[3] == {best, 3}


def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    table = topk_table(q, k, 3, block=16, sink_blocks=1)
    out: torch.Tensor = sf.attention(q, k, v, table)
    return out.sin()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("dynamic", [None, True])
def test_routing_compiles_into_one_graph(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    graph = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (100, 128):
        generator = torch.Generator().manual_seed(tokens)
        q = torch.randn(2, 4, tokens, 16, generator=generator, requires_grad=True)
        k = torch.randn(2, 2, tokens, 16, generator=generator, requires_grad=True)
        plain, compiled = layer(q, k, k), graph(q, k, k)
        torch.testing.assert_close(compiled, plain)
        gradients = [torch.autograd.grad(out.sum(), (q, k)) for out in (plain, compiled)]
        for x, y in zip(*gradients, strict=True):
            torch.testing.assert_close(x, y)


def test_no_shape_depends_on_a_value() -> None:
    """Fake tensors have no values: asking for one, or for a shape that depends on one, raises."""
    with FakeTensorMode():
        q, k = torch.zeros(2, 4, 70, 16), torch.zeros(2, 2, 90, 16)
        indices, counts = topk_blocks(q, k, 4, block=16, local_blocks=2)
        assert (indices.shape, counts.shape) == ((2, 2, 5, 4), (2, 2, 5))
        assert sf.attention(q, k, k, topk_table(q, k, 4, block=16, local_blocks=2)).shape == q.shape


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
    q, k = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 90, 16)
    with Calls() as seen:
        torch.tensor([1, 0, 1]).nonzero()
    assert seen.names & waiting
    with Calls() as seen:
        topk_table(q, k, 4, block=16, local_blocks=2, sink_blocks=1)
    assert "topk" in seen.names
    assert not seen.names & waiting


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing to wait for")
def test_a_gpu_is_never_waited_for() -> None:
    q, k = torch.randn(2, 4, 100, 16).cuda().requires_grad_(), torch.randn(2, 2, 100, 16).cuda().requires_grad_()
    layer(q, k, k).sum().backward()  # edge tiles are copied once, kernels compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(q, k, k).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"q": [[0.0]]}, TypeError, "q must be a tensor, got list"),
        ({"k": torch.zeros(1, 2, 64, 8).int()}, TypeError, "k must be float16, .*, got torch.int32"),
        ({"q": torch.zeros(64, 8)}, ValueError, r"q must be \[batch, heads, tokens, dim\], got shape \(64, 8\)"),
        ({"k": torch.zeros(1, 2, 0, 8)}, ValueError, r"no dimension but the batch may be 0; .* k \(1, 2, 0, 8\)"),
        ({"q": torch.zeros(0, 4, 64, 8), "k": torch.zeros(0, 2, 64, 8)}, ValueError, r"one sample .*got q \(0"),
        ({"k": torch.zeros(1, 3, 64, 8)}, ValueError, "a multiple of key heads: 4 % 3 != 0"),
        ({"k": torch.zeros(1, 2, 64, 9)}, ValueError, r"one head dim; got q \(1, 4, 64, 8\), k \(1, 2, 64, 9\)"),
        ({"k": torch.zeros(1, 2, 64, 8, device="meta")}, ValueError, "on one device, got cpu, meta"),
        ({"k_blocks": 2.0}, TypeError, "k_blocks must be an int, got 2.0"),
        ({"k_blocks": 0}, ValueError, "k_blocks must be at least 1, got 0"),
        ({"sink_blocks": -1}, ValueError, "sink_blocks must be at least 0, got -1"),
        ({"local_blocks": 2, "sink_blocks": 1}, ValueError, "k_blocks=2 is below the 3 blocks that some row always"),
        ({"q_offset": 8, "k_blocks": 1}, ValueError, "k_blocks=1 is below the 2 blocks .*q_offset=8"),
        ({"block": 17}, ValueError, "block sizes are 16, .*got block=17"),
        ({"query": "last"}, ValueError, "query must be 'mean' or 'first', got 'last'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(1, 4, 64, 8), "k": torch.zeros(1, 2, 64, 8), "k_blocks": 2, "block": 16}
    with pytest.raises(kind, match=message):
        topk_blocks(**(good | change))
