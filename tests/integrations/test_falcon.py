"""Falcon, with rotary positions and with ALiBi, over a pattern."""

from __future__ import annotations

import copy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from sparseflash import patterns as P
from sparseflash.integrations.transformers import describe, from_pretrained, use_pattern
from tests.integrations.batches import TOKENS, VOCABULARY, check_compiles_whole, ids, spread
from tests.integrations.families.ways import WAYS, outcome, same

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CAUSAL = "AutoModelForCausalLM"
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
SHAPES: dict[str, Any] = {
    "new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "multi-query": {"multi_query": True},
    "old": {"multi_query": False, "parallel_attn": False},
}


def made(shape: str, alibi: bool, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=alibi,
        bos_token_id=1, eos_token_id=None, pad_token_id=0, **SHAPES[shape],
    )  # fmt: skip
    return spread(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_sdpa_in_every_way(shape: str, alibi: bool) -> None:
    dense = made(shape, alibi)
    sparse = use_pattern(copy.deepcopy(dense), "full()", block=16)
    for way in WAYS[CAUSAL]:
        # With a static cache Transformers' own attentions raise beside ALiBi: compare with a dynamic one.
        reference = "dynamic cache" if alibi and way == "static cache" else way
        assert same(outcome(sparse, CAUSAL, way), outcome(dense, CAUSAL, reference)), way
    if alibi:
        with pytest.raises(ValueError, match="too many values to unpack"):
            outcome(dense, CAUSAL, "static cache")


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_pattern_is_a_mask(shape: str, alibi: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = made(shape, alibi)
    sparse = use_pattern(copy.deepcopy(dense), "streaming(3, 7)", block=16)
    got = gradients(sparse)
    seen = torch.from_numpy(np.array((P.streaming(3, 7) & P.causal()).compile(TOKENS).to_dense()))
    monkeypatch.setattr(
        sys.modules[type(dense).__module__],
        "create_causal_mask",
        lambda **kwargs: seen[None, None].expand(3, 1, -1, -1),
    )
    torch.testing.assert_close(got, gradients(dense), **CLOSE)


def gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    logits = model(ids()).logits
    return logits.detach(), list(torch.autograd.grad(logits.square().mean(), list(model.parameters())))


def test_eager_attention_adds_alibi_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why sdpa is what ours is compared with: with twice the slopes it is eager attention."""
    module: Any = sys.modules[type(made("new", True)).__module__]
    once = module.build_alibi_tensor
    eager, sdpa = (made("new", True, attention) for attention in ("eager", "sdpa"))
    with torch.no_grad():
        twice = eager(ids()).logits
        assert not torch.allclose(twice, sdpa(ids()).logits, **CLOSE)
        monkeypatch.setattr(module, "build_alibi_tensor", lambda *args, **kwargs: 2 * once(*args, **kwargs))
        torch.testing.assert_close(twice, sdpa(ids()).logits, **CLOSE)


def test_a_static_cache_filled_by_hand_and_models_switch_back() -> None:
    dense = made("new", True)
    sparse = use_pattern(copy.deepcopy(dense), "streaming(3, 7)", block=16)
    cache = transformers.StaticCache(config=sparse.config, max_cache_len=64)
    with torch.no_grad():
        want = sparse(ids()).logits
        first = sparse(ids()[:, :30], cache, use_cache=True).logits
        rest = sparse(ids()[:, 30:], cache, use_cache=True).logits
        torch.testing.assert_close(torch.cat([first, rest], 1), want, **CLOSE)
        sparse.set_attn_implementation("sdpa")
        assert torch.equal(sparse(ids()).logits, dense(ids()).logits)
        sparse.set_attn_implementation("eager")
        assert torch.equal(sparse(ids()).logits, made("new", True, "eager")(ids()).logits)


@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_it_compiles_whole_and_goes_through_a_file(alibi: bool, tmp_path: Any) -> None:
    use_pattern(made("new", alibi), "local(5)", block=16).save_pretrained(tmp_path)
    sparse = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    check_compiles_whole(sparse, **CLOSE)


def test_what_falcon_cannot_do_beside_a_pattern() -> None:
    sparse = use_pattern(made("old", True), "local(5)")
    with pytest.raises(ValueError, match=r"FalconModel with ALiBi counts positions.*give a 2-D attention_mask"):
        sparse(ids(1), attention_mask=torch.ones(1, 1, TOKENS, TOKENS).bool().tril())
    for alibi in (False, True):
        with pytest.raises(ValueError, match="does not compute the weights that output_attentions=True"):
            made("old", alibi, "block_sparse")(ids(), output_attentions=True)


def test_its_layers_are_listed_and_transformers_does_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning", told.append)
    sparse = use_pattern(made("new", True), ["local(3)", None])
    assert told == []
    found = [(layer.name, layer.pattern) for layer in describe(sparse, 64, console=Console(quiet=True))]
    assert found == [("transformer.h.0.self_attention", "local(3)"), ("transformer.h.1.self_attention", None)]
