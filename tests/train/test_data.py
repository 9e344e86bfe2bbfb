"""Training images: which ones a run sees, in which order, from how many processes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseflash.train
from sparseflash import pathfinder
from sparseflash.pathfinder import SPLITS, Geometry, splits
from sparseflash.train import DataShard, Stage, TrainConfig, held_out, recipe
from sparseflash.train.batch import turned
from sparseflash.train.data import draw, planned

EASY = recipe("demo").pixel_stages[0].geometry
CONFIG = replace(
    recipe("demo"), batch=4, data="fixed", stages=(Stage(EASY), Stage(replace(EASY, contour_length=3, size=32)))
)


def test_the_fixed_sets_are_disjoint_and_have_the_sizes_of_the_arena() -> None:
    assert [len(indices) for indices in SPLITS.values()] == [160_000, 20_000, 20_000]
    assert sorted(i for indices in SPLITS.values() for i in indices) == list(range(splits.FRESH))


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 300), st.integers(1, 3), st.integers(0, 9), st.integers(0, 2000))
def test_fixed_training_goes_round_the_training_set_in_another_order_each_time(
    batch: int, world: int, seed: int, first: int
) -> None:
    config = replace(CONFIG, batch=batch, seed=seed)
    size = len(SPLITS["train"])
    parts = range(first, first + 3)
    seen = np.concatenate([planned(config, part, 0, rank, world)[2] for part in parts for rank in range(world)])
    assert ((seen >= 0) & (seen < size)).all()
    assert len(np.unique(seen)) == len(seen) or (first + 3) * world * batch > size
    whole = np.concatenate([planned(replace(config, batch=size), round_, 0)[2] for round_ in range(2)])
    assert all((np.sort(round_) == np.arange(size)).all() for round_ in np.split(whole, 2))
    start = first * world * batch
    if start + len(seen) <= 2 * size:
        assert (seen == whole[start : start + len(seen)]).all()


def test_fresh_images_are_in_no_set_and_never_come_twice() -> None:
    config = replace(CONFIG, data="fresh")
    seen = np.concatenate([planned(config, part, 0, rank, 2)[2] for part in range(5) for rank in range(2)])
    assert (seen == splits.FRESH + np.arange(40)).all()
    with pytest.raises(ValueError, match="past index 2\\*\\*32"):
        planned(config, 1 << 31, 0)


def test_images_depend_on_seed_and_part_alone_and_processes_share_them() -> None:
    config = replace(CONFIG, augment=True)
    stream = DataShard(config)
    images = [stream.take(part, 0).inputs for part in range(3)]
    assert torch.equal(DataShard(config).take(2, 0).inputs, images[2])
    halves = [DataShard(replace(config, batch=2), rank, 2).take(1, 0).inputs for rank in range(2)]
    assert torch.equal(torch.cat(halves), images[1])


def test_a_later_stage_reviews_the_one_before() -> None:
    first, second = CONFIG.stages
    assert [planned(CONFIG, part, 1)[0] for part in range(6)] == [second, second, first] * 2
    assert [planned(replace(CONFIG, review=0), part, 1)[0] for part in range(3)] == [second] * 3
    assert [planned(CONFIG, part, 0)[0] for part in range(6)] == [first] * 6


def test_workers_draw_the_same_images_also_when_a_stage_gives_way() -> None:
    config = replace(CONFIG, augment=True)
    here, ahead = DataShard(config), DataShard(config, workers=1)
    try:
        for part, stage in ((0, 0), (1, 0), (2, 1), (3, 1)):
            a, b = here.take(part, stage), ahead.take(part, stage)
            assert a.targets is not None
            assert b.targets is not None
            assert all(
                torch.equal(x, y) for x, y in ((a.inputs, b.inputs), (a.labels, b.labels), (a.targets, b.targets))
            )
    finally:
        ahead.close()


def test_symmetries_are_the_eight_of_the_square_and_turn_targets_alike() -> None:
    image = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    every = np.concatenate([turned(image, np.array([number])) for number in range(8)])
    assert len({each.tobytes() for each in every}) == 8
    assert (every[0] == image[0]).all()
    plain = draw(Stage(EASY), 0, range(8), dense=True)
    moved = draw(Stage(EASY), 0, range(8), dense=True, symmetries=np.arange(8))
    assert plain.targets is not None
    assert moved.targets is not None
    for i in range(8):
        assert sorted(plain.inputs[i].flatten().tolist()) == sorted(moved.inputs[i].flatten().tolist())
        # A lit pixel keeps its target wherever it goes.
        for targets, images in ((plain.targets[i], plain.inputs[i]), (moved.targets[i], moved.inputs[i])):
            assert ((targets >= 0) <= (images > 0)).all()
    assert torch.equal(plain.labels, moved.labels)


def test_held_out_images_are_the_generators_test_images() -> None:
    stage = Stage(Geometry.lra(32))
    images = torch.cat([images for images, _ in held_out(stage, 5, batch=2)])
    wanted, labels = pathfinder.generate(32, 5, seed=splits.SEED, start=SPLITS["test"].start)
    assert (images.numpy() == wanted).all()
    assert torch.cat([labels for _, labels in held_out(stage, 5, batch=2)]).tolist() == labels.tolist()
    for words, arguments in (("test set has 20,000", (20_001,)), ("split must be one of", (1, "dev"))):
        with pytest.raises(ValueError, match=words):
            next(held_out(stage, *arguments))


def config_of(**changes: object) -> TrainConfig:
    return replace(CONFIG, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "endless"}, "data must be one of fixed, fresh; got 'endless'"),
        ({"promote_at": 0.5}, "promote_at must be above 0.5"),
        ({"ema": 1.0}, "ema must be in 0..1"),
        ({"review": 1}, "review must be 0, or at least 2"),
        ({"stages": ()}, "at least one stage"),
        ({"stages": (Stage(EASY, tokens="lit_tiles"),)}, 'need unit "tile"'),
    ],
)
def test_bad_recipes_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(**changes)


def test_the_former_name_of_a_data_shard_works_and_warns() -> None:
    with pytest.warns(DeprecationWarning, match=r"Stream is now sparseflash.train.DataShard"):
        assert sparseflash.train.Stream is DataShard  # type: ignore[attr-defined]
    with pytest.warns(DeprecationWarning, match="streams= is now shards="):
        data = DataShard(CONFIG, streams=3)  # type: ignore[call-arg]
    assert [data.global_batch(micro_step) for micro_step in (0, 2, 3)] == [0, 0, 1]
    with pytest.raises(AttributeError, match="no attribute 'Streams'"):
        _ = sparseflash.train.Streams  # type: ignore[attr-defined]
