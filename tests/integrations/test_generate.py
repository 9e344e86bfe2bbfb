"""Generation with caches, compiled models, and the libraries around Transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparseflash.integrations.transformers import operators, use_pattern
from sparseflash.integrations.transformers.masks import describe
from tests.integrations.batches import DECODERS, VOCABULARY, cache_keyword, ids, like, model, padded, recompiles

inside_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
NEW = 12


def generated(made: Any, tokens: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    made = made if made.generation_config.eos_token_id is None else copy.deepcopy(made)
    found: Tensor = made.generate(
        tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **settings
    )
    return found


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_dense_generation_equals_eager_token_for_token(family: str, cache: str) -> None:
    made = model(family, block_sparse_pattern="causal()")
    tokens, mask = ids(3, 20), padded([7, 0, 15], [0, 0, 0], 20)
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    ours = generated(made, tokens, mask, **settings)
    assert ours.shape == (3, 20 + NEW)
    assert torch.equal(ours, generated(like(made, "eager"), tokens, mask, **settings))


def without_cache(made: Any, tokens: Tensor) -> Tensor:
    """Greedy generation that computes everything again for each token."""
    with torch.no_grad():
        for _ in range(NEW):
            tokens = torch.cat([tokens, made(tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("pattern", ["local(3)", "streaming(2, 6)", "per_head(local(2), full(), strided(3), local(5))"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_sparse_generation_equals_dense_attention_under_the_same_mask(family: str, pattern: str) -> None:
    """Cached, padded, static or dynamic: each sequence goes on as it does alone, without a cache, computed densely."""
    made = model(family, block_sparse_pattern=pattern)
    reference = like(made, "reference")
    left = [7, 0, 15]
    tokens, mask = ids(3, 20), padded(left, [0, 0, 0], 20)
    batches = [generated(made, tokens, mask, **settings) for settings in ({}, {"cache_implementation": "static"})]
    for row, before in enumerate(left):
        alone = without_cache(reference, tokens[row : row + 1, before:])[0]
        for batch in batches:
            assert torch.equal(batch[row, before:], alone)


def test_a_growing_cache_makes_one_table() -> None:
    made = model("llama", block_sparse_pattern="local(6)")
    operators._cached_room.cache_clear()
    tokens, mask = ids(3, 20), padded([7, 0, 15], [0, 0, 0], 20)
    generated(made, tokens, mask)
    generated(made, tokens, mask, cache_implementation="static")
    assert operators._cached_room.cache_info().misses == 1


def test_a_prompt_in_portions_and_candidate_tokens() -> None:
    """Several queries against a cache, more and fewer than decoding takes at once."""
    from transformers import DynamicCache

    made = model("llama", block_sparse_pattern="streaming(2, 6) | strided(5)")
    tokens = ids(2, 60)
    with torch.no_grad():
        whole = made(tokens).logits
        cache = DynamicCache(config=made.config)
        parts = [
            made(part, use_cache=True, **{cache_keyword(made): cache}).logits
            for part in tokens.split([21, 30, 5, 4], 1)
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_pattern_of_another_length_for_each_length_has_no_cache() -> None:
    made = model("llama", block_sparse_pattern="random_blocks(2, unit=8)")
    with torch.no_grad():
        made(ids())
    with pytest.raises(ValueError, match=r"random_blocks.*use_cache=False"):
        generated(made, ids())


@inside_dynamo
def test_a_compiled_model_is_one_graph_for_all_paddings() -> None:
    made = model("llama", block_sparse_pattern="local(5)", num_hidden_layers=1)
    with recompiles() as graphs:
        compiled: Any = torch.compile(made, fullgraph=True, backend="aot_eager")
        for left in ([7, 0, 15], [0, 2, 3], [0, 0, 0]):
            mask = padded(left, [0, 0, 0])
            found = []
            for either in (compiled, made):
                logits = either(ids(), attention_mask=mask, use_cache=False).logits[mask.bool()]
                logits.square().sum().backward()
                found.append([logits, *(w.grad.clone() for w in made.parameters())])
                made.zero_grad()
            torch.testing.assert_close(*found)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        for tokens in (44, 51, 60):  # a second graph is for any length
            torch.testing.assert_close(
                compiled(ids(2, tokens), use_cache=False).logits, made(ids(2, tokens), use_cache=False).logits
            )
    assert graphs[0] <= 3


@inside_dynamo
def test_inductor_takes_the_operator() -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 2, 4, 40, 8).unbind(0))

    def causal_mask_function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    mask = describe(2, 40, 40, mask_function=causal_mask_function, attention_mask=padded([3, 0], [0, 9]))
    setting: dict[str, Any] = {"pattern": "local(5)", "block": 16, "scale": 0.3}
    compiled = torch.compile(operators.model_attention, fullgraph=True)
    outs = [call(q, k, v, mask, **setting) for call in (compiled, operators.model_attention)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outs]
    torch.testing.assert_close(*grads)
    torch.library.opcheck(
        torch.ops.sparseflash.model_attention,
        (q, k, v, None, None, mask, "local(5)", 16, 0.3, None, 0.0, None),
    )


@inside_dynamo
def test_a_compiled_decoding_step_serves_all_lengths() -> None:
    made = model("llama", block_sparse_pattern="local(5)")
    want = generated(made, ids(2, 20), padded([4, 0], [0, 0], 20), cache_implementation="static")
    with recompiles() as graphs:
        # The prompt is one graph, decoding another one, whatever the length.
        made.forward = torch.compile(made.forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(generated(made, ids(2, 20), padded([4, 0], [0, 0], 20), cache_implementation="static"), want)
    assert graphs[0] <= 4


outdated_names = pytest.mark.filterwarnings("ignore::FutureWarning")  # of Transformers, used by PEFT


@outdated_names
def test_a_lora_adapter_trains() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    made = peft.get_peft_model(
        model("llama", block_sparse_pattern="local(5)"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    )
    optimizer = torch.optim.Adam([w for w in made.parameters() if w.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = made(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    moved = [w.abs().max() for n, w in made.named_parameters() if "lora_B" in n]
    assert min(moved) > 0, "every adapter got a gradient"


@outdated_names
def test_prefix_tuning_sees_its_prefix() -> None:
    """Virtual tokens stand in the cache, before the first query."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = model("llama", block_sparse_pattern="causal()")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    made = peft.get_peft_model(base, config)
    torch.nn.init.normal_(made.prompt_encoder["default"].embedding.weight)
    mask = padded([0, 0, 0], [0, 4, 9])
    with torch.no_grad():
        ours = made(ids(), attention_mask=mask).logits[mask.bool()]
        base.set_attn_implementation("eager")
        torch.testing.assert_close(ours, made(ids(), attention_mask=mask).logits[mask.bool()], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_trainer_trains(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    import transformers

    made = use_pattern(model("gpt2"), "local(6)")
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids(16, 24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=made, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    assert made.config._attn_implementation == "block_sparse"


def test_use_pattern_switches_a_model_and_leaves_it_alone_if_it_cannot() -> None:
    dense = model("vit", "eager", block_sparse_pattern=None)
    pixels = torch.rand(1, 1, 24, 24)
    with torch.no_grad():
        want = dense(pixels).logits
        torch.testing.assert_close(use_pattern(dense, "full()")(pixels).logits, want, rtol=1e-4, atol=1e-5)
        use_pattern(dense, ["global_tokens(1) | local(3)", None], block=16)
        assert not torch.allclose(dense(pixels).logits, want)
    for pattern, words in ((["full()"], "1 entries, the model 2 layers"), ("lokal(1)", "lokal")):
        with pytest.raises(ValueError, match=words):
            use_pattern(dense, pattern)
    assert dense.config.block_sparse_pattern[1] is None
    with pytest.raises(ValueError, match="block sizes are"):
        use_pattern(dense, "full()", block=100)
    assert VOCABULARY == 61
