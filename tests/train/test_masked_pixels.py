"""Masked-pixel pretraining, and the comparison of recipes that uses it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import ablations
from sparseflash.models import PixelTransformer
from sparseflash.train import recipe, train
from sparseflash.train.pretrain import GREY, MaskedPixels, hidden_pixels, pretrain

CONFIG = recipe("demo", dense_weight=0.0, layers=2, width=16, batch=4, lr=1e-2, warmup=2)


@pytest.mark.parametrize(("side", "share"), [(1, 0.5), (3, 0.25), (8, 0.25)])
def test_hidden_squares_cover_their_share(side: int, share: float) -> None:
    images = torch.zeros(400, 24, 24, dtype=torch.uint8)
    hidden = hidden_pixels(images, side, share, torch.Generator().manual_seed(0))
    # Of each image's share; squares make pixels of an image depend on each other, so the spread is taken from them.
    shares = hidden.double().mean((1, 2))
    assert abs(shares.mean() - share) < 4.5 * shares.std() / math.sqrt(len(shares))
    runs = hidden[:, 12].int().diff(prepend=torch.zeros(400, 1), append=torch.zeros(400, 1))
    inside = [
        (image, begin, end) for image, row in enumerate(runs) for begin, end in _runs(row) if 0 < begin < end < 24
    ]
    assert min(end - begin for _, begin, end in inside) >= side


def _runs(row: torch.Tensor) -> list[tuple[int, int]]:
    return list(zip((row == 1).nonzero()[:, 0].tolist(), (row == -1).nonzero()[:, 0].tolist(), strict=True))


def test_nothing_under_a_square_is_seen() -> None:
    torch.manual_seed(0)
    whole = MaskedPixels(PixelTransformer(CONFIG.pixel_model))
    seen: list[torch.Tensor] = []
    whole.model.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.randint(0, 256, (2, 24, 24), dtype=torch.uint8)
    hidden = hidden_pixels(images, 4, 0.3, torch.Generator().manual_seed(1))
    whole(images, hidden)
    assert (seen[0][hidden] == GREY).all()
    assert torch.equal(seen[0][~hidden], images[~hidden])


def test_pretraining_learns_and_its_weights_begin_a_run(tmp_path: Path) -> None:
    losses = pretrain(CONFIG, tmp_path / "pretrained", steps=30, side=4)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    again = pretrain(CONFIG, tmp_path / "again", steps=2, side=4)
    assert again == losses[:2]
    config = replace(CONFIG, init=str(tmp_path / "pretrained"), lr=1e-12, weight_decay=0.0)
    result = train(config, tmp_path / "run", steps=1, line=lambda text: None)
    begun = PixelTransformer.from_pretrained(tmp_path / "pretrained").state_dict()
    for name, value in result.model.state_dict().items():
        torch.testing.assert_close(value, begun[name])


def test_what_cannot_be_hidden_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="masked pixels need tokens \"all\"; got 'lit_pixels'"):
        pretrain(recipe("path256", preset="path256-cpu"), tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"share in 0..1; got 1, 8 and 1.0"):
        pretrain(CONFIG, tmp_path, steps=1, share=1.0)
    with pytest.raises(FloatingPointError, match="step 1: the loss is"):
        pretrain(replace(CONFIG, lr=1e30, clip=1e30, warmup=0), tmp_path / "out", steps=3)
    assert not (tmp_path / "out").exists()


def test_arms_differ_in_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    arms = list(ablations.CHANGES)
    ablations.main(["--arms", ",".join(arms), "--images", "24", "--test", "2", "--dry-run", "--device", "cpu"])
    rows = dict(zip(arms, capsys.readouterr().out.splitlines(), strict=True))
    assert all(row.startswith(f"arm {arm}, images 24") for arm, row in rows.items())
    parameters = {arm: int(row.split("parameters ")[1].split(",")[0]) for arm, row in rows.items()}
    assert parameters["tied"] <= parameters["half the depth"] < parameters["base"] == parameters["raster"]
    assert {arm for arm, row in rows.items() if "steps_on_labels 3" in row} == {*arms} - {"masked pixels first"}
    assert "steps_on_labels 2" in rows["masked pixels first"]
    with pytest.raises(SystemExit):
        ablations.main(["--arms", "fried"])
