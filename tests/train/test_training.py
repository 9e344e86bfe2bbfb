"""Training: resumed runs, interruptions, checkpoints, learning."""

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.models.pixel_transformer import PixelOutput
from sparseflash.train import Progress, Score, Stage, TrainConfig, TrainResult, evaluate, held_out, recipe, train
from sparseflash.train import run as running
from sparseflash.train.batch import Batch
from sparseflash.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from sparseflash.train.data import DataShard
from sparseflash.train.interrupt import Interrupt

EASY = recipe("demo").pixel_stages[0].geometry
SMALL = TrainConfig(
    task="demo",
    model=PixelTransformerConfig(
        pattern="local(64)", block=(64, 64), width=16, heads=1, layers=1, mlp_width=16, dense_classes=3
    ),
    stages=(Stage(EASY, baseline=0.5),),
    schedule_steps=40,
    batch=4,
    lr=1e-2,
    warmup=2,
    dense_weight=1.0,
)


def quiet(text: str) -> None:
    pass


def run(out: Path, steps: int, config: TrainConfig = SMALL, resume: bool = False, save_every: int = 100) -> TrainResult:
    return train(config, out, steps=steps, resume=resume, save_every=save_every, line=quiet)


def weights(result: TrainResult) -> dict[str, torch.Tensor]:
    return dict(result.model.state_dict())


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = replace(SMALL, accumulate=2, batch=2)
    whole = run(tmp_path / "whole", 6, config)
    first = run(tmp_path / "parts", 2, config)
    second = run(tmp_path / "parts", 3, config, resume=True)
    third = run(tmp_path / "parts", 6, config, resume=True)
    assert first.losses + second.losses + third.losses == whole.losses
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(third).items())
    logs = [(tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert [json.loads(line)["loss"] for line in logs[0].splitlines()] == whole.losses


LADDER = replace(
    SMALL,
    stages=(Stage(EASY, baseline=0.5), Stage(replace(EASY, num_distractors=1), baseline=0.5)),
    model=replace(
        SMALL.pixel_model,
        pattern="neighborhood({shape}, 1)",
        unit="tile",
        order="tile",
        tile=(4, 4),
        tokens="lit_tiles",
    ),
    schedule_steps=2,
    batch=2,
    accumulate=2,
    ema=0.9,
    augment=True,
    data="fixed",
    promote_at=0.6,
)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A running accuracy over so few images that guessing is promoted within steps."""
    monkeypatch.setattr("sparseflash.train.curriculum.IMAGES", 4)


@pytest.mark.usefixtures("hasty")
def test_a_curriculum_with_averaged_weights_resumes_bit_for_bit_across_a_promotion(tmp_path: Path) -> None:
    lines: list[str] = []
    whole = train(LADDER, tmp_path / "whole", steps=40, save_every=100, line=lines.append)
    assert whole.progress.stage == 1
    assert 0 < whole.progress.since < 40
    assert "stage 1 of 2: 24 px, 2 dashes; the distance between the discs alone gives 50.0%" in lines[0]
    assert any("stage 2 of 2" in line for line in lines)
    since = whole.progress.since
    losses: list[float] = []
    for steps in (1, since - 1, since, since + 1, 40):
        part = run(tmp_path / "parts", steps, LADDER, resume=steps > 1)
        losses += part.losses
    assert losses == whole.losses
    assert part.progress == whole.progress
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(part).items())
    logs = [(tmp_path / name / "steps.jsonl").read_text() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    # What people load is the average, what training goes on from is not.
    found = load_checkpoint(tmp_path / "whole")
    assert torch.equal(found.weights["norm.weight"], whole.model.norm.weight)
    assert not torch.equal(found.weights["norm.weight"], found.optimizer["weights/norm.weight"])


@pytest.mark.usefixtures("hasty")
def test_without_steps_training_ends_with_the_schedule_of_the_last_stage(tmp_path: Path) -> None:
    result = train(LADDER, tmp_path, line=quiet)
    assert result.step == result.progress.since + LADDER.schedule_steps
    rates = [json.loads(line)["lr"] for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert rates[-1] == pytest.approx(LADDER.lr * (LADDER.final_lr + (1 - LADDER.final_lr) / 2))
    assert rates[LADDER.warmup : -1] == [LADDER.lr] * (len(rates) - LADDER.warmup - 1)


def test_a_time_budget_saves_and_the_run_goes_on(tmp_path: Path) -> None:
    stopped = train(SMALL, tmp_path / "parts", minutes=1e-9, line=quiet)
    assert stopped.out_of_time
    assert not stopped.interrupted
    assert stopped.step == 1
    resumed = run(tmp_path / "parts", 3, resume=True)
    assert not resumed.out_of_time
    assert stopped.losses + resumed.losses == run(tmp_path / "whole", 3).losses


def test_a_run_may_begin_with_the_weights_of_another_and_at_a_later_stage(tmp_path: Path) -> None:
    first = run(tmp_path / "first", 2, replace(LADDER, ema=0.0))
    config = replace(LADDER, ema=0.0, init=str(tmp_path / "first"), first_stage=1, lr=1e-12, weight_decay=0.0)
    config = replace(config, model=replace(config.pixel_model, tokens="all"))
    second = run(tmp_path / "second", 1, config)
    assert second.progress.stage == 1
    for name, value in weights(second).items():
        torch.testing.assert_close(value, weights(first)[name])
    shutil.rmtree(tmp_path / "first")
    assert run(tmp_path / "second", 2, config, resume=True).step == 2
    for model, words in ((config.model, "no folder"), (replace(config.model, mlp_width=32), "another shape")):
        if words == "another shape":
            run(tmp_path / "first", 1, replace(LADDER, ema=0.0))
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            run(tmp_path / "third", 1, replace(config, model=model))
        assert not (tmp_path / "third").exists()
    with pytest.raises(ValueError, match="first_stage must be one of the 2 stages, from 0; got 2"):
        replace(LADDER, first_stage=2)


def test_progress_counts_images_of_its_stage_alone() -> None:
    config = replace(LADDER, promote_at=0.9)
    assert Progress(0, 0, 999, 0.99).promoted(config, 7).stage == 0
    assert Progress(0, 0, 1000, 0.89).promoted(config, 7).stage == 0
    assert Progress(0, 0, 1000, 0.91).promoted(config, 7) == Progress(1, since=7)
    assert Progress(1, 0, 1000, 0.91).promoted(config, 7) == Progress(1, 0, 1000, 0.91)
    found = Progress()
    for _ in range(100):
        found = found.after(0.9, 50)
    assert found.images == 5000
    assert found.accuracy == pytest.approx(0.9, abs=0.01)


def test_pictures_are_drawn(tmp_path: Path) -> None:
    train(replace(LADDER, stages=LADDER.stages[:1]), tmp_path, steps=1, pictures=True, line=quiet)
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["step-00000001-attention.png", "step-00000001-mistakes.png"]
    for name in names:
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")


def test_a_run_killed_between_checkpoints_repeats_the_lost_steps(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 5)
    run(tmp_path / "killed", 5, save_every=2)
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "step-00000005")
    log = tmp_path / "killed" / "steps.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "lo')  # a line half written
    again = run(tmp_path / "killed", 5, resume=True)
    assert again.losses == whole.losses[4:]
    assert log.read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()


def test_the_schedule_warms_up_and_falls_whatever_the_number_of_steps() -> None:
    config = replace(SMALL, warmup=10, schedule_steps=100)
    rates = [config.learning_rate(step) for step in range(120)]
    assert rates[0] == pytest.approx(config.lr / 11)
    assert max(rates) == rates[10] == pytest.approx(config.lr, rel=0.03)
    assert rates[10:101] == sorted(rates[10:101], reverse=True)
    assert rates[-1] == pytest.approx(config.final_lr * config.lr)


def test_the_loss_falls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bright_or_dim(stage: Stage, seed: int, indices: np.ndarray, dense: bool, symmetries: None) -> Batch:
        rng = torch.Generator().manual_seed(int(indices[0]))
        labels = torch.randint(0, 2, (len(indices),), generator=rng)
        lit = torch.rand(len(indices), 16, 16, generator=rng) < 0.1
        return Batch(torch.where(lit, 100 + 100 * labels[:, None, None], 0).to(torch.uint8), labels, None)

    monkeypatch.setattr("sparseflash.train.data.draw", bright_or_dim)
    config = replace(SMALL, model=replace(SMALL.pixel_model, dense_classes=0), dense_weight=0.0)
    losses = run(tmp_path, 40, config).losses
    assert losses[0] > 0.3
    assert max(losses[-5:]) < 0.1


def _after_steps(out: Path, steps: int, action: Callable[[], None]) -> threading.Thread:
    """Call something as soon as so many steps are logged."""

    def wait() -> None:
        for _ in range(3000):
            log = out / "steps.jsonl"
            if log.exists() and len(log.read_text().splitlines()) >= steps:
                action()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_as_if_it_had_not_come(tmp_path: Path, number: signal.Signals) -> None:
    thread = _after_steps(tmp_path / "stopped", 2, lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    stopped = run(tmp_path / "stopped", 10_000)
    thread.join()
    assert stopped.interrupted
    assert stopped.step == len(stopped.losses) >= 2
    assert stopped.checkpoint is not None
    assert load_checkpoint(stopped.checkpoint).step == stopped.step
    assert signal.getsignal(number) is before
    steps = stopped.step + 2
    resumed = run(tmp_path / "stopped", steps, resume=True)
    assert stopped.losses + resumed.losses == run(tmp_path / "whole", steps).losses


def test_a_signal_is_noted_where_its_exception_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C code that asks whether an attribute is there clears whatever exception was raised meanwhile."""
    make = running.adamw

    def clears(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        return make(model, config)

    monkeypatch.setattr(running, "adamw", clears)
    stopped = run(tmp_path, 3)
    assert (stopped.interrupted, stopped.step) == (True, 1)
    assert load_checkpoint(tmp_path).step == 1


def test_a_signal_whose_exception_became_another_saves_and_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen with numpy: Ctrl-C inside a comparison of records came out as a TypeError, and training ended as failed."""
    take = DataShard.take

    def becomes_another(stream: DataShard, turn: int, stage: int) -> Batch:
        if turn == 2:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            raise TypeError("cannot compare")
        return take(stream, turn, stage)

    monkeypatch.setattr(DataShard, "take", becomes_another)
    stopped = run(tmp_path, 9)
    assert (stopped.interrupted, stopped.step) == (True, 2)
    assert load_checkpoint(tmp_path).step == 2


def test_shields_hold_signals_back() -> None:
    reached: list[str] = []

    def guarded(interrupt: Interrupt) -> None:
        with interrupt.shield():
            with interrupt.shield():
                os.kill(os.getpid(), signal.SIGINT)
            reached.append("end of the shield")
        reached.append("beyond it")

    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt):
            guarded(interrupt)
        assert interrupt.asked
    assert reached == ["end of the shield"]
    with Interrupt(at_once=False) as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    run(out, 3, save_every=1)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-20] if how == "truncated" else data.replace(b"3", b"4", 1) + b" ")


FILES = ["model.safetensors", "config.json", "optimizer.safetensors", "state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_damaged_checkpoints_are_refused(copied: Path, name: str, how: str) -> None:
    for path in checkpoints(copied):
        damage(path / name, how)
    kept = {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()}
    with pytest.raises((ValueError, FileNotFoundError), match=name.replace(".", r"\.")):
        load_checkpoint(copied)
    with pytest.raises(ValueError, match="no checkpoint that is whole: .*" + name.replace(".", r"\.")):
        run(copied, 4, resume=True)
    assert {file: file.read_bytes() for file in copied.rglob("*") if file.is_file()} == kept


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_a_damaged_latest_checkpoint_is_passed_over_and_made_again(
    copied: Path, tmp_path: Path, name: str, how: str
) -> None:
    latest = checkpoints(copied)[-1]
    whole = {path.name: path.read_bytes() for path in latest.iterdir()}
    damage(latest / name, how)
    with pytest.warns(UserWarning, match=name.replace(".", r"\.") + ".*going on from step-00000002"):
        again = run(copied, 3, resume=True)
    assert again.checkpoint == latest
    assert {path.name: path.read_bytes() for path in latest.iterdir()} == whole
    assert run(copied, 4, resume=True).losses == run(tmp_path / "whole", 4).losses[3:]


def test_a_damaged_checkpoint_counts_for_nothing_when_old_ones_are_removed(tmp_path: Path) -> None:
    train(SMALL, tmp_path, steps=4, save_every=2, keep=2, line=quiet)
    damage(checkpoints(tmp_path)[-1] / "state.json", "truncated")
    with pytest.warns(UserWarning, match="going on from step-00000002"):
        train(SMALL, tmp_path, steps=3, resume=True, keep=1, line=quiet)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    with pytest.warns(UserWarning, match="going on from step-00000003"):
        train(SMALL, tmp_path, steps=5, resume=True, keep=1, line=quiet)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005"]


def test_foreign_checkpoints_are_refused(copied: Path, tmp_path: Path) -> None:
    state = checkpoints(copied)[-1] / "state.json"
    for text in ("", "[]", '{"format": "other"}', "\x00\x01"):
        state.write_text(text)
        with pytest.raises(ValueError, match="foreign or damaged"):
            load_checkpoint(copied)
    state.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match="foreign or damaged"):
        load_checkpoint(copied)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a run"):
        run(tmp_path / "empty", 4, resume=True)
    with pytest.raises(FileNotFoundError, match="no folder"):
        run(tmp_path / "nowhere", 4, resume=True)


def test_only_the_newest_checkpoints_stay_and_nothing_temporary(finished: Path) -> None:
    assert [path.name for path in checkpoints(finished)] == ["step-00000001", "step-00000002", "step-00000003"]
    assert not [path for path in (finished / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not list(finished.rglob("*.pt")) + list(finished.rglob("*.pkl"))


def test_keep_bounds_the_number_of_checkpoints(tmp_path: Path) -> None:
    train(SMALL, tmp_path, steps=3, save_every=1, keep=1, line=quiet)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003"]


def test_a_save_that_fails_leaves_nothing(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseflash.train import checkpoint

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    loaded = load_checkpoint(copied)
    model = PixelTransformer(loaded.config.pixel_model)
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    before = sorted(copied.rglob("*"))
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(copied, 9, Progress(), loaded.config, model, torch.optim.AdamW(model.parameters()))
    assert sorted(copied.rglob("*")) == before


def test_runs_are_not_overwritten_or_mixed(finished: Path) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        run(finished, 4)
    with pytest.raises(ValueError, match="made with another batch, lr"):
        run(finished, 4, replace(SMALL, batch=8, lr=1e-4), resume=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"steps": -3}, "steps must be at least 1; got -3"),
        ({"minutes": 0.0}, "minutes must be a positive number; got 0.0"),
        ({"minutes": float("nan")}, "minutes must be a positive number; got nan"),
        ({"save_every": 0}, "save_every"),
        ({"keep": 0}, "keep"),
    ],
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path, changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        train(SMALL, tmp_path / "run", **changes, line=quiet)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_evaluation_counts_and_leaves_the_model_as_it_was() -> None:
    model = PixelTransformer(SMALL.pixel_model)
    seen: list[int] = []
    score = evaluate(model, held_out(SMALL.stages[0], 7, batch=3), advance=seen.append)
    assert (score.count, seen, model.training) == (7, [3, 3, 1], True)
    with pytest.raises(ValueError, match="no examples"):
        evaluate(model, [])


class Corner(torch.nn.Module):
    """Says 1 where the first pixel is brighter than 100, the more surely the brighter."""

    def forward(self, images: torch.Tensor) -> PixelOutput:
        grey = images[:, 0, 0].float() - 100
        return PixelOutput(torch.stack([-grey, grey], 1), None, None)


def test_views_are_averaged() -> None:
    """An image with another grey in each corner: the views see them in turn, each twice in eight."""
    images = torch.zeros(1, 3, 3, dtype=torch.uint8)
    images[0, 0, 0], images[0, 2, 0], images[0, 0, 2], images[0, 2, 2] = 90, 105, 0, 255
    batch = [(images, torch.tensor([1]))]
    assert evaluate(Corner(), batch) == Score(0, 1)
    for views, right in ((2, 0), (3, 0), (4, 1), (8, 1)):  # means of 90, 105; 90, 105, 0; all four; each twice
        assert evaluate(Corner(), batch, views=views) == Score(right, 1, right_in_one_view=0)
    images[0, 2, 0] = 115
    assert evaluate(Corner(), batch, views=2) == Score(1, 1, right_in_one_view=0)


def test_views_are_refused() -> None:
    for views in (0, 9):
        with pytest.raises(ValueError, match="views must be 1 to 8"):
            evaluate(Corner(), [], views=views)
    for shape in ((2, 4), (2, 4, 5)):
        symbols = torch.zeros(shape, dtype=torch.uint8)
        with pytest.raises(ValueError, match="views are of square images"):
            evaluate(Corner(), [(symbols, torch.zeros(2))], views=2)


def test_a_model_can_be_trained_after_an_evaluation() -> None:
    model = PixelTransformer(replace(SMALL.pixel_model, pattern="local(61)"))
    evaluate(model, held_out(SMALL.stages[0], 2))
    images, _ = next(held_out(SMALL.stages[0], 2))
    model(images).logits.sum().backward()
    assert model.head.weight.grad is not None


def test_wilson_intervals() -> None:
    assert Score(50, 100).interval == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert Score(100, 100).interval[1] == 1.0
    assert Score(0, 10).interval[0] == 0.0


def test_bfloat16_trains_too(tmp_path: Path) -> None:
    losses = run(tmp_path, 2, replace(SMALL, precision="bf16")).losses
    exact = run(tmp_path / "fp32", 2).losses
    assert losses == pytest.approx(exact, rel=0.05)
