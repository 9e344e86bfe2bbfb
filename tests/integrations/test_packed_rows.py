"""Packed rows as FlashAttention users write them, and parts of sequences that look like whole ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparseflash.integrations.transformers.masks import describe, read
from sparseflash.integrations.transformers.placing import placed
from tests.integrations.batches import NO_TOKENS, SIZES, cache_keyword, ids, like, model, packed, recompiles

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
LENGTHS = (15, 25)
ENDS = torch.tensor([0, 15, 40], dtype=torch.int32)
FLATTENED: dict[str, Any] = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 25, "max_length_k": 25}
SPELLINGS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": packed(*LENGTHS)},
    "positions, no cache": {"position_ids": packed(*LENGTHS), "use_cache": False},
    "positions and lengths": {"position_ids": packed(*LENGTHS), **FLATTENED},
    "positions and a mask of ones": {"position_ids": packed(*LENGTHS), "attention_mask": torch.ones(1, 40).long()},
    "positions for all samples": {"position_ids": packed(*LENGTHS).expand(3, -1)},
}


def made(family: str) -> Any:
    """Models whose masks and attention get positions, whose attention gets none, and whose masks get none."""
    if family == "gpt_oss":
        small = SIZES | {"head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 48}
        config = transformers.GptOssConfig(
            **small, num_local_experts=4, num_experts_per_tok=4, layer_types=["full_attention", "sliding_attention"],
            sliding_window=9, **NO_TOKENS,
        )  # fmt: skip
    elif family == "persimmon":
        config = transformers.PersimmonConfig(**SIZES, intermediate_size=48, **NO_TOKENS)
    else:
        return model(family)
    torch.manual_seed(0)
    found = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="block_sparse").eval()
    for weight in found.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return found


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", ["llama", "qwen", "gpt2", "persimmon", "gpt_oss"])
def test_every_document_equals_eager_alone(family: str, spelling: str) -> None:
    sparse = made(family)
    eager, given = like(sparse, "eager"), SPELLINGS[spelling]
    tokens = ids(given["position_ids"].shape[0])
    with torch.no_grad():
        alone = torch.cat([eager(part).logits for part in tokens.split(LENGTHS, 1)], 1)
        torch.testing.assert_close(sparse(tokens, **given).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_lengths_alone_keep_documents_apart_and_leave_positions(family: str) -> None:
    """In training mode, with gradients: position_ids go on over the row, as FlashAttention leaves them."""
    sparse = made(family)
    eager, tokens, positions = like(sparse, "eager"), ids(1), torch.arange(40)[None]
    together = sparse.train()(tokens, **FLATTENED, use_cache=False).logits
    parts = zip(tokens.split(LENGTHS, 1), positions.split(LENGTHS, 1), strict=True)
    alone = torch.cat([eager(part, position_ids=at).logits for part, at in parts], 1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    for logits in (together, alone):
        logits.square().mean().backward()
    for got, want in zip(sparse.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_a_compiled_model_takes_other_documents_without_compiling_anew() -> None:
    sparse = model("llama", block_sparse_pattern="streaming(1, 6)", num_hidden_layers=1)
    with recompiles() as graphs, torch.no_grad():
        compiled: Any = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        for lengths in ((15, 25), (1, 39), (13, 13, 14)):
            given = {"position_ids": packed(*lengths), "attention_mask": torch.ones(1, 40).long(), "use_cache": False}
            alone = torch.cat([sparse(part).logits for part in ids(1).split(lengths, 1)], 1)
            torch.testing.assert_close(compiled(ids(1), **given).logits, alone, rtol=1e-4, atol=1e-4)
    assert graphs[0] == 1


def test_padding_in_a_batch_is_not_taken_for_documents() -> None:
    """generate() gives positions of padded samples, where padding has any: here 1."""
    sparse = model("llama")
    mask = torch.ones(2, 40).long()
    mask[0, :9] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        got, want = (
            m(ids(2), attention_mask=mask, position_ids=positions).logits for m in (sparse, like(sparse, "eager"))
        )
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def positions(*stretches: range) -> dict[str, Tensor]:
    return {"position_ids": torch.tensor([[at for stretch in stretches for at in stretch]])}


PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "the second half": (positions(range(40, 80)), "context_parallel_attention"),
    "head and tail": (positions(range(20), range(60, 80)), "jump to another position"),
    "the middle of a packed row": (positions(range(7, 27), range(20)), "beyond 0"),
    "lengths of more tokens": (FLATTENED | {"cu_seq_lens_q": ENDS + 1, "cu_seq_lens_k": ENDS + 1}, "cu_seq_lens_q"),
    "other lengths of keys": (FLATTENED | {"cu_seq_lens_k": torch.tensor([0, 14, 40])}, "cu_seq_lens_k must be equal"),
    "another number of keys": (FLATTENED | {"cu_seq_lens_k": torch.tensor([0, 40])}, "cu_seq_lens_k must be equal"),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_part_of_a_sequence_is_refused(family: str, case: str) -> None:
    given, words = PARTS[case]
    with pytest.raises(ValueError, match=words):
        model(family)(ids(1), use_cache=False, **given)


def test_documents_behind_a_cache_are_refused() -> None:
    sparse = model("llama")
    cache = {cache_keyword(sparse): transformers.DynamicCache(config=sparse.config)}
    with torch.no_grad():
        sparse(ids(1, 20), use_cache=True, **cache)
        for again in (positions(range(20, 25), range(15)), FLATTENED):
            with pytest.raises(ValueError, match="empty cache"):
                sparse(ids(1, 20 if "position_ids" in again else 40), **cache, **again)


def causal(tokens: int, batch: int = 1) -> Tensor:
    return describe(batch, tokens, tokens, mask_function=lambda b, h, q, k: k <= q)


def test_lengths_run_over_all_rows_but_no_document_does() -> None:
    told = read(placed(causal(6, 2), 2, 6, None, torch.tensor([0, 2, 6, 6, 12])), 6, 6)
    assert told.samples == (((0, 2, 0), (2, 6, 2)), ((0, 6, 0),))
    with pytest.raises(ValueError, match="from one row into the next"):
        read(placed(causal(6, 2), 2, 6, None, torch.tensor([0, 5, 12])), 6, 6)


def test_positions_changed_in_place_are_read_again() -> None:
    mask, positions = causal(6), packed(2, 4)
    assert read(placed(mask, 1, 6, positions), 6, 6).samples == (((0, 2, 0), (2, 6, 2)),)
    assert placed(mask, 1, 6, positions) is placed(mask, 1, 6, positions), "once for all layers"
    positions.copy_(packed(3, 3))
    assert read(placed(mask, 1, 6, positions), 6, 6).samples == (((0, 3, 0), (3, 6, 3)),)


@pytest.mark.parametrize("positions", [torch.zeros(3, 1, 6).long(), torch.zeros(1, 6), torch.zeros(1, 5).long(), None])
def test_other_positions_say_nothing(positions: Tensor | None) -> None:
    """Axes of images, numbers that are not counts, those of other tokens."""
    mask = causal(6)
    assert placed(mask, 1, 6, positions) is mask


def test_models_that_count_from_one_or_two_are_whole() -> None:
    for first in (0, 1, 2):
        assert read(placed(causal(6), 1, 6, torch.arange(6)[None] + first), 6, 6).samples == (((0, 6, 0),),)
        again = torch.cat([torch.arange(2), torch.arange(4)])[None] + first
        assert read(placed(causal(6), 1, 6, again), 6, 6).samples == (((0, 2, 0), (2, 6, 2)),)
