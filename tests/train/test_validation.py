"""Evaluations while a model trains: they change nothing, survive every stop, keep the best model and may end a run."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from sparseflash.train import Progress, Score, TrainConfig, TrainResult, evaluate, held_out, train
from sparseflash.train.checkpoint import _digest, checkpoints, load_checkpoint
from sparseflash.train.validation import Validation, best_checkpoint, keep_best
from tests.train.test_training import LADDER, SMALL, quiet

CONFIG = replace(SMALL, eval_every=2, eval_examples=6, ema=0.5)


def run(out: Path, steps: int, config: TrainConfig = CONFIG, resume: bool = False, keep: int = 3) -> TrainResult:
    return train(config, out, steps=steps, resume=resume, save_every=100, keep=keep, line=quiet)


def lines(out: Path, evaluations: bool) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    return [line for line in found if ("validation_accuracy" in line) == evaluations]


def scripted(monkeypatch: pytest.MonkeyPatch, *right: int) -> None:
    """Evaluations that come out as told, of ten examples each."""
    scores = iter(right)
    monkeypatch.setattr(Validation, "score", lambda *_: Score(next(scores), 10))


def test_evaluations_change_nothing_and_are_those_of_evaluate(tmp_path: Path) -> None:
    with_ = run(tmp_path / "with", 5)
    without = run(tmp_path / "without", 5, replace(CONFIG, eval_every=0))
    assert with_.losses == without.losses
    steps = (tmp_path / "without" / "steps.jsonl").read_text().splitlines()
    assert lines(tmp_path / "with", evaluations=False) == [json.loads(line) for line in steps]
    found = lines(tmp_path / "with", evaluations=True)
    assert [line["step"] for line in found] == [2, 4]
    assert without.best is None
    at_four = run(tmp_path / "four", 4)
    score = evaluate(at_four.model, held_out(CONFIG.stages[0], 6, "val"))
    assert found[1]["validation_accuracy"] == score.accuracy
    assert found[1]["validation_examples"] == 6
    assert at_four.progress.evaluated == 4


def test_a_resumed_run_has_the_evaluations_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 9)
    for steps in (1, 2, 3, 5, 6, 9):
        part = run(tmp_path / "parts", steps, resume=steps > 1)
    assert part.progress == whole.progress
    assert (tmp_path / "parts" / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()
    assert part.best is not None
    assert whole.best is not None
    assert part.best.name == whole.best.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (part.best / name).read_bytes() == (whole.best / name).read_bytes()


def test_the_best_checkpoint_stays_and_is_read_like_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 4, 7, 7, 6, 5)
    result = run(tmp_path, 10, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000010"]
    assert result.best == best_checkpoint(tmp_path) == tmp_path / "best" / "checkpoints" / "step-00000004"
    assert (result.progress.best, result.progress.best_step, result.progress.waited) == (0.7, 4, 3)
    best = load_checkpoint(tmp_path / "best")
    assert (best.step, best.progress.best_step) == (4, 4)
    shutil.copytree(tmp_path / "best", tmp_path / "other")
    assert run(tmp_path / "other", 5, replace(CONFIG, eval_every=0), resume=True).step == 5


def test_patience_ends_a_run_and_it_stays_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, patience=2)
    scripted(monkeypatch, 5, 6, 6, 4, 9)
    result = run(tmp_path, 100, config)
    assert (result.step, result.out_of_patience, result.interrupted) == (8, True, False)
    assert result.checkpoint == checkpoints(tmp_path)[-1]
    again = run(tmp_path, 100, config, resume=True)
    assert (again.step, again.out_of_patience, again.losses) == (8, True, [])
    more = run(tmp_path, 10, replace(config, patience=3), resume=True)  # how long to wait may change
    assert (more.step, more.progress.best_step) == (10, 10)


def test_a_stage_begins_without_a_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = Progress(0, 0, 1000, 0.95).validated(0.9, 4).validated(0.8, 6)
    assert (place.best, place.waited) == (0.9, 1)
    promoted = place.promoted(LADDER, 6)
    assert (promoted.stage, promoted.evaluated, promoted.best_step, promoted.waited) == (1, 6, 0, 0)
    config = replace(LADDER, eval_every=2)
    assert not promoted.evaluation_due(config, 6)
    assert promoted.evaluation_due(config, 8)
    assert promoted.validated(0.1, 8).best_step == 8


def test_a_signal_during_an_evaluation_saves_the_step_and_a_resume_evaluates_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tmp_path / "whole", 6)
    score = Validation.score

    def interrupted(validation: Validation, *arguments: object) -> Score:
        os.kill(os.getpid(), signal.SIGINT)
        return score(validation, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Validation, "score", interrupted)
        stopped = run(tmp_path / "parts", 6)
    assert (stopped.interrupted, stopped.step, stopped.progress.evaluated) == (True, 2, 0)
    assert load_checkpoint(tmp_path / "parts").step == 2
    again = run(tmp_path / "parts", 6, resume=True)
    assert stopped.losses + again.losses == whole.losses
    assert again.progress == whole.progress
    assert (tmp_path / "parts" / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()


def test_evaluations_past_the_checkpoint_are_taken_back(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 6)
    train(CONFIG, tmp_path / "killed", steps=5, save_every=3, line=quiet)
    for path in checkpoints(tmp_path / "killed")[1:]:
        if path.name != "step-00000003":
            shutil.rmtree(path)
    assert run(tmp_path / "killed", 6, resume=True).progress == whole.progress
    assert (tmp_path / "killed" / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()


def test_checkpoints_of_before_there_were_evaluations_go_on(tmp_path: Path) -> None:
    run(tmp_path, 2, replace(CONFIG, eval_every=0))
    file = checkpoints(tmp_path)[-1] / "state.json"
    state = json.loads(file.read_text())
    for name in ("eval_every", "eval_examples", "patience"):
        del state["config"][name]
    for name in ("evaluated", "best", "best_step", "waited"):
        del state["progress"][name]
    del state["sha256"]["state.json"]
    state["sha256"]["state.json"] = _digest(state)
    file.write_text(json.dumps(state))
    assert load_checkpoint(tmp_path).progress == Progress(0, 0, 8, load_checkpoint(tmp_path).progress.accuracy)
    assert run(tmp_path, 4, resume=True).progress.evaluated == 4


def test_a_damaged_best_checkpoint_is_made_again(tmp_path: Path) -> None:
    run(tmp_path, 2)
    best = best_checkpoint(tmp_path)
    assert best is not None
    shutil.copytree(best, tmp_path / "whole")
    for name in ("model.safetensors", "state.json"):
        (best / name).unlink()  # another name of the same file
        (best / name).write_bytes(b"half")
        assert keep_best(tmp_path, checkpoints(tmp_path)[-1]) == best
        assert all((best / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "whole").iterdir())


def test_what_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 7, 6)
    told: list[str] = []
    train(CONFIG, tmp_path, steps=4, line=told.append)
    assert any("step 2: 70.0% of 10 validation examples, the best so far; running accuracy" in line for line in told)
    assert any("step 4: 60.0% of 10 validation examples, the best was 70.0% at step 2" in line for line in told)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("validation_accuracy")] == [2, 4]
    assert [event.value for event in board.Scalars("best_validation_accuracy")] == pytest.approx([0.7, 0.7])
    assert [event.value for event in board.Scalars("stage")] == [1.0] * 4


def test_recipes_that_cannot_be_evaluated_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="patience counts evaluations: give eval_every too"):
        replace(CONFIG, eval_every=0, patience=1)
    with pytest.raises(ValueError, match="eval_examples must be at least 1; got 0"):
        replace(CONFIG, eval_examples=0)
    run(tmp_path, 2)
    with pytest.raises(ValueError, match="made with another eval_examples"):
        run(tmp_path, 3, replace(CONFIG, eval_examples=7), resume=True)
    assert run(tmp_path, 3, replace(CONFIG, eval_every=3), resume=True).progress.evaluated == 3
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="already holds a run"):
        run(tmp_path, 3)
