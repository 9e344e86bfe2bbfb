"""Inside of torch's own context_parallel, and on plain shards, nothing of ours takes a part for the whole."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import sparseflash as sf
from sparseflash.functional import operands
from tests.distributed import foreign
from tests.distributed.ranks import Ranks


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks(2)
    yield processes
    processes.close()


@pytest.mark.parametrize("name", foreign.CALLS)
def test_every_call_is_refused_with_the_line_to_write(ranks: Ranks, name: str) -> None:
    for shard, said in ranks.run(foreign.inside, name):
        assert shard == foreign.TOKENS // 2, "the context has cut the tensor"
        assert "inside of torch's context_parallel" in said
        assert "context_parallel_attention(q, k, v, mask, mesh)" in said


def test_a_model_inside_the_context_is_refused(ranks: Ranks) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for said in ranks.run(foreign.model_inside):
        assert "context_parallel_attention" in said


@pytest.mark.parametrize("head_and_tail", [False, True])
def test_a_model_on_a_plain_shard_is_refused(ranks: Ranks, head_and_tail: bool) -> None:
    """Rank 0 of contiguous shards holds a whole sequence as far as it can tell, and is right about its tokens."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    first, second = ranks.run(foreign.model_on_a_shard, head_and_tail)
    assert "context_parallel_attention" in second
    assert ("context_parallel_attention" in first) == head_and_tail


def test_other_replacements_of_torchs_attention_are_no_business_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(*args: object, **kwargs: object) -> None: ...

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", faster)
    x = torch.randn(1, 1, 8, 8)
    sf.attention(x, x, x, "causal()")
    monkeypatch.setattr(faster, "__module__", "torch.distributed.tensor.experimental._attention")
    with pytest.raises(ValueError, match="context_parallel"):
        operands.check_whole()
