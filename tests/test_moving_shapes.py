"""The example of video prediction: its videos are what they say, no model sees the future, and moving is learned."""

from __future__ import annotations

import pytest
import torch

from examples.moving_shapes import (
    FRAMES,
    MASKS,
    SIDE,
    SQUARE,
    SQUARES,
    Predictor,
    accuracy,
    copying,
    main,
    overlap,
    train,
    videos,
)


def test_squares_move_steadily_and_bounce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("examples.moving_shapes.SQUARES", 1)
    video = videos(200, torch.Generator().manual_seed(0))
    assert video.shape == (200, FRAMES + 1, SIDE, SIDE)
    assert (video.sum((2, 3)) == SQUARE**2).all()
    for lit in (video.any(2), video.any(3)):  # columns, and rows
        corner = lit.float().argmax(2)
        assert (lit.sum(2) == SQUARE).all()
        assert (lit.gather(2, corner[..., None] + torch.arange(SQUARE))).all()
        moved = corner.diff(dim=1)
        room = SIDE - SQUARE
        away_from_borders = (corner[:, 1:-1] > 2) & (corner[:, 1:-1] < room - 2)
        assert (moved[:, 1:] == moved[:, :-1])[away_from_borders].all()
        assert set(moved.abs().unique().tolist()) == {0, 1, 2}, "0 where a border turns a square back"
        assert (moved[:, 1:] * moved[:, :-1] < 0).any()


def test_no_model_sees_a_frame_that_it_predicts() -> None:
    before = videos(2, torch.Generator().manual_seed(0))[:, :-1]
    after = before.clone()
    after[:, 5:] = 1 - after[:, 5:]
    for mask in MASKS.values():
        torch.manual_seed(0)
        model = Predictor(mask)
        with torch.no_grad():
            found, changed = model(before), model(after)
        assert torch.equal(found[:, :5], changed[:, :5])
        assert not torch.equal(found[:, 5], changed[:, 5])


def test_only_one_frame_does_without_the_past() -> None:
    video = videos(2, torch.Generator().manual_seed(0))[:, :-1]
    other = video.flip(0)
    other[:, 4] = video[:, 4]
    for name, mask in MASKS.items():
        torch.manual_seed(0)
        model = Predictor(mask)
        with torch.no_grad():
            blind = torch.allclose(model(video)[:, 4], model(other)[:, 4], atol=1e-5)
        assert blind == (name == "one frame")


def test_overlap_is_over_the_frames_that_can_be_known() -> None:
    video = videos(4, torch.Generator().manual_seed(0))[:, :-1]
    assert overlap(video, video) == 1
    early = video.clone()
    early[:, :2] = 0
    assert overlap(early, video) == 1
    assert overlap(torch.zeros_like(video), video) == 0
    assert 0.1 < copying() < 0.5
    assert SQUARES * SQUARE**2 < SIDE**2 / 8, "mostly black"


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = Predictor(MASKS["neighborhood"])
    losses = list(train(model, 40, batch=2))
    assert sum(losses[-10:]) < sum(losses[:10]) / 2
    assert 0 <= accuracy(model, 8) <= 1


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--attention", "neighborhood", "one frame", "--steps", "1"])
    printed = capsys.readouterr().out
    for word in ("neighborhood", "one frame", "seconds a step", "Copying the last frame: "):
        assert word in printed
    with pytest.raises(SystemExit):
        main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
