"""The public generator: determinism, ground truth, pixels, bad arguments."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import sparseflash.pathfinder as pf
from sparseflash.pathfinder.render import render
from sparseflash.pathfinder.scene import stream
from sparseflash.pathfinder.strokes import marker
from sparseflash.pathfinder.workers import WorkerError, run_tasks

SMALL = pf.Geometry.curriculum(64, 3)


def test_public_names() -> None:
    assert len(set(pf.__all__)) == len(pf.__all__)
    for name in pf.__all__:
        assert getattr(pf, name).__doc__, name


def test_same_bytes_for_any_workers_and_batches() -> None:
    images, labels = pf.generate(64, 6, seed=7, geometry=SMALL)
    assert (images.shape, images.dtype.name) == ((6, 64, 64), "uint8")
    assert (labels.shape, labels.dtype.name) == ((6,), "int64")
    shared, shared_labels = pf.generate(64, 6, seed=7, geometry=SMALL, workers=2)
    np.testing.assert_array_equal(images, shared)
    np.testing.assert_array_equal(labels, shared_labels)
    late, late_labels, truths = pf.generate_with_truth(64, 2, seed=7, geometry=SMALL, start=4)
    np.testing.assert_array_equal(images[4:], late)
    assert late_labels.tolist() == [truth.label for truth in truths] == labels[4:].tolist()
    other, _ = pf.generate(64, 6, seed=8, geometry=SMALL)
    assert not np.array_equal(images, other)


def test_streams_are_those_of_the_specification() -> None:
    expected = np.random.default_rng(np.random.SeedSequence((5, 256, 14, 9))).random(4)
    np.testing.assert_array_equal(stream(pf.Geometry.lra(256), 5, 9).random(4), expected)
    changed = replace(pf.Geometry.lra(256), num_distractors=3)
    assert not np.array_equal(stream(changed, 5, 9).random(4), expected)


def test_no_image_repeats() -> None:
    images, _ = pf.generate(32, 40, seed=1, level="easy")
    assert len({image.tobytes() for image in images}) == 40


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_markers_and_label(size: int) -> None:
    level = "easy"
    images, labels, truths = pf.generate_with_truth(size, 8, seed=2, level=level)
    assert set(labels.tolist()) == {0, 1}
    for image, label, truth in zip(images, labels.tolist(), truths, strict=True):
        tips = [set(target.tips) for target in truth.targets]
        assert (label == 1) == any(set(truth.markers) == both for both in tips)
        assert all(sum(point in both for point in truth.markers) == 1 for both in tips) or label == 1
        assert truth.markers[0] == truth.targets[truth.origin].tips[0]
        assert image.max() == 255
        assert image.min() == 0
        for y, x in truth.markers:
            patch, (top, left) = marker(y, x, size=size, radius=truth.geometry.marker_radius, antialias=2)
            solid = image[top : top + patch.shape[0], left : left + patch.shape[1]][patch == 255]
            # At 32 a distractor brighter than 1 dims the rest, markers too.
            assert (solid == 255).all() if size != 32 else (solid >= 127).all()


@pytest.mark.parametrize("size", [32, 128])
def test_pixels_follow_the_contrast_rule(size: int) -> None:
    _, _, truths = pf.generate_with_truth(size, 3, seed=4, level="easy")
    brightest = []
    for truth in truths:
        g = truth.geometry
        planes = pf.contour_strokes(truth) / 255
        planes[:2] *= g.snake_contrast * g.paddle_contrast
        planes[2:] *= g.snake_contrast
        value = planes.max(0)
        for y, x in truth.markers:
            full, _ = marker(y, x, size=size, radius=g.marker_radius, antialias=2, full=True)
            value = np.maximum(value, full / 255)
        expected = np.floor((value - value.min()) * 255 / (value.max() - value.min()) + 0.5)
        np.testing.assert_array_equal(render(truth), expected)
        brightest.append(float(value.max()))
    # Only at 32 does a distractor exceed 1.
    assert (max(brightest) > 1) == (size == 32)


def test_curve_targets() -> None:
    images, labels, truths = pf.generate_with_truth(256, 6, seed=0)
    for image, label, truth in zip(images, labels.tolist(), truths, strict=True):
        targets = pf.curve_targets(truth)
        assert (targets.shape, targets.dtype.name) == ((256, 256), "int8")
        assert (targets[image == 0] == -1).all()
        planes = pf.contour_strokes(truth)
        alone = (planes > 0).sum(0) == 1
        for number, plane in enumerate(planes):
            here = alone & (plane > 60) & (image > 0)
            assert here.any()
            wanted = 0 if number > 1 else 1 if not label else 2 if number == truth.origin else 0
            assert (targets[here] == wanted).all()
        assert (targets[~(planes > 0).any(0)] == -1).all()
        # A disc reaches beyond the strokes; those pixels are lit and on no curve.
        assert (image[targets == -1] > 0).any()


def test_truth_geometry() -> None:
    _, _, truths = pf.generate_with_truth(128, 4, seed=0, level="easy")
    assert {truth.margin for truth in truths} <= {2, 3}
    for truth in truths:
        assert truth.attempts >= 1
        assert math.isclose(truth.marker_distance, math.dist(*truth.markers))
        for contour in truth.contours:
            assert contour.pixels.shape == (len(contour.angles), 2)
            assert (contour.pixels >= 0).all()
            assert (contour.pixels < 128).all()
        # The second dash on: heads are one period apart, give or take the ceil and the floor.
        period = truth.geometry.paddle_length + 2 * truth.margin
        gaps = np.linalg.norm(np.diff(truth.targets[0].pixels[1:], axis=0), axis=1)
        assert (np.abs(gaps - period) < 4).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 100}, ValueError, "100"),
        ({"size": "256"}, TypeError, "size"),
        ({"count": -1}, ValueError, "count"),
        ({"count": 1.0}, TypeError, "count"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 1 << 32}, ValueError, "seed"),
        ({"seed": None}, TypeError, "seed"),
        ({"start": (1 << 32) - 1}, ValueError, "start"),
        ({"level": "extreme"}, ValueError, "extreme"),
        ({"level": 14}, TypeError, "level"),
        ({"workers": 0}, ValueError, "workers"),
        ({"workers": True}, TypeError, "workers"),
        ({"geometry": 64}, TypeError, "geometry"),
        ({"geometry": SMALL, "size": 128}, ValueError, "contradicts"),
    ],
)
@pytest.mark.parametrize("function", [pf.generate, pf.generate_with_truth])
def test_bad_arguments(
    function: Callable[..., object], arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(**{"count": 2, **arguments})


def test_empty_request() -> None:
    images, labels = pf.generate(32, 0)
    assert images.shape == (0, 32, 32)
    assert labels.shape == (0,)


def test_workers_keep_order_and_report_failures() -> None:
    done = run_tasks(math.factorial, [3, 2, 1, 0, 4, 5, -1, 6], 2)
    assert [next(done) for _ in range(6)] == [6, 2, 1, 1, 24, 120]
    with pytest.raises(ValueError, match="negative"):
        next(done)
    with (
        pytest.warns(UserWarning, match="its work is done again"),
        pytest.raises(WorkerError, match="died 3 times before they finished anything"),
    ):
        list(run_tasks(os._exit, [1, 1, 1], 2))


def _dies_at_first(marker: str, task: int) -> int:
    """Kills its process at task 3, once."""
    if task == 3:
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def test_a_worker_that_dies_is_replaced_and_its_work_done_again(tmp_path: Path) -> None:
    tasks = [*range(8), 8, 9]
    with pytest.warns(UserWarning, match="its work is done again"):
        found = list(run_tasks(partial(_dies_at_first, str(tmp_path / "died")), tasks, 2))
    assert found == [task * task for task in tasks]


def test_workers_end_when_their_parent_is_killed() -> None:
    code = (
        "import math, time\n"
        "from sparseflash.pathfinder.workers import Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(math.factorial, 2)\n"
        "    for _ in range(4): workers.submit(3)\n"
        "    assert [workers.take() for _ in range(4)] == [6] * 4\n"
        "    print(*workers._pool._processes, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    processes = [int(number) for number in parent.stdout.readline().split()]
    assert processes
    parent.kill()
    parent.wait()
    parent.stdout.close()
    waiting = time.monotonic() + 20
    while any(map(_runs, processes)) and time.monotonic() < waiting:
        time.sleep(0.02)
    assert not any(map(_runs, processes))


def _runs(process: int) -> bool:
    """Whether it is there and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_generator_does_not_import_torch_or_pillow_early() -> None:
    code = (
        "import sys, types, importlib.util as u\n"
        "import sparseflash\n"
        "before = set(sys.modules)\n"
        "import sparseflash.pathfinder as pf\n"
        "new = set(sys.modules) - before\n"
        "assert not new & {'torch', 'PIL', 'rich'}, new & {'torch', 'PIL', 'rich'}\n"
        "pf.generate(32, 1, level='easy')\n"
        "assert 'torch' not in set(sys.modules) - before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_marker_distance_baseline() -> None:
    geometry = pf.Geometry.lra(256, "easy")
    plain = pf.marker_distance_baseline(256, "easy", pairs=800)
    assert 0.82 < plain < 0.89
    matched = pf.marker_distance_baseline(geometry=geometry, pairs=2000, match_distance=True)
    assert abs(matched - 0.5) < 0.03
    with pytest.raises(ValueError, match="pairs"):
        pf.marker_distance_baseline(32, pairs=3)


def test_matched_images_hide_the_distance() -> None:
    """The images themselves, not the table: the two labels' distances have the same distribution."""
    geometry = pf.Geometry.curriculum(64, 3)
    distances: dict[bool, tuple[list[float], list[float]]] = {}
    for match in (False, True):
        _, _, truths = pf.generate_with_truth(64, 200, geometry=geometry, match_distance=match)
        kinds: tuple[list[float], list[float]] = ([], [])
        for truth in truths:
            kinds[truth.label].append(truth.marker_distance)
        distances[match] = kinds
    from scipy import stats

    assert stats.ks_2samp(*distances[False]).pvalue < 1e-6
    assert stats.ks_2samp(*distances[True]).pvalue > 0.01
