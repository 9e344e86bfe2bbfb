"""A sample of a padded batch gives what it gives alone, whatever its padding holds."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import sparseflash as sf
from sparseflash import SparseAttention, SparseTransformerBlock
from sparseflash import patterns as P
from sparseflash.rotary import Rotary1d, Rotary2d
from sparseflash.tables import shortened
from sparseflash.tables.padded import depends_on_length, padded_table
from tests import strategies

WINDOW = "causal() & local(10)"
FEATURES: dict[str, Any] = {"kv_heads": 2, "head_dim": 8, "bias": True, "sinks": True, "alibi": True, "softcap": 3.0}

blocks = st.tuples(st.sampled_from(strategies.BLOCKS[:4]), st.sampled_from(strategies.BLOCKS[:4]))
# With 3 heads, so that a pattern may be one per head.
patterns = strategies.expressions() | strategies.per_head(3)


@st.composite
def batches(draw: st.DrawFn, most: int = 300) -> tuple[int, list[int]]:
    """N and the lengths of some samples, 0 and N among them more often than chance would have it."""
    tokens = draw(st.integers(1, most))
    lengths = st.integers(0, tokens) | st.sampled_from([0, 1, tokens, tokens - 1, min(128, tokens)])
    return tokens, draw(st.lists(lengths, min_size=1, max_size=4))


@given(patterns, blocks, batches())
@settings(max_examples=150)
def test_the_table_of_a_batch_holds_the_mask_of_each_sample(
    pattern: sf.Pattern, block: tuple[int, int], batch: tuple[int, list[int]]
) -> None:
    """Attention over it, in float64: outputs are those of the sample alone, and so are all gradients."""
    tokens, lengths = batch
    table = padded_table(pattern, block, torch.tensor(lengths), tokens)
    table.check()
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, dout = torch.randn(4, len(lengths), 3, tokens, 4, dtype=torch.float64, generator=generator).unbind(0)
    for sample, length in enumerate(lengths):
        for x in (k, v):
            x[sample, :, length:] = 0
        dout[sample, :, length:] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = sf.attention(q, k, v, table)
    gradients = torch.autograd.grad(out, leaves, dout)
    for sample, length in enumerate(lengths):
        if length == 0:
            assert not out[sample, :, :].any()
            assert all(not g[sample].any() for g in gradients)
            continue
        own = [x[sample : sample + 1, :, :length].detach().requires_grad_() for x in (q, k, v)]
        alone = sf.attention(own[0], own[1], own[2], pattern.compile(length, block))
        torch.testing.assert_close(out[sample : sample + 1, :, :length], alone)
        d_own = torch.autograd.grad(alone, own, dout[sample : sample + 1, :, :length])
        for all_of, one in zip(gradients, d_own, strict=True):
            torch.testing.assert_close(all_of[sample : sample + 1, :, :length], one)
            assert not all_of[sample, :, length:].any()


def test_samples_with_patterns_of_their_own_keep_them() -> None:
    pattern = P.per_sample(P.per_head(P.causal(), P.local(3)), P.documents([20, 30]), P.full() - P.full())
    lengths, N = [50, 33, 20], 50
    table = padded_table(pattern, (16, 16), torch.tensor(lengths), N)
    table.check()
    q, k, v = torch.randn(3, 3, 2, N, 4, dtype=torch.float64).unbind(0)
    out = sf.attention(q, k, v, table)
    whole = pattern.compile(N).to_dense()
    for sample, length in enumerate(lengths):
        mine = slice(sample, sample + 1), slice(None), slice(length)
        seen = torch.from_numpy(whole[sample][:, :length, :length])
        torch.testing.assert_close(
            out[sample : sample + 1, :, :length], sf.reference.attention(q[mine], k[mine], v[mine], seen)
        )
    with pytest.raises(ValueError, match="the mask is for 3 samples, lengths are those of 2"):
        padded_table(pattern, (16, 16), torch.tensor([3, 4]), N)


@pytest.mark.parametrize(
    ("pattern", "depends"),
    [
        (P.random_blocks(2), True),
        (P.bigbird(), True),
        (P.causal() & ~P.random_blocks(2), True),
        (P.per_head(P.causal(), P.random_blocks(1)), True),
        (P.star(), False),
        (P.causal() & (P.local(3) | ~P.butterfly()), False),
    ],
)
def test_only_random_cells_depend_on_the_length(pattern: sf.Pattern, depends: bool) -> None:
    assert depends_on_length(pattern) is depends


def shaken(module: torch.nn.Module) -> Any:
    """The module in float64, with no parameter at 0 or 1."""
    torch.manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return module


MASKS: dict[str, Callable[[], Any]] = {
    "causal": lambda: WINDOW,
    "both sides": lambda: "local(10) | global_tokens(1)",
    "random": lambda: "bigbird(unit=8)",
    "per head": lambda: P.per_head(P.causal(), P.local(7), P.full(), P.star()),
    "block mask": lambda: P.local(10).compile(90, block=32),
    "dense": lambda: None,
}
PADDED: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "lengths": lambda there: {"lengths": there.sum(1)},
    "list": lambda there: {"lengths": there.sum(1).tolist()},
    "numpy": lambda there: {"lengths": there.sum(1).numpy()},
    "int32": lambda there: {"lengths": there.sum(1).int()},
    "right": lambda there: {"key_padding_mask": ~there},
    "left": lambda there: {"key_padding_mask": ~there},
    "holes": lambda there: {"key_padding_mask": ~there},
}


def places(kind: str, samples: int = 4, tokens: int = 90) -> Tensor:
    """Where a batch has tokens, bool [B, N]: one sample whole, one empty."""
    lengths = torch.tensor([tokens, 0, 37, 64])[:, None]
    if kind == "holes":
        return torch.rand(samples, tokens, generator=torch.Generator().manual_seed(0)) < lengths / tokens
    return torch.arange(tokens) < lengths if kind != "left" else torch.arange(tokens) >= tokens - lengths


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("kind", PADDED)
@pytest.mark.parametrize("whole_block", [False, True], ids=["attention", "block"])
def test_a_sample_gives_what_it_gives_alone(mask: Callable[[], Any], kind: str, whole_block: bool) -> None:
    layer = SparseAttention(24, 4, mask(), block=16, rotary=Rotary1d(), **FEATURES)
    module = shaken(SparseTransformerBlock(layer, norm="layer", bias=True) if whole_block else layer)
    there = places(kind)
    x = torch.randn(4, 90, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x.masked_fill(~there[..., None], torch.nan).requires_grad_()  # whatever stands there
    out = module(x, **PADDED[kind](there))
    cotangent = torch.randn_like(out)
    dx, *weights = torch.autograd.grad(out, [x, *module.parameters()], cotangent)
    assert not out[~there].any()
    assert not dx[~there].any()
    apart = [torch.zeros_like(w) for w in weights]
    for sample, here in enumerate(there):
        if not here.any():
            continue
        alone = x[sample, here][None].detach().requires_grad_()
        given = P.local(10).compile(int(here.sum()), block=32) if isinstance(layer.mask, sf.BlockMask) else None
        own = module(alone, given)
        torch.testing.assert_close(out[sample, here], own[0])
        d_alone, *d_weights = torch.autograd.grad(own, [alone, *module.parameters()], cotangent[sample, here][None])
        torch.testing.assert_close(dx[sample, here], d_alone[0])
        for total, part in zip(apart, d_weights, strict=True):
            total += part
    for got, want in zip(weights, apart, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_images_are_padded_at_their_end() -> None:
    layer = shaken(SparseAttention(24, 4, P.neighborhood((6, 10), 2), head_dim=8, block=16, rotary=Rotary2d((6, 10))))
    x = torch.randn(2, 60, 24, dtype=torch.float64)
    out = layer(x, lengths=[60, 25])
    torch.testing.assert_close(out[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x.index_fill(1, torch.arange(25, 60), 3.0), lengths=[25, 25])[1], out[1])


def test_dropout_leaves_padding_at_zero() -> None:
    block = SparseTransformerBlock(SparseAttention(24, 4, WINDOW, dropout=0.5), dropout=0.5)
    x = torch.randn(2, 40, 24)
    torch.manual_seed(3)
    first = block(x, lengths=[40, 11])
    torch.manual_seed(3)
    assert torch.equal(block(x, lengths=[40, 11]), first)
    assert not torch.equal(block(x, lengths=[40, 11]), first)
    assert first.isfinite().all()
    assert not first[1, 11:].any()


def test_autocast_and_half_precision_take_padding() -> None:
    layer, x = SparseAttention(24, 4, WINDOW), torch.randn(2, 40, 24)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x, lengths=[40, 11])
    assert low.dtype == torch.bfloat16
    half = layer.bfloat16()(x.bfloat16(), lengths=[40, 11])
    assert half.dtype == torch.bfloat16
    for out in (low, half):
        assert not out[1, 11:].any()
        assert out.isfinite().all()


def test_no_lengths_and_all_there_are_the_same() -> None:
    layer, x = SparseAttention(24, 4, "local(10)", block=16).double(), torch.randn(2, 90, 24).double()
    torch.testing.assert_close(layer(x, lengths=[90, 90]), layer(x))


@pytest.mark.tier2
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("name", ["both sides", "random", "dense"])
def test_one_graph_serves_all_lengths(name: str) -> None:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    block = SparseTransformerBlock(SparseAttention(24, 4, MASKS[name](), block=16, rotary=Rotary1d(), **FEATURES))
    block = shaken(block)
    graph = torch.compile(block, fullgraph=True, backend=count, dynamic=True)
    for kind in ("lengths", "key_padding_mask"):
        frames = set()
        for tokens in (60, 17, 200):
            x = torch.randn(3, tokens, 24, dtype=torch.float64)
            lengths = torch.randint(tokens + 1, (3,))
            padding = {kind: lengths if kind == "lengths" else torch.arange(tokens) >= lengths[:, None]}
            outs = [module(x, **padding) for module in (graph, block)]
            torch.testing.assert_close(*outs)
            gradients = [torch.autograd.grad(out.square().sum(), list(block.parameters())) for out in outs]
            for a, b in zip(*gradients, strict=True):
                torch.testing.assert_close(a, b)
            frames.add(count.frame_count)
        assert len(frames) == 1, frames


def test_a_compiled_call_refuses_what_would_compile_at_each_batch() -> None:
    torch._dynamo.reset()
    x = torch.randn(2, 40, 24)
    layer = torch.compile(SparseAttention(24, 4, WINDOW), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"lengths in torch\.compile must be a tensor"):
        layer(x, lengths=[40, 11])
    masked = SparseAttention(24, 4, sf.parse(WINDOW).compile(40))
    with pytest.raises(Exception, match="cut a Pattern, not a BlockMask"):
        torch.compile(masked, fullgraph=True, backend="eager")(x, lengths=torch.tensor([40, 11]))


def count_tables(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables made from here on, by weak reference."""
    made: list[Any] = []
    make = shortened.shortened

    def counted(*arguments: Any) -> sf.LookupTable:
        table = make(*arguments)
        made.append(weakref.ref(table))
        return table

    monkeypatch.setattr("sparseflash.tables.padded.shortened", counted)
    return made


def test_layers_share_a_table_that_goes_with_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_tables(monkeypatch)
    model = [SparseTransformerBlock(SparseAttention(24, 4, WINDOW)) for _ in range(3)]
    for length in (11, 12, 13):
        x, lengths = torch.randn(2, 40, 24), torch.tensor([40, length])
        for kind in ({"lengths": lengths}, {"key_padding_mask": torch.arange(40) >= lengths[:, None]}):
            y = x
            for block in model:
                y = block(y, **kind)
            with torch.no_grad():
                model[0](x, **kind)
    assert len(made) == 6
    del x, y, lengths, kind
    gc.collect()
    assert [table() for table in made] == [None] * 6


def test_lengths_that_change_in_place_are_read_again() -> None:
    layer, x, lengths = SparseAttention(24, 4, "local(10)"), torch.randn(2, 40, 24), torch.tensor([40, 11])
    before = layer(x, lengths=lengths)
    lengths[1] = 30
    assert torch.equal(layer(x, lengths=lengths), layer(x, lengths=[40, 30]))
    assert not torch.equal(layer(x, lengths=lengths), before)


def test_what_inference_made_serves_training() -> None:
    layer, x = SparseAttention(24, 4, "local(9)"), torch.randn(2, 41, 24)
    lengths = torch.tensor([41, 11])
    with torch.inference_mode():
        layer(x, lengths=lengths)
        layer(x, lengths=[41, 12])
        made_inside = torch.tensor([41, 13])
    for given_lengths in (lengths, [41, 12], made_inside):
        layer(x, lengths=given_lengths).sum().backward()


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "both": ({"lengths": [1, 2], "key_padding_mask": torch.zeros(2, 40).bool()}, ValueError, "not both"),
    "booleans": ({"lengths": torch.zeros(2).bool()}, TypeError, "key_padding_mask="),
    "floats": ({"lengths": torch.zeros(2)}, TypeError, "lengths must be ints, one per sample, got torch.float32"),
    "listed floats": ({"lengths": [1.0, 2.0]}, TypeError, r"lengths must be an int tensor \[2\] or a sequence"),
    "an int": ({"lengths": 40}, TypeError, "got 40"),
    "one": ({"lengths": [40]}, ValueError, r"lengths must be 2 ints, one per sample of x \(2, 40, 24\), got 1"),
    "a matrix": ({"lengths": torch.ones(2, 1).long()}, ValueError, r"lengths must be \[2\].* got \(2, 1\)"),
    "long": ({"lengths": [40, 41]}, ValueError, r"0 to 40, the tokens of x; sample 1 has lengths\[1\] = 41"),
    "negative": ({"lengths": torch.tensor([-1, 4])}, ValueError, r"lengths\[0\] = -1"),
    "tokenizer": (
        {"key_padding_mask": torch.ones(2, 40).long()},
        TypeError,
        "got torch.int64; of a tokenizer's .* key_padding_mask=attention_mask == 0",
    ),
    "additive": ({"key_padding_mask": torch.zeros(2, 40)}, TypeError, "bool tensor"),
    "array": ({"key_padding_mask": np.zeros((2, 40), bool)}, TypeError, "got ndarray"),
    "shape": ({"key_padding_mask": torch.zeros(40, 2).bool()}, ValueError, r"= \[2, 40\] .*, got \(40, 2\)"),
    "table": (
        {"lengths": [1, 2], "mask": sf.lookup(P.causal().compile(40))},
        ValueError,
        "cut a Pattern or a BlockMask, not a LookupTable",
    ),
    "router": ({"lengths": [1, 2], "mask": lambda q, k: None}, ValueError, "a router chooses blocks by their content"),
    "another length": (
        {"lengths": [1, 2], "mask": P.causal().compile(41)},
        ValueError,
        r"the mask is for .*\(41, 41\), q and k have \(40, 40\)",
    ),
}


@pytest.mark.parametrize(("keywords", "kind", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("whole_block", [False, True], ids=["attention", "block"])
def test_what_does_not_fit_is_refused(
    keywords: dict[str, Any], kind: type[Exception], message: str, whole_block: bool
) -> None:
    layer = SparseAttention(24, 4, WINDOW)
    module = SparseTransformerBlock(layer) if whole_block else layer
    with pytest.raises(kind, match=message):
        module(torch.zeros(2, 40, 24), **keywords)
