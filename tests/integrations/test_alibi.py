"""Bloom and MPT, whose layers compute attention with ALiBi themselves, over a pattern."""

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
from tests.integrations.batches import TOKENS, VOCABULARY, check_compiles_whole, ids, padded, spread

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
CONFIGS: dict[str, Any] = {
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0
    ),
    "mpt": lambda: transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
}


def made(family: str, attention: str = "eager") -> Any:
    torch.manual_seed(0)
    return spread(
        transformers.AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention).eval()
    )


def gradients(model: Any, **given: Any) -> tuple[Tensor, list[Tensor]]:
    logits = model(**given).logits
    return logits.detach(), list(torch.autograd.grad(logits.square().mean(), list(model.parameters())))


@pytest.mark.parametrize("family", CONFIGS)
def test_a_pattern_is_a_mask_beside_alibi(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = made(family)
    sparse = use_pattern(copy.deepcopy(eager), "streaming(3, 7)", block=16)
    got = gradients(sparse, input_ids=ids())
    seen = torch.from_numpy(np.array((P.streaming(3, 7) & P.causal()).compile(TOKENS).to_dense()))
    mask = torch.zeros(TOKENS, TOKENS).masked_fill(~seen, torch.finfo(torch.float32).min)
    monkeypatch.setattr(sys.modules[type(eager).__module__], "create_causal_mask", lambda **kwargs: mask[None, None])
    torch.testing.assert_close(got, gradients(eager, input_ids=ids()), **CLOSE)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_padded_sequence_is_what_it_is_alone_and_models_switch_back(family: str) -> None:
    eager = made(family)
    sparse = use_pattern(copy.deepcopy(eager), ["streaming(3, 7)", None], block=16)
    with torch.no_grad():
        rows = sparse(ids(), attention_mask=padded([7, 0, 0], [0, 0, 9])).logits
        torch.testing.assert_close(rows[0, 7:], sparse(ids()[:1, 7:]).logits[0], **CLOSE)
        torch.testing.assert_close(rows[2, :-9], sparse(ids()[2:, :-9]).logits[0], **CLOSE)
        assert not torch.allclose(rows[1], eager(ids()).logits[1], **CLOSE)
        sparse.set_attn_implementation("eager")
        assert torch.equal(sparse(ids()).logits, eager(ids()).logits)
    assert [layer.pattern for layer in describe(use_pattern(sparse, "local(3)"), 64, console=Console(quiet=True))] == [
        "local(3)", "local(3)"
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler, of Bloom's GELU
@pytest.mark.parametrize("family", CONFIGS)
def test_it_compiles_whole_and_goes_through_a_file(family: str, tmp_path: Any) -> None:
    use_pattern(made(family), "local(5)", block=16).save_pretrained(tmp_path)
    sparse = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    check_compiles_whole(sparse, **CLOSE)


def test_what_bloom_cannot_do_beside_a_pattern() -> None:
    config = CONFIGS["bloom"]()
    config.pretraining_tp, config.slow_but_exact = 2, True
    sparse = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="block_sparse")
    with pytest.raises(ValueError, match="BloomAttention with slow_but_exact sums its output in 2 parts"):
        sparse(ids())
    with pytest.raises(ValueError, match="does not compute the weights that output_attentions=True"):
        made("bloom", "block_sparse")(ids(), output_attentions=True)


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_does_not_warn_that_it_cannot(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning", told.append)
    sparse = use_pattern(made(family), "local(3)")
    sparse.set_attn_implementation("eager")
    assert told == [], "nor of MPT's attn_config, that it is no model's"
    parts = [getattr(sparse.config, part)._attn_implementation for part in sparse.config.sub_configs]
    assert set(parts) <= {"eager"}, "and it is told"
