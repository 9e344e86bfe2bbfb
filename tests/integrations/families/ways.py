"""The ways in which a model is compared with eager attention, and what came of each."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseflash.integrations.transformers import use_pattern
from tests.integrations.batches import ids, packed, padded, transformers
from tests.integrations.families.building import NotBuiltError, build

KINDS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
}
RESULTS = Path(__file__).parent / "results.json"
TOKENS = 24
NEW = 5
EQUAL, DIFFERS, ALONE = "equal", "differs", "eager cannot"
CROSS = "pattern for cross-attention"
WIDE = f"local({10 * TOKENS})"  # a pattern, of which every token of these batches sees everything
PADDING = {"left padding": padded([5, 0], [0, 0], TOKENS), "right padding": padded([0, 0], [0, 7], TOKENS)}
WAYS = {
    "AutoModelForCausalLM": ("plain", *PADDING, "packed", "gradients", "dynamic cache", "static cache"),
    "AutoModelForMaskedLM": ("plain", *PADDING, "gradients"),
    "AutoModelForSeq2SeqLM": ("plain", "right padding", "gradients", "dynamic cache", "static cache", CROSS),
}


def families() -> list[tuple[str, str]]:
    """(family, kind of model) of all that Transformers lists; each family once, as the first of these kinds."""
    found: dict[str, str] = {}
    for kind, mapping in KINDS.items():
        names = getattr(transformers.models.auto.modeling_auto, mapping + "_NAMES")
        for family in names:
            seq2seq = kind == "AutoModelForSeq2SeqLM"
            if seq2seq or family not in found:
                found[family] = kind
    return sorted(found.items())


def inputs(kind: str, way: str) -> dict[str, Any]:
    """A batch of two rows, or of one packed row."""
    given: dict[str, Any] = {"input_ids": ids(2, TOKENS)}
    if kind == "AutoModelForSeq2SeqLM":
        given |= {"attention_mask": torch.ones(2, TOKENS).long(), "decoder_input_ids": ids(2, TOKENS, seed=1)}
    if way in PADDING:
        given["attention_mask"] = PADDING[way]
    if way == "packed":
        given = {"input_ids": ids(1, TOKENS), "position_ids": packed(9, 15), "use_cache": False}
    return given


def alone(made: Any) -> Tensor:
    """Logits of a packed row's documents, each in a call of its own."""
    row = inputs("AutoModelForCausalLM", "packed")
    parts = zip(row.pop("input_ids").split((9, 15), 1), row.pop("position_ids").split((9, 15), 1), strict=True)
    return torch.cat([made(part, position_ids=at, **row).logits for part, at in parts], 1).detach()


def outcome(made: Any, kind: str, way: str) -> Any:
    """What a model answers: logits of real tokens, gradients, or tokens."""
    if way.endswith("cache"):
        settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
        settings |= {"cache_implementation": "static"} if way == "static cache" else {}
        left = padded([5, 0], [0, 0], TOKENS) if kind == "AutoModelForCausalLM" else padded([0, 0], [0, 7], TOKENS)
        return made.generate(ids(2, TOKENS), attention_mask=left, pad_token_id=0, **settings)
    given = inputs(kind, way)
    logits: Tensor = made(**given).logits
    if way == "gradients":
        cotangent = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        made.zero_grad()
        (logits * cotangent).sum().backward()
        return torch.cat([w.grad.flatten() for _, w in sorted(made.named_parameters()) if w.grad is not None]).clone()
    live = given.get("attention_mask")
    sees = kind != "AutoModelForSeq2SeqLM" and live is not None
    return (logits[live.bool()] if sees and live is not None else logits).detach()


def same(got: Tensor, want: Tensor) -> bool:
    """Tokens are equal, numbers close: a sum of terms in another order, through two layers of random weights."""
    if not want.is_floating_point():
        return torch.equal(got, want)
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-3 * want.abs().max())


def attempt(call: Callable[[], Any]) -> Any:
    """What a call gives, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def crossed(eager: Any, kind: str) -> dict[str, str]:
    """What came of a pattern for cross-attention: in padded batches, and with a cache."""
    sparse = attempt(lambda: use_pattern(copy.deepcopy(eager), {"cross": WIDE}, block=16))
    if isinstance(sparse, ValueError):
        return {CROSS: f"refused: {sparse}"}
    found = ALONE
    for way in ("right padding", "dynamic cache"):
        want = attempt(partial(outcome, eager, kind, way))
        if isinstance(want, Exception):
            continue
        got = attempt(partial(outcome, sparse, kind, way))
        if isinstance(got, ValueError | NotImplementedError):
            return {CROSS: f"refused: {got}"}
        if isinstance(got, Exception) or not same(got, want):
            return {CROSS: DIFFERS}
        found = EQUAL
    return {CROSS: found}


def compared(family: str, kind: str) -> dict[str, str]:
    """What came of each way, by its name; or one entry: why the family is ``refused``, or ``not built``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eager = attempt(lambda: build(family, kind))
        if isinstance(eager, NotBuiltError):
            return {"not built": str(eager)[:120]}
        if isinstance(eager, Exception):
            return {"not built": f"{type(eager).__name__}: {eager}"[:120]}
        if getattr(eager, "generation_config", None) is not None:
            eager.generation_config.eos_token_id = None
        sparse = attempt(lambda: use_pattern(copy.deepcopy(eager), "full()", block=16))
        if isinstance(sparse, ValueError):
            return {"refused": str(sparse)}
        if isinstance(sparse, Exception):
            return {"differs": f"{type(sparse).__name__}: {sparse}"}
        found: dict[str, str] = {}
        for way in WAYS[kind]:
            if way == CROSS:
                found |= crossed(eager, kind)
                continue
            want = attempt(partial(outcome, eager, kind, way))
            if isinstance(want, Exception) or not bool(torch.isfinite(want).all()):
                found[way] = ALONE
                continue
            got = attempt(partial(outcome, sparse, kind, way))
            if isinstance(got, Exception):
                refused = isinstance(got, ValueError | NotImplementedError)
                found[way] = f"refused: {got}" if refused else f"differs: {type(got).__name__}: {got}"[:200]
            else:
                found[way] = EQUAL if same(got, want) else DIFFERS
                if way == "packed" and found[way] == DIFFERS:
                    # Eager attention may not keep documents apart: in encoders, beside layers that are recurrent.
                    documents = alone(eager)
                    found[way] = EQUAL if same(got, documents) else DIFFERS if same(want, documents) else ALONE
    return {"not built": "eager cannot be called alone"} if set(found.values()) == {ALONE} else found
