"""The example of routed attention: its task is what it says, and it is learned."""

from __future__ import annotations

import pytest
import torch

import sparseflash as sf
from examples.needle import BLOCK, BLOCKS_READ, MASKS, Finder, Task, accuracy, main, train

SMALL = Task(facts=4, questions=2, keys=8, values=4, noise=2)


def test_every_question_has_one_answer_out_of_reach() -> None:
    task = Task()
    tokens, asked_at, answers = task.draw(50, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, task.length)
    facts = tokens[:, : task.facts * BLOCK]
    for sequence, values in zip(tokens.tolist(), answers.tolist(), strict=True):
        for at, value in zip(asked_at.tolist(), values, strict=True):
            (place,) = (i for i, token in enumerate(sequence[:at]) if token == sequence[at])
            assert sequence[place + 1] == task.noise + task.keys + value
            assert place // BLOCK == (place + 1) // BLOCK < task.facts
    assert ((facts >= task.noise).unflatten(1, (-1, BLOCK)).sum(2) == 2).all(), "one fact a block"
    assert int(tokens.max()) < task.vocabulary


def test_no_window_reaches_a_fact() -> None:
    task = Task()
    tokens, asked_at, _ = task.draw(4, torch.Generator().manual_seed(0))
    others = tokens.clone()
    others[:, : task.facts * BLOCK] = 0
    for attention in MASKS:
        torch.manual_seed(0)
        model = Finder(task, MASKS[attention])
        with torch.no_grad():
            blind = torch.equal(model(tokens, asked_at), model(others, asked_at))
        assert blind == (attention == "local")


def test_routed_attention_reads_as_many_blocks_as_the_window() -> None:
    task = Task()
    mask = sf.parse(MASKS["local"]).compile(task.length, block=BLOCK)
    assert mask.nnz == sum(min(row + 1, BLOCKS_READ) for row in range(task.length // BLOCK))
    q = torch.randn(1, 1, task.length, 8)
    rows = MASKS["routed"](q, q).rows.ranges[0]
    assert int((rows[:, 3] - rows[:, 0]).sum()) == mask.nnz


def test_routing_is_learned() -> None:
    torch.manual_seed(0)
    model = Finder(SMALL, MASKS["routed"])
    losses = list(train(model, SMALL, 200))
    assert sum(losses[-20:]) < sum(losses[:20]) / 2
    assert accuracy(SMALL, model, 256) > 0.8


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--attention", "local", "routed", "--steps", "1"])
    printed = capsys.readouterr().out
    for word in ("local", "routed", "right answers", "Guessing: 6.2%"):
        assert word in printed
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
