"""Folders of somebody else, with links, pipes, devices, sockets and sparse files anywhere in them, and two processes.

Reading ends in an object or in an error, in bounded memory and time; writing changes nothing outside of the folder; of
two processes that write into one folder the second is refused, and what is there in the end is what one would have
written, also when one of them was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparseflash import pathfinder
from sparseflash import patterns as P
from sparseflash.distributed.checkpoint import FORMAT, VERSION, _progress
from sparseflash.lra import open_corpus
from sparseflash.lra.listops_files import write as write_trees
from sparseflash.models import PixelTransformer, from_pretrained
from sparseflash.models.files import write_tensors
from sparseflash.patterns import BlockMask
from sparseflash.train import load_preset, recipe, train
from sparseflash.train.checkpoint import latest_checkpoint
from sparseflash.train.preset_text import preset_text
from tests.hostile import KINDS, content, entries, kinds, make_outside
from tests.limits import little_memory, within
from tests.lra.test_lra_files import TREE, images, papers, reviews, trees
from tests.lra.test_lra_listops import SHORT

CONFIG = recipe("demo", batch=1, layers=1, width=16, heads=1)
# What a reader may end in. An error of the system names its file; a reader that is stopped by it has read nothing.
REFUSALS = (ValueError, OSError)


def slow(examples: int) -> settings:
    """For laws whose cases take a tenth of a second and more; a campaign runs as many of them as it likes."""
    return settings(
        max_examples=min(settings().max_examples, examples),
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def make_run(folder: Path) -> None:
    train(CONFIG, folder, steps=1, line=lambda text: None)


def make_shards(folder: Path) -> None:
    folder.mkdir()
    write_tensors(folder / "shard-0.safetensors", {"a": torch.ones(3)})
    size = (folder / "shard-0.safetensors").stat().st_size
    state = {"format": FORMAT, "version": VERSION, "files": {"shard-0.safetensors": size}, "progress": {}}
    (folder / "state.json").write_text(json.dumps(state))


def made_below(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def below(folder: Path) -> None:
        folder.mkdir()
        make(folder)

    return below


def read_images(folder: Path) -> object:
    return [image for image, _ in pathfinder.read(folder)]  # type: ignore[attr-defined]


def read_corpus(task: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        corpus = open_corpus(task, folder)
        return [corpus[index] for part in corpus.splits.values() for index in part]

    return read


Making = Callable[[Path], object]
FOLDERS: dict[str, tuple[Making, Making]] = {
    "run": (make_run, latest_checkpoint),
    "model": (lambda folder: PixelTransformer(CONFIG.pixel_model).save_pretrained(folder), from_pretrained),
    "mask": (
        made_below(lambda folder: P.causal().compile(64).save(folder / "mask")),
        lambda folder: BlockMask.load(folder / "mask"),
    ),
    "preset": (
        made_below(lambda folder: (folder / "a.toml").write_text(preset_text(CONFIG, "theirs"))),
        lambda folder: load_preset(folder / "a.toml"),
    ),
    "shards": (make_shards, _progress),
    "images": (lambda folder: pathfinder.write(folder, 32, 3, progress=False), read_images),
    "listops": (made_below(lambda folder: trees(folder, TREE)), read_corpus("listops")),
    "text": (made_below(reviews), read_corpus("text")),
    "retrieval": (made_below(papers), read_corpus("retrieval")),
    "image": (made_below(images), read_corpus("image")),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of every kind."""
    place = tmp_path_factory.mktemp("good")
    for name, (make, read) in FOLDERS.items():
        make(place / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(place / name)
    return place


@contextmanager
def planted(good: Path, name: str, data: st.DataObject, more: tuple[str, ...] = ()) -> Iterator[Path]:
    """A copy of a folder with a few hostile entries; nothing beside it may change."""
    place = Path(os.environ.get("TMPDIR", "/tmp")) / f"sparseflash-{os.getpid()}-{time.monotonic_ns()}"
    place.mkdir()
    try:
        outside = make_outside(place)
        shutil.copytree(good / name, place / "theirs")
        for _ in range(data.draw(st.integers(1, 3), "how many")):
            entry = place / "theirs" / data.draw(st.sampled_from([*entries(place / "theirs"), *more]), "entry")
            where = os.path.realpath(entry.parent)  # a link that was planted before may lead away
            if os.path.isdir(where) and Path(where).is_relative_to(os.path.realpath(place / "theirs")):
                KINDS[data.draw(kinds, "kind")](entry, outside)
        before = content(outside)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield place / "theirs"
        assert content(outside) == before, "something outside was changed"
        assert sorted(path.name for path in place.iterdir()) == ["outside", "theirs"]
    finally:
        shutil.rmtree(place)


@contextmanager
def refused_at_most() -> Iterator[None]:
    """What happens inside ends in seconds and little memory, well or with a refusal."""
    try:
        with within(30), little_memory(512):
            yield
    except REFUSALS as error:
        if not str(error):
            raise AssertionError("a refusal without a word") from error


@pytest.mark.parametrize("name", FOLDERS)
@slow(30)
@given(data=st.data())
def test_folders_are_read_or_refused(good: Path, name: str, data: st.DataObject) -> None:
    with planted(good, name, data) as folder, refused_at_most():
        FOLDERS[name][1](folder)


PID = os.getpid()
IN_RUN = (
    ".lock", "steps.jsonl", ".steps.jsonl.part", "tensorboard", "pictures", "best", "best/checkpoints", "checkpoints",
    f"checkpoints/.step-00000002.{PID}", "checkpoints/.step-evil", "checkpoints/step-00000000",
    "checkpoints/step-00000002", "checkpoints/.step-00000001.removed",
)  # fmt: skip


@slow(20)
@given(data=st.data())
def test_training_goes_on_in_a_folder_of_somebody_else_or_does_not(good: Path, data: st.DataObject) -> None:
    with planted(good, "run", data, IN_RUN) as folder, refused_at_most():
        train(CONFIG, folder, steps=2, resume=True, keep=1, line=lambda text: None)


IN_IMAGES = tuple(
    f"pathfinder32/curv_contour_length_14/{name}"
    for name in (".lock", "generator.json", ".generator.json.tmp", "imgs/0/sample_4.png", "imgs/0/.sample_4.png.tmp",
                 "imgs/0", "imgs", "metadata", "metadata/0.npy", f"imgs/0/.sample_3.png.{PID}")
)  # fmt: skip


@slow(30)
@given(data=st.data())
def test_images_are_added_to_a_folder_of_somebody_else_or_not(good: Path, data: st.DataObject) -> None:
    with planted(good, "images", data, IN_IMAGES) as folder, refused_at_most():
        pathfinder.write(folder, 32, 5, progress=False)


@slow(30)
@given(data=st.data())
def test_trees_are_written_beside_what_is_there_or_not(good: Path, data: st.DataObject) -> None:
    names = ("basic_train.tsv", "basic_val.tsv", f".basic_val.{PID}", ".lock")
    with planted(good, "listops", data, names) as folder, refused_at_most():
        write_trees(folder, SHORT, train=2)


DONE, REFUSED, WRONG = 0, 3, 4


def forked(work: Callable[[], object]) -> int:
    """A process that works; its number. It ends with DONE, REFUSED in words, or WRONG."""
    life = os.fork()
    if life:
        return life
    code = WRONG
    try:
        work()
        code = DONE
    except (ValueError, FileExistsError) as error:
        code = REFUSED if "in use by process" in str(error) or "is there already" in str(error) else WRONG
        if code == WRONG:
            traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def trained(folder: Path) -> object:
    torch.set_num_threads(1)  # a fork of a process with threads would wait for those it does not have
    return train(CONFIG, folder, steps=3, resume="auto", save_every=1, line=lambda text: None)


WRITERS: dict[str, Callable[[Path], object]] = {
    "images": lambda folder: pathfinder.write(folder, 32, 12, progress=False),
    "trees": lambda folder: write_trees(folder, SHORT, train=200),
    "run": trained,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes; it also loads what a first call loads, once for all forks."""
    place = tmp_path_factory.mktemp("alone")
    for name, write in WRITERS.items():
        write(place / name)
    return place


def kept(folder: Path) -> dict[str, bytes | str | None]:
    """What a folder holds, but for what names a moment: TensorBoard's files."""
    return {name: found for name, found in content(folder).items() if not name.startswith("tensorboard")}


@pytest.mark.parametrize("name", WRITERS)
@slow(8)
@given(moments=st.lists(st.floats(0, 0.4), min_size=1, max_size=3), deaths=st.lists(st.floats(0, 0.4), max_size=1))
def test_two_processes_at_once_leave_what_one_would_have(
    alone: Path, tmp_path_factory: pytest.TempPathFactory, name: str, moments: list[float], deaths: list[float]
) -> None:
    place = tmp_path_factory.mktemp("two")
    folder, write = place / "out", WRITERS[name]
    started, lives, killed = time.monotonic(), list[int](), None
    for moment in [0.0, *sorted(moments)]:
        time.sleep(max(0, started + moment - time.monotonic()))
        lives.append(forked(lambda: write(folder)))
    if deaths:
        time.sleep(deaths[0])
        killed = lives[0]
        os.kill(killed, signal.SIGKILL)
    with within(60):
        ends = {life: os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]) for life in lives}
    allowed = {DONE, REFUSED}
    assert all(code in allowed or (life == killed and code == -signal.SIGKILL) for life, code in ends.items()), ends
    if DONE not in ends.values():
        assert killed is not None, "all were refused"
        with suppress(FileExistsError):  # it had written everything and was killed on its way out
            write(folder)
    if name == "images":
        assert [image.tobytes() for image, _ in pathfinder.read(folder)] == [  # type: ignore[attr-defined]
            image.tobytes()
            for image, _ in pathfinder.read(alone / name)  # type: ignore[attr-defined]
        ]
    assert kept(folder) == kept(alone / name)
    assert [path.name for path in place.iterdir()] == ["out"]
    shutil.rmtree(place)
