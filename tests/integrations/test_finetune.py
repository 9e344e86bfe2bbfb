"""Fine-tuning dense models into sparse ones."""

from __future__ import annotations

import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sparseflash.integrations.transformers import compare, perplexity, train
from tests.integrations.batches import ids, model, padded

FAR = 4


def copies(batches: int, seed: int = 0) -> list[Tensor]:
    """Every token repeats the one FAR places before it: only a model that sees so far can predict it."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(1, 11, (batches, 16, FAR), generator=generator)
    return list(first.repeat(1, 1, 6))


def test_perplexity_is_that_of_the_loss_and_padding_does_not_count() -> None:
    made, batch, mask = model("gpt2"), ids(), padded([5, 0, 0], [0, 11, 0])
    loss = float(made(batch, labels=batch, use_cache=False).loss.detach())
    assert perplexity(made, [batch]) == pytest.approx(math.exp(loss), rel=1e-5)
    labels = batch.masked_fill(mask == 0, -100)
    labels[0, 5] = -100  # the first token follows padding
    loss = float(made(batch, attention_mask=mask, labels=labels, use_cache=False).loss.detach())
    assert perplexity(made, [{"input_ids": batch, "attention_mask": mask}]) == pytest.approx(math.exp(loss), rel=1e-5)
    with pytest.raises(ValueError, match="nothing to measure"):
        perplexity(made, [batch[:, :1]])


def test_patterns_that_see_far_enough_keep_what_a_dense_model_learned() -> None:
    off: dict[str, Any] = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    dense = model("gpt2", n_layer=1, vocab_size=11, **off)
    dense.apply(dense._init_weights)
    losses = train(dense, copies(60), steps=90, lr=1e-2)
    assert losses[-1] < losses[0] / 2
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    console = Console(file=StringIO(), width=100)
    rows = compare(dense, ["full()", "local(4)", "local(1)"], copies(60), copies(2, seed=1), steps=10, console=console)
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())
    full, far, near = rows
    measured = perplexity(dense, copies(2, seed=1))
    assert full.switched == pytest.approx(measured, rel=1e-4)
    assert far.trained < 0.7 * near.trained
    assert near.switched > 1.5 * measured
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    for word in (
        "local(4)",
        f"{far.trained:.2f}",
        "blocks read",
        "after 10 steps",
        f"the dense model has {measured:.2f}",
    ):
        assert word in printed


def test_bad_input_is_refused() -> None:
    made = model("gpt2")
    with pytest.raises(ValueError, match="no patterns"):
        compare(made, [], [ids()], [ids()])
    with pytest.raises(ValueError, match="lokal"):
        compare(made, ["lokal(2)"], [ids()], [ids()])
    with pytest.raises(ValueError, match="no batches"):
        train(made, [], steps=1)
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        train(made, [ids()], steps=-1)


def test_the_example_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.sparsify import main

    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 8)
    arguments = ["--tokens", "32", "--batch", "2", "--dense-steps", "1", "--steps", "1", "--text", str(text)]
    main([*arguments, "--patterns", "local(4)"])
    printed = capsys.readouterr().out
    assert "local(4)" in printed
    assert "after 1 steps" in printed
    with pytest.raises(SystemExit):
        main([*arguments, "--tokens", "1000"])
    assert "are too few for batches" in capsys.readouterr().err
