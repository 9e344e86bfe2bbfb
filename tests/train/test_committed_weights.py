"""Weights in benchmarks/weights do what the ledger says of them."""

from pathlib import Path

import pytest

from sparseflash.models import PixelTransformer
from sparseflash.pathfinder import Geometry
from sparseflash.train import load_preset
from sparseflash.train.evaluate import evaluate, held_out

WEIGHTS = Path(__file__).parent.parent.parent / "benchmarks" / "weights"


def test_eight_dashes_on_128_pixels() -> None:
    """93.2 % of 1,000 images; that of so many the first hundred have fewer than 85 right happens once in a thousand."""
    model = PixelTransformer.from_pretrained(WEIGHTS / "path256-cpu")
    stage = load_preset("path256").config.pixel_stages[6]
    assert (stage.geometry.size, stage.geometry.contour_length) == (128, 8)
    assert evaluate(model, held_out(stage, 100)).right >= 85


@pytest.mark.parametrize(("name", "least"), [("path256-pixels", 48), ("path256", 52)])
def test_path_256(name: str, least: int) -> None:
    """94.0 and 97.6 % of the test set; of 60 images fewer are right less than once in ten thousand times."""
    model = PixelTransformer.from_pretrained(WEIGHTS / name)
    stage = load_preset("path256-last").config.pixel_stages[-1]
    assert stage.geometry == Geometry.lra(256)
    assert evaluate(model, held_out(stage, 60)).right >= least


def test_path_x() -> None:
    """95.5 % of the test set; of 60 images fewer than 49 are right less than once in ten thousand times."""
    model = PixelTransformer.from_pretrained(WEIGHTS / "pathx")
    stage = load_preset("pathx-last").config.pixel_stages[-1]
    assert stage.geometry == Geometry.lra(128)
    score = evaluate(model, held_out(stage, 60), views=2)
    assert score.right_in_one_view is not None
    assert min(score.right, score.right_in_one_view) >= 49
