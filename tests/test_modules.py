"""Modules equal their formulas, train every parameter, and keep the names of their weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparseflash as sf
from sparseflash import SparseAttention, SparseTransformerBlock
from sparseflash import patterns as P
from sparseflash.nn.attention import alibi_slopes
from sparseflash.ordering import token_order
from sparseflash.rotary import Rotary1d, Rotary2d, Rotary3d, rotary_table, rotate

WINDOW = "causal() & local(10)"


def random_input(tokens: int, width: int = 24, samples: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(samples, tokens, width, generator=torch.Generator().manual_seed(seed))


def shaken(module: nn.Module) -> nn.Module:
    """The module in float64 with every parameter moved from its first value, sinks at 0 and norms at 1 among them."""
    torch.manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    return module


def turned(x: Tensor, base: float) -> Tensor:
    """[..., N, D] by RoFormer's formula, plane by plane as complex numbers."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * rates
    planes = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([planes.real, planes.imag], -1)


def dense(layer: SparseAttention, x: Tensor, token_mask: Tensor) -> Tensor:
    """The attention layer as one would write it by hand: one head after the other, no mask but a matrix."""
    weights = {name: value.detach() for name, value in layer.named_parameters()}

    def projected(name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", torch.zeros(()))

    D, group = layer.head_dim, layer.heads // layer.kv_heads
    tokens = torch.arange(x.shape[1])
    heads = []
    for head in range(layer.heads):
        key_head = head // group
        q = projected("q_proj")[..., head * D : (head + 1) * D]
        k, v = (projected(name)[..., key_head * D : (key_head + 1) * D] for name in ("k_proj", "v_proj"))
        if isinstance(layer.rotary, Rotary1d):
            q, k = turned(q, layer.rotary.base), turned(k, layer.rotary.base)
        scores = q @ k.mT / D**0.5
        if layer.softcap is not None:
            scores = layer.softcap * (scores / layer.softcap).tanh()
        if layer.alibi:
            scores = scores - alibi_slopes(layer.heads)[head] * (tokens[:, None] - tokens).abs()
        powers = scores.masked_fill(~token_mask, -torch.inf).exp()
        total = powers.sum(-1, keepdim=True)
        if layer.sinks is not None:
            total = total + weights["sinks"][head].exp()
        heads.append(powers / total @ v)
    return torch.cat(heads, -1) @ weights["out_proj.weight"].T + weights.get("out_proj.bias", torch.zeros(()))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gqa": {"kv_heads": 2},
    "mqa, wide heads": {"kv_heads": 1, "head_dim": 16, "bias": True},
    "rotary": {"rotary": Rotary1d(base=100.0), "block": 16},
    "sinks": {"sinks": True, "block": (16, 32)},
    "softcap": {"softcap": 0.5},
    "alibi": {"alibi": True},
    "all": {"kv_heads": 2, "bias": True, "rotary": Rotary1d(), "sinks": True, "softcap": 2.0, "alibi": True},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("tokens", [1, 47, 130])
def test_attention_equals_the_formula(features: dict[str, Any], tokens: int) -> None:
    layer = shaken(SparseAttention(24, 4, WINDOW, **({"head_dim": 6} | features)))
    assert isinstance(layer, SparseAttention)
    x = random_input(tokens).double()
    token_mask = torch.from_numpy(sf.parse(WINDOW).compile(tokens).to_dense())
    # cos, sin and slopes are kept in fp32: their rounding is that of the tolerance.
    torch.testing.assert_close(layer(x), dense(layer, x, token_mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_the_block_equals_the_formula(mlp: Any, norm: Any) -> None:
    block = shaken(SparseTransformerBlock(SparseAttention(24, 4, WINDOW), mlp=mlp, norm=norm, bias=True))
    w = {name: value.detach() for name, value in block.named_parameters()}
    x = random_input(47).double()

    def normed(x: Tensor, name: str) -> Tensor:
        if norm == "rms":
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    token_mask = torch.from_numpy(sf.parse(WINDOW).compile(47).to_dense())
    attention = block.get_submodule("attention")
    assert isinstance(attention, SparseAttention)
    middle = x + dense(attention, normed(x, "attention_norm"), token_mask)
    y = normed(middle, "mlp_norm")
    if mlp == "gelu":
        a = linear(y, "mlp_in")
        hidden = a * (1 + torch.erf(a / 2**0.5)) / 2
    else:
        gate = linear(y, "mlp_gate")
        hidden = gate / (1 + (-gate).exp()) * linear(y, "mlp_in")
    torch.testing.assert_close(block(x), middle + linear(hidden, "mlp_out"))


def routed(**options: Any) -> Any:
    return partial(sf.routing.topk_table, k_blocks=3, block=16, **options)


MASKS: dict[str, Callable[[], Any]] = {
    "text": lambda: WINDOW,
    "pattern": lambda: sf.parse(WINDOW),
    "block mask": lambda: sf.parse(WINDOW).compile(60, block=32),
    "dense": lambda: None,
    "router": lambda: routed(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_every_parameter_gets_a_gradient(mask: Callable[[], Any]) -> None:
    layer = SparseAttention(24, 4, mask(), kv_heads=2, head_dim=8, bias=True, sinks=True, rotary=Rotary2d((6, 10)))
    block = SparseTransformerBlock(layer, mlp="swiglu", norm="layer", bias=True)
    out = block(random_input(60))
    out.square().sum().backward()
    assert out.shape == (2, 60, 24)
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name == "attention.k_proj.bias", name


def test_a_mask_as_text_a_pattern_or_compiled_is_the_same_mask() -> None:
    x = random_input(60)
    layers = [SparseAttention(24, 4, mask, block=32) for mask in (WINDOW, sf.parse(WINDOW))]
    layers.append(SparseAttention(24, 4, sf.parse(WINDOW).compile(60, block=32)))
    for layer in layers:
        layer.load_state_dict(layers[0].state_dict())
    outs = [layer(x) for layer in layers]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    other = SparseAttention(24, 4)
    other.load_state_dict(layers[0].state_dict())
    assert torch.equal(other(x, sf.parse(WINDOW).compile(60, block=32)), outs[0])
    assert not torch.allclose(other(x), outs[0])


def test_a_router_sees_rotated_queries_and_keys() -> None:
    seen: list[Tensor] = []

    def router(q: Tensor, k: Tensor) -> sf.Pattern:
        seen.extend((q, k))
        return sf.patterns.causal()

    layer = SparseAttention(24, 4, router, kv_heads=2, head_dim=8, rotary=Rotary1d())
    x = random_input(20)
    layer(x)
    q, k = (f(x).unflatten(2, (-1, 8)).transpose(1, 2) for f in (layer.q_proj, layer.k_proj))
    assert [tuple(s.shape) for s in seen] == [(2, 4, 20, 8), (2, 2, 20, 8)]
    for got, straight in zip(seen, (q, k), strict=True):
        torch.testing.assert_close(got, turned(straight.double(), 10_000.0).float(), rtol=1e-5, atol=1e-5)


def test_dropout_is_for_training() -> None:
    block = SparseTransformerBlock(SparseAttention(24, 4, dropout=0.5), dropout=0.5)
    still = SparseTransformerBlock(SparseAttention(24, 4))
    still.load_state_dict(block.state_dict())
    x = random_input(40)
    assert not torch.equal(block.attention(x), block.attention(x))
    for kept in (block.mlp_out, block.attention.out_proj):  # one of the two added terms at a time
        alone = copy.deepcopy(block)
        alone.attention.dropout = 0.0
        silent = alone.mlp_out if kept is block.attention.out_proj else alone.attention.out_proj
        nn.init.zeros_(silent.weight)
        assert not torch.equal(alone(x), alone(x))
    torch.manual_seed(3)
    first = block(x)
    torch.manual_seed(3)
    assert torch.equal(block(x), first)
    block.eval()
    assert torch.equal(block(x), still(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_the_block_compiles_into_one_graph(mask: Callable[[], Any]) -> None:
    torch._dynamo.reset()
    layer = SparseAttention(
        24, 4, mask(), kv_heads=2, head_dim=8, block=16, rotary=Rotary1d(), sinks=True, softcap=5.0, alibi=True
    )
    block = SparseTransformerBlock(layer, mlp="swiglu", norm="layer")
    graph = torch.compile(block, fullgraph=True, backend="aot_eager")
    for tokens in (60,) if isinstance(layer.mask, sf.BlockMask) else (60, 70):
        x = random_input(tokens)
        torch.testing.assert_close(graph(x), block(x))
        gradients = [
            torch.autograd.grad(module(x).square().sum(), list(block.parameters())) for module in (graph, block)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_graph_of_a_block_serves_every_length() -> None:
    torch._dynamo.reset()
    count = CompileCounterWithBackend("aot_eager")
    layer = SparseAttention(24, 4, WINDOW, kv_heads=2, head_dim=8, block=(16, 32), rotary=Rotary1d(), sinks=True)
    block = SparseTransformerBlock(layer)
    graph = torch.compile(block, fullgraph=True, backend=count, dynamic=True)
    frames = set()
    for tokens in (60, 17, 300):
        x = random_input(tokens)
        torch.testing.assert_close(graph(x), block(x))
        frames.add(count.frame_count)
    assert len(frames) == 1, frames


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_graph_draws_new_dropout_at_each_call() -> None:
    torch._dynamo.reset()
    layer = SparseAttention(24, 4, WINDOW, dropout=0.5)
    graph = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = random_input(40)
    assert not torch.equal(graph(x), graph(x))
    layer.eval()
    torch.testing.assert_close(graph(x), layer(x))


def test_autocast_keeps_the_residual_stream() -> None:
    block = SparseTransformerBlock(
        SparseAttention(24, 4, WINDOW, rotary=Rotary1d(), sinks=True, alibi=True), mlp="swiglu"
    )
    x = random_input(60)
    plain = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
        assert block.attention(x).dtype == torch.bfloat16
    assert low.dtype == torch.float32
    # What is added to x was rounded to bf16 (2^-9 of it) at each of the 6 steps that attention and MLP have each.
    error, added = (difference.detach().abs().max() for difference in (low - plain, plain - x))
    assert 0 < float(error) < 12 * 2**-9 * float(added)
    low.sum().backward()
    assert block.attention.q_proj.weight.grad is not None
    assert block.attention.q_proj.weight.grad.dtype == torch.float32


def test_half_precision_modules_keep_slopes_and_angles_in_fp32() -> None:
    layer = SparseAttention(24, 4, WINDOW, rotary=Rotary1d(), sinks=True, alibi=True).bfloat16()
    assert layer(random_input(60).bfloat16()).dtype == torch.bfloat16


ATTENTION_WEIGHTS = {
    "q_proj.weight": (32, 24),
    "k_proj.weight": (16, 24),
    "v_proj.weight": (16, 24),
    "out_proj.weight": (24, 32),
}
BLOCK_WEIGHTS = {
    "attention_norm.weight": (24,),
    **{f"attention.{name}": shape for name, shape in ATTENTION_WEIGHTS.items()},
    "mlp_norm.weight": (24,),
    "mlp_in.weight": (96, 24),
    "mlp_out.weight": (24, 96),
}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def test_the_names_of_the_weights_stay() -> None:
    """Files with weights out there hold these names: changing one breaks them."""

    def layer(**options: Any) -> SparseAttention:
        return SparseAttention(24, 4, routed(), kv_heads=2, head_dim=8, **options)

    biases = {"q_proj.bias": (32,), "k_proj.bias": (16,), "v_proj.bias": (16,), "out_proj.bias": (24,)}
    assert shapes(layer()) == ATTENTION_WEIGHTS
    assert shapes(layer(bias=True, sinks=True)) == ATTENTION_WEIGHTS | biases | {"sinks": (4,)}
    assert shapes(SparseTransformerBlock(layer())) == BLOCK_WEIGHTS
    swiglu = {"mlp_in.weight": (64, 24), "mlp_gate.weight": (64, 24), "mlp_out.weight": (24, 64)}
    assert shapes(SparseTransformerBlock(layer(), mlp="swiglu")) == BLOCK_WEIGHTS | swiglu
    more = {
        "attention_norm.bias": (24,), "mlp_norm.bias": (24,), "mlp_in.bias": (50,), "mlp_in.weight": (50, 24),
        "mlp_out.bias": (24,), "mlp_out.weight": (24, 50),
    }  # fmt: skip
    assert shapes(SparseTransformerBlock(layer(), mlp_width=50, norm="layer", bias=True)) == BLOCK_WEIGHTS | more


def test_masks_and_position_tables_are_no_state() -> None:
    rotary = Rotary2d((6, 10), order="tile", tile=(2, 5))
    layer = SparseAttention(24, 4, WINDOW, head_dim=8, rotary=rotary, alibi=True)
    block = SparseTransformerBlock(layer)
    before = shapes(block)
    out = block(random_input(60))
    assert shapes(block) == before
    assert not list(block.buffers())
    again = copy.deepcopy(block)
    again.load_state_dict(block.state_dict())
    assert torch.equal(again(random_input(60)), out)


def test_what_inference_made_serves_training() -> None:
    layer = SparseAttention(24, 4, "causal() & local(11)", head_dim=8, rotary=Rotary1d(base=123.0), alibi=True)
    with torch.inference_mode():
        layer(random_input(61))
    layer(random_input(61)).sum().backward()
    assert layer.q_proj.weight.grad is not None


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"width": 0}, ValueError, "width must be at least 1, got 0"),
        ({"heads": 4.0}, TypeError, "heads must be an int, got 4.0"),
        ({"heads": True}, TypeError, "heads must be an int, got True"),
        ({"kv_heads": 3}, ValueError, "heads must be a multiple of kv_heads, got heads=4 and kv_heads=3"),
        ({"width": 26}, ValueError, "width must be a multiple of heads, got 26 and 4; or give head_dim"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
        ({"mask": "casual()"}, ValueError, "casual"),
        ({"mask": 3}, TypeError, "mask must be a Pattern, its text, a BlockMask, a router or None, got 3"),
        ({"mask": P.causal}, TypeError, r"a router or None, got .*causal is not called: write causal\(\)"),
        ({"mask": P.local}, TypeError, r"local is not called: write local\(window\)"),
        ({"mask": P.causal().__class__}, TypeError, r"Causal is a class: write Causal\(\)"),
        ({"mask": lambda b, h, q, k: q >= k}, TypeError, r"takes \(b, h, q, k\); .*where\(lambda q, k: \.\.\.\)"),
        (
            {"mask": torch.ones(9, 9).bool()},
            TypeError,
            r"Tensor of torch\.bool, shape \(9, 9\); .*BlockMask\.from_dense",
        ),
        ({"mask": sf.lookup(P.full().compile(9))}, TypeError, "a table belongs to one batch"),
        ({"block": 100}, ValueError, "block sizes are 16, 32, .* got block=100"),
        ({"block": "128"}, TypeError, "block must be an int or a pair of ints"),
        ({"rotary": "1d"}, TypeError, "rotary must be a Rotary1d, Rotary2d, Rotary3d, PackedRotary or None, got '1d'"),
        ({"rotary": Rotary1d(), "head_dim": 7}, ValueError, "Rotary1d needs an even head dim, got 7"),
        ({"rotary": Rotary2d((4, 4)), "head_dim": 6}, ValueError, "a multiple of 4, got 6"),
        ({"rotary": Rotary3d((2, 4, 4)), "head_dim": 7}, ValueError, "Rotary3d needs an even head dim, got 7"),
        ({"rotary": Rotary3d((2, 4, 4), split=(2, 2, 4)), "head_dim": 6}, ValueError, "a head dim of 8, got 6"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": "half"}, TypeError, "dropout must be a number, got 'half'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        SparseAttention(**({"width": 24, "heads": 4} | change))


def test_bad_blocks_and_inputs_are_named() -> None:
    layer = SparseAttention(24, 4, sf.patterns.causal().compile(40), head_dim=8, rotary=Rotary2d((5, 8)))
    with pytest.raises(TypeError, match="attention must be a SparseAttention, got Linear"):
        SparseTransformerBlock(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mlp must be 'gelu' or 'swiglu', got 'relu'"):
        SparseTransformerBlock(layer, mlp="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="norm must be 'rms' or 'layer', got 'batch'"):
        SparseTransformerBlock(layer, norm="batch")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mlp_width must be at least 1, got -1"):
        SparseTransformerBlock(layer, mlp_width=-1)
    with pytest.raises(ValueError, match=r"x must be \[batch, tokens, width=24\], got \(2, 40, 25\)"):
        layer(torch.zeros(2, 40, 25))
    with pytest.raises(ValueError, match="an image of 5 x 8 pixels has 40 tokens, got 41"):
        layer(random_input(41))
    with pytest.raises(ValueError, match=r"the mask is for .*\(40, 40\), q and k have \(41, 41\)"):
        SparseAttention(24, 4, sf.patterns.causal().compile(40))(random_input(41))
    with pytest.raises(ValueError, match="base must be positive, got 0"):
        Rotary1d(base=0)
    with pytest.raises(ValueError, match=r"order must be one of .*; got 'spiral'"):
        Rotary2d((5, 8), order="spiral")
    with pytest.raises(ValueError, match=r"shape must have two entries, got \(5, 8, 3\)"):
        Rotary2d((5, 8, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        alibi_slopes(0)
    with pytest.raises(ValueError, match="wavelengths must be 0 < shortest <= longest"):
        Rotary2d((5, 8), wavelengths=(3.0, 2.0))
    with pytest.raises(ValueError, match=r"shape must have three entries, for frames, y and x; got \(5, 8\)"):
        Rotary3d((5, 8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"split must be even numbers of entries, got \(3, 2, 3\)"):
        Rotary3d((5, 8, 8), split=(3, 2, 3))
    with pytest.raises(ValueError, match="a video of 2 x 3 x 4 has 24 tokens, got 25"):
        Rotary3d((2, 3, 4)).table(25, 8)


@pytest.mark.parametrize(("order", "split"), [("raster", None), ("tile", (2, 8, 4)), ("hilbert", (14, 0, 0))])
def test_planes_turn_with_the_place_in_a_video(order: str, split: tuple[int, int, int] | None) -> None:
    shape, tile = (3, 4, 5), (2, 3, 2) if order == "tile" else None
    cos, sin = Rotary3d(shape, order, tile, split, base=100.0).table(60, 14)
    places, _ = token_order(shape, order, tile=tile)
    parts = split or (6, 4, 4)  # 14 - 4 * (14 // 6) and twice 2 * (14 // 6)
    for token, raster in enumerate(places.tolist()):
        place = raster // 20, raster // 5 % 4, raster % 5
        angles = [x * 100.0 ** (-2 * i / n) for x, n in zip(place, parts, strict=True) for i in range(n // 2)]
        assert np.allclose(cos[token], np.cos(angles), atol=1e-6)
        assert np.allclose(sin[token], np.sin(angles), atol=1e-6)


def test_a_layer_turns_with_the_place_in_a_video() -> None:
    """Moved by a frame, every token sees what it saw: scores depend on how far places lie apart."""
    layer = SparseAttention(16, 1, P.neighborhood((5, 3, 4), (1, 3, 3)), block=16, rotary=Rotary3d((5, 3, 4)))
    x = torch.randn(1, 60, 16)
    moved = torch.cat([torch.randn(1, 12, 16), x[:, :48]], dim=1)
    assert torch.allclose(layer(x)[:, 12:36], layer(moved)[:, 24:48], atol=1e-5)


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (torch.zeros(40, 24), ValueError, r"x must be \[batch, tokens, width=24\], got \(40, 24\).*x\.unsqueeze\(0\)"),
        (torch.zeros(2, 40).long(), ValueError, r"got \(2, 40\); token ids go through nn\.Embedding\(symbols, 24\)"),
        (torch.zeros(2, 40, 24).long(), TypeError, "x must be floating, got torch.int64; token ids"),
        (torch.zeros(2, 40, 24).double(), TypeError, "x is torch.float64, the module's weights are torch.float32"),
        (np.zeros((2, 40, 24)), TypeError, "x must be a tensor .*, got ndarray"),
    ],
)
def test_inputs_of_another_kind_are_told_what_to_write(x: Any, kind: type[Exception], message: str) -> None:
    layer = SparseAttention(24, 4, WINDOW)
    for module in (layer, SparseTransformerBlock(layer)):
        with pytest.raises(kind, match=message):
            module(x)


def test_a_router_that_answers_something_else_is_told_what_to_write() -> None:
    x = random_input(40)
    with pytest.raises(TypeError, match=r"returned Tensor of torch\.bool, shape \(2, 4, 40, 6\).*patterns\.where"):
        SparseAttention(24, 4, lambda q, k: q >= k)(x)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"return sparseflash\.routing\.topk_table"):
        SparseAttention(24, 4, partial(sf.routing.topk_blocks, k_blocks=3, block=16))(x)  # type: ignore[arg-type]


def test_a_call_takes_the_masks_that_a_module_takes() -> None:
    x, layer = random_input(60), SparseAttention(24, 4, block=32)
    want = layer(x, sf.parse(WINDOW))
    assert torch.equal(layer(x, WINDOW), want)
    assert torch.equal(layer(x, lambda q, k: sf.parse(WINDOW).compile(60, block=32)), want)
    assert torch.equal(layer(x, sf.lookup(sf.parse(WINDOW).compile(60, block=32))), want)
    with pytest.raises(TypeError, match=r"Tensor of torch\.bool, shape \(60, 60\); for a bool tensor"):
        layer(x, torch.ones(60, 60).bool())
    with pytest.raises(TypeError, match="causal is not called"):
        SparseTransformerBlock(layer)(x, P.causal)


def test_what_is_not_usual_is_shown() -> None:
    shown = repr(SparseAttention(24, 4, WINDOW, kv_heads=2, softcap=2.0, alibi=True, dropout=0.1, sinks=True))
    for word in ("heads=4 over 2", f"mask={WINDOW}", "block=(128, 128)", "softcap=2.0", "alibi=True", "dropout=0.1"):
        assert word in shown
    usual = repr(SparseAttention(24, 4))
    assert not any(word in usual for word in ("softcap", "alibi", "dropout"))


@pytest.mark.parametrize(
    "mask", [WINDOW, "bigbird(unit=8)", None, routed()], ids=["window", "bigbird", "dense", "router"]
)
def test_modules_survive_pickle_copies_and_files(mask: Any, tmp_path: Path) -> None:
    layer = SparseAttention(24, 4, mask, head_dim=8, rotary=Rotary1d(), sinks=True, alibi=True)
    block = SparseTransformerBlock(layer, mlp="swiglu")
    x = random_input(60)
    out = block(x)
    for again in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        assert repr(again) == repr(block)
        assert torch.equal(again(x), out)
    torch.save(block.state_dict(), tmp_path / "weights.pt")
    fresh = SparseTransformerBlock(
        SparseAttention(24, 4, mask, head_dim=8, rotary=Rotary1d(), sinks=True, alibi=True), mlp="swiglu"
    )
    assert not torch.equal(fresh(x), out)
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(fresh(x), out)


def test_a_module_over_a_compiled_mask_survives_pickle() -> None:
    layer = SparseAttention(24, 4, sf.parse(WINDOW).compile(60, block=16))
    x = random_input(60)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_rotary_scores_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(0)).double().unbind(0)
    products = []
    for first, second in ((0, 7), (3, 10), (5_000, 5_007), (0, 8)):
        cos, sin = rotary_table(np.array([first, second]), 16)
        products.append(float(rotate(q[None], cos[:1], sin[:1])[0] @ rotate(k[None], cos[1:], sin[1:])[0]))
    assert products[0] == pytest.approx(products[1], abs=1e-5)
    assert products[0] == pytest.approx(products[2], abs=1e-5)
    assert abs(products[0] - products[3]) > 1e-2


def test_rotary_positions_are_exact_far_out() -> None:
    """Position a million in fp32 angles would be off by up to 0.03."""
    cos, sin = rotary_table(np.array([1_000_003]), 4)
    exact = [np.cos(1_000_003.0), np.cos(1_000_003 / 100.0), np.sin(1_000_003.0), np.sin(1_000_003 / 100.0)]
    torch.testing.assert_close(torch.cat([cos, sin], 1)[0], torch.tensor(exact).float())


def test_alibi_slopes_are_those_of_the_paper() -> None:
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-i / 2) for i in range(1, 17)]))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    twelve = alibi_slopes(12)
    assert twelve[:8].tolist() == alibi_slopes(8).tolist()
    torch.testing.assert_close(twelve[8:], torch.tensor([2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]))


def test_a_block_learns_what_its_mask_lets_it_see() -> None:
    """To name the token 5 places back takes a window of 5: with one of 3 the loss stays that of guessing."""

    def loss_after(mask: str) -> float:
        torch.manual_seed(0)
        embedding = nn.Embedding(4, 16)
        block = SparseTransformerBlock(SparseAttention(16, 1, mask, block=16, rotary=Rotary1d(base=50.0)))
        head = nn.Linear(16, 4)
        parameters = [p for m in (embedding, block, head) for p in m.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(120):
            tokens = torch.randint(4, (16, 32))
            loss = F.cross_entropy(head(block(embedding(tokens)))[:, 5:].flatten(0, 1), tokens[:, :-5].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert loss_after("causal() & local(5)") < 0.3
    assert loss_after("causal() & local(3)") > 1.3
