"""What `describe` prints is what the layers read."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

import sparseflash as sf
from sparseflash.integrations.transformers import describe, use_pattern
from tests.integrations.batches import model
from tests.integrations.test_encoder_decoder import made
from tests.integrations.test_other_masks import llama4

SILENT: Any = Console(file=StringIO())


def density(text: str, tokens: int = 1024) -> float:
    return sf.parse(text).compile(tokens, block=16).density


def test_density_and_speed_up_are_over_what_the_model_allows() -> None:
    """One layer of this model sees everything before it, the next one a window of 9 tokens."""
    sparse = use_pattern(model("qwen"), ["local(100)", "dilated(2, 3)"], block=16)
    console = Console(file=StringIO(), width=120)
    first, second = describe(sparse, 1024, console=console)
    assert (first.name, first.pattern) == ("model.layers.0.self_attn", "local(100)")
    assert first.density == density("causal() & local(100)")
    assert first.speedup == density("causal()") / first.density
    assert second.density == density("causal() & local(8) & dilated(2, 3)")
    assert second.speedup == density("causal() & local(8)") / second.density
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    for word in (
        "1,024 tokens",
        "model.layers.1.self_attn",
        "local(100)",
        f"{first.density:.1%}",
        f"{first.speedup:.1f} x",
    ):
        assert word in printed


def test_layers_without_a_pattern_chunks_and_both_sides() -> None:
    chunked, full = describe(use_pattern(llama4(64), None, block=16), 1024, console=SILENT)
    assert (chunked.pattern, chunked.speedup, full.speedup) == (None, 1, 1)
    assert chunked.density == density("causal() & fixed(64, 0)")
    assert full.density == density("causal()")
    sparse = use_pattern(made("bart"), {"encoder": "local(20)", "decoder": None}, block=16)
    sides = describe(sparse, 1024, console=SILENT)
    own, crossing = ([layer for layer in sides if layer.crosses is side] for side in (False, True))
    assert [layer.density for layer in own] == [density("local(20)")] * 2 + [density("causal()")] * (len(own) - 2)
    assert {(layer.pattern, layer.density, layer.speedup) for layer in crossing} == {(None, 1, 1)}
    (nothing, _) = describe(use_pattern(model("llama"), "full() - full()", layers=[0]), 256, console=SILENT)
    assert nothing.speedup is None


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_cross_attention_is_listed_beside_self_attention(family: str) -> None:
    text = "local(30) | global_tokens(3)"
    sparse = use_pattern(made(family), {"encoder": "local(20)", "cross": text}, block=16)
    console = Console(file=StringIO(), width=160)
    found = describe(sparse, 512, console=console)
    assert {layer.crosses for layer in found} == {False, True}
    for layer in found:
        crossing = any(word in layer.name for word in ("encoder_attn", "EncDecAttention"))
        assert layer.crosses is crossing, layer.name
        if crossing:
            assert (layer.pattern, layer.density) == (text, density(text, 512))
            assert layer.speedup == 1 / layer.density
    assert isinstance(console.file, StringIO)
    lines = [line for line in console.file.getvalue().splitlines() if text in line]
    assert len(lines) == sum(layer.crosses for layer in found)
    assert all("encoder (cross)" in line for line in lines)
    assert "itself (self)" in console.file.getvalue()
    assert "self)" not in printed_of(use_pattern(model("llama"), "local(20)")), "one column less where none crosses"


def printed_of(sparse: Any) -> str:
    console = Console(file=(file := StringIO()), width=160)
    describe(sparse, 256, console=console)
    return file.getvalue()


def test_a_model_with_another_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is 'eager'.*use_pattern"):
        describe(model("llama", "eager"))
