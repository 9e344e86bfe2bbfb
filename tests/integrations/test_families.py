"""Every text family of Transformers equals eager attention, or is refused by name.

The sweep itself is of the second tier, or ``make sweep``; the rest looks at what it wrote.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from docs import make_families
from tests.integrations.batches import transformers
from tests.integrations.families.building import NotBuiltError, build
from tests.integrations.families.ways import ALONE, CROSS, DIFFERS, EQUAL, RESULTS, compared, families, same

RECORDED: dict[str, Any] = json.loads(RESULTS.read_text())


@pytest.mark.tier2
@pytest.mark.sweep
@pytest.mark.parametrize(("family", "kind"), families())
def test_a_family_equals_eager_or_is_refused(family: str, kind: str) -> None:
    found = compared(family, kind)
    if RECORDED["transformers"] == transformers.__version__:
        assert found == RECORDED["families"][family], "python -m tests.integrations.families, if this is right"
    assert not [way for way, what in found.items() if what.startswith(DIFFERS) or way == DIFFERS]
    if "not built" in found:
        pytest.skip(found["not built"])


def test_no_result_differs_and_every_refusal_says_what_to_write() -> None:
    families_found = RECORDED["families"]
    assert len(families_found) > 200
    for family, found in families_found.items():
        for way, what in found.items():
            assert way != DIFFERS, family
            if way == "refused" or what.startswith("refused"):
                assert "attn_implementation=" in what, family
            elif way != "not built":
                assert what in (EQUAL, ALONE), family
    equal = [family for family, found in families_found.items() if found.get("plain") == EQUAL]
    assert {"llama", "gpt2", "mistral", "bert", "bart", "llama4_text"} <= set(equal)
    assert len(equal) > 100
    crossing = [family for family, found in families_found.items() if found.get(CROSS) == EQUAL]
    assert {"bart", "marian", "t5"} <= set(crossing)


def test_the_page_shows_the_results() -> None:
    text = make_families.PAGE.read_text()
    assert make_families.TABLE.search(text)
    assert make_families.page(text) == text, "run python -m docs.make_families"


def test_a_family_in_small_is_compared_anew() -> None:
    """The sweep's own parts, on one that is equal, one that is refused, and one that takes images."""
    assert set(compared("llama", "AutoModelForCausalLM").values()) == {EQUAL}
    assert "XGLMForCausalLM" in compared("xglm", "AutoModelForCausalLM")["refused"]
    assert compared("gemma3", "AutoModelForCausalLM") == {"not built": "takes images or sounds"}
    with pytest.raises(NotBuiltError):
        build("no such family", "AutoModelForCausalLM")
    tokens = build("llama", "AutoModelForCausalLM")
    logits = next(weight.detach() for weight in tokens.parameters())
    assert same(logits, logits)
    assert not same(logits * 1.01, logits), "a small difference is one"
