"""A pattern that is set on one model changes no other one that was made from the same config object."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sparseflash.integrations.transformers import use_pattern
from tests.integrations.batches import FAMILIES, ids, spread
from tests.integrations.test_alibi import CONFIGS
from tests.integrations.test_encoder_decoder import made as encoder_decoder
from tests.integrations.test_watching import gemma3

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def pattern(config: Any) -> Any:
    return getattr(config, "block_sparse_pattern", None)


def of(config: Any) -> Any:
    torch.manual_seed(0)
    return spread(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "mpt"])
def test_models_of_one_config_have_patterns_of_their_own(family: str) -> None:
    config = (FAMILIES | CONFIGS)[family]()
    first, second, third = of(config), of(config), of(config)
    copied = copy.deepcopy(first)
    assert first.config is second.config, "or this says nothing"
    with torch.no_grad():
        dense = second(ids()).logits
        use_pattern(first, "local(2)", block=16)
        use_pattern(third, "local(5)", block=16)
        assert [pattern(one.config) for one in (first, second, third, copied)] == ["local(2)", None, "local(5)", None]
        assert pattern(config) is None
        assert config._attn_implementation == "eager"
        narrow, wide = first(ids()).logits, third(ids()).logits
        assert torch.equal(second(ids()).logits, dense)
        assert torch.equal(copied(ids()).logits, dense)
        assert not torch.allclose(narrow, dense, atol=1e-3)
        assert not torch.allclose(narrow, wide, atol=1e-3)
        alone = use_pattern(of((FAMILIES | CONFIGS)[family]()), "local(2)", block=16)
        assert torch.equal(narrow, alone(ids()).logits)
        assert torch.equal(use_pattern(copy.deepcopy(third), "local(2)", block=16)(ids()).logits, narrow)
        assert torch.equal(third(ids()).logits, wide)


def test_all_parts_of_a_model_and_those_around_it_go_on_sharing(tmp_path: Any) -> None:
    whole = of(FAMILIES["llama"]())
    use_pattern(whole.model, "local(2)", block=16)
    assert all(part.config is whole.config for part in whole.modules() if hasattr(part, "config"))
    whole.save_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).block_sparse_pattern == "local(2)"
    both = transformers.Gemma3ForConditionalGeneration._from_config(gemma3(), attn_implementation="eager")
    use_pattern(both.model.vision_tower, "local(3)", block=16)
    assert both.config.vision_config is both.model.vision_tower.config
    assert (pattern(both.config.vision_config), pattern(both.config.text_config)) == ("local(3)", None)
    assert both.config.text_config._attn_implementation == "eager"


def test_stacks_with_configs_of_their_own_are_apart_too() -> None:
    first = encoder_decoder("t5")
    copied = copy.deepcopy(first)
    use_pattern(first, "local(2)", block=16)
    assert pattern(first.encoder.config) == pattern(first.decoder.config) == pattern(first.config) == "local(2)"
    assert {pattern(part.config) for part in copied.modules() if hasattr(part, "config")} == {None}


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_refused_pattern_leaves_all_configs_as_they_were(family: str) -> None:
    config = (FAMILIES | CONFIGS)[family]()
    made = of(config)
    with torch.no_grad():
        dense = made(ids()).logits
        with pytest.raises(ValueError, match="3 entries"):
            use_pattern(made, ["local(2)"] * 3)
        assert made.config is config
        assert {part.config is config for part in made.modules() if hasattr(part, "config")} == {True}
        assert (config._attn_implementation, pattern(config)) == ("eager", None)
        assert torch.equal(made(ids()).logits, dense)
