"""Files of the Arena's tasks that somebody else made: bounded, regular, and inside of the folder that was named."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparseflash import pathfinder
from sparseflash.lra import open_corpus
from sparseflash.lra.cifar import MOST_RECORDS, RECORD
from sparseflash.lra.lines import MOST_LINE, MOST_LINES, Lines
from sparseflash.train.baseline import KNOWN, folder_baseline
from tests.limits import little_memory
from tests.lra.test_lra_files import TREE, images, papers, reviews, trees

SPARSE = 60 << 30


@pytest.fixture
def level(tmp_path: Path) -> Path:
    """A level folder of three images of 32 pixels."""
    pathfinder.write(tmp_path, 32, 3, progress=False)
    return tmp_path / "pathfinder32" / "curv_contour_length_14"


def made(task: str, folder: Path) -> Path:
    """The files of a task, and one of them."""
    if task == "pathfinder":
        pathfinder.write(folder, 32, 3, progress=False)
        return folder / "pathfinder32" / "curv_contour_length_14" / "imgs" / "0" / "sample_1.png"
    if task == "metadata":
        return made("pathfinder", folder).parent.parent.parent / "metadata" / "0.npy"
    if task == "listops":
        return trees(folder, TREE) / "listops-1000" / "basic_val.tsv"
    make, file = {
        "text": (reviews, "aclImdb/train/neg/2_7.txt"),
        "retrieval": (papers, "lra_release/lra_release/tsv_data/new_aan_pairs.eval.tsv"),
        "image": (images, "cifar-10-batches-bin/data_batch_2.bin"),
    }[task]
    make(folder)
    return folder / file


def opened(task: str, folder: Path) -> object:
    if task in ("pathfinder", "metadata"):
        return [image for image, _ in pathfinder.read(folder)]  # type: ignore[attr-defined]
    return open_corpus(task, folder)


TASKS = ["text", "retrieval", "image", "listops", "pathfinder", "metadata"]
quietly = pytest.mark.filterwarnings("ignore:.*not the published")


def to_device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def to_pipe(file: Path) -> None:
    os.mkfifo(file)


def to_socket(file: Path) -> None:
    here = os.getcwd()
    os.chdir(file.parent)  # the names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(file.name)
    finally:
        os.chdir(here)


def to_secret(file: Path) -> None:
    (Path(os.environ["OUTSIDE"])).write_bytes(file.with_name("before").read_bytes())
    file.symlink_to(os.environ["OUTSIDE"])


def to_folder(file: Path) -> None:
    file.mkdir()


@quietly
@pytest.mark.parametrize("kind", [to_device, to_pipe, to_socket, to_secret, to_folder])
@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_file_of_the_folder_is_refused(
    tmp_path: Path, task: str, kind: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE", str(tmp_path / "outside"))
    data = tmp_path / "data"
    data.mkdir()
    file = made(task, data)
    opened(task, data)
    file.rename(file.with_name("before"))
    kind(file)
    missing = (FileNotFoundError,) if task == "pathfinder" else ()
    with little_memory(256), pytest.raises((ValueError, *missing), match=file.name):
        opened(task, data)


@quietly
@pytest.mark.parametrize("task", ["text", "retrieval", "image", "listops", "pathfinder"])
def test_links_within_the_folder_are_read(tmp_path: Path, task: str) -> None:
    file = made(task, tmp_path)
    (tmp_path / "store").mkdir()
    place = file.parent if task == "pathfinder" else tmp_path / "store"  # images stay in their level
    file.rename(place / "stored")
    file.symlink_to(os.path.relpath(place / "stored", file.parent))
    opened(task, tmp_path)


@quietly
@pytest.mark.parametrize(
    ("task", "folder"),
    [
        ("text", "aclImdb/train/neg"),
        ("text", "aclImdb"),
        ("image", "cifar-10-batches-bin"),
        ("listops", "listops-1000"),
        ("retrieval", "lra_release/lra_release/tsv_data"),
        ("pathfinder", "pathfinder32"),
        ("pathfinder", "pathfinder32/curv_contour_length_14"),
        ("pathfinder", "pathfinder32/curv_contour_length_14/imgs"),
        ("pathfinder", "pathfinder32/curv_contour_length_14/imgs/0"),
        ("pathfinder", "pathfinder32/curv_contour_length_14/metadata"),
    ],
)
def test_folders_that_lead_out_of_the_one_that_was_named_are_refused(tmp_path: Path, task: str, folder: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    made(task, data)
    (data / folder).rename(tmp_path / "elsewhere")
    (data / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="leads out of"):
        opened(task, data)
    # The folder that the user names may be a link: that is the user's choice.
    (data / folder).unlink()
    (tmp_path / "elsewhere").rename(data / folder)
    (tmp_path / "named").symlink_to(data)
    opened(task, tmp_path / "named")


@quietly
@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("text", "at most 16,777,216 are read"),
        ("retrieval", "line 2: longer than 16,777,216 bytes"),
        ("listops", "line 3: longer than 16,777,216 bytes"),
        ("image", f"at most {MOST_RECORDS * RECORD:,} are read"),
        ("metadata", "at most 16,777,216 are read"),
        ("pathfinder", "1 of 3 images damaged"),
    ],
)
def test_sparse_files_of_60_gb_are_not_read(tmp_path: Path, task: str, words: str) -> None:
    file = made(task, tmp_path)
    os.truncate(file, SPARSE // RECORD * RECORD)
    with little_memory(192), pytest.raises(ValueError, match=words):
        _read_all(task, tmp_path)


def _read_all(task: str, folder: Path) -> None:
    corpus = opened(task, folder)
    if task == "text":
        for index in range(4):
            corpus[index]  # type: ignore[index]


def test_lines_are_bounded_in_number_and_length(tmp_path: Path) -> None:
    file = tmp_path / "lines.tsv"
    file.write_bytes(b"\n" * 60_000_000)
    with little_memory(128), pytest.raises(ValueError, match=rf"lines.tsv has more than {MOST_LINES:,} lines"):
        Lines(file)
    file.write_bytes(b"a\nb\n" + b"c" * MOST_LINE + b"\n")
    with little_memory(128), pytest.raises(ValueError, match=rf"lines.tsv, line 3: longer than {MOST_LINE:,} bytes"):
        Lines(file)
    file.write_bytes(b"a\nb\n" + b"c" * (MOST_LINE - 1) + b"\nd")
    lines = Lines(file)
    assert [len(lines[i]) for i in range(len(lines))] == [1, 1, MOST_LINE - 1, 1]


def test_a_file_of_many_records_is_refused(tmp_path: Path) -> None:
    file = made("image", tmp_path)
    file.write_bytes(bytes(RECORD * (MOST_RECORDS + 1)))
    with little_memory(64), pytest.raises(ValueError, match=r"data_batch_2.bin has .* are read"):
        open_corpus("image", tmp_path)


def test_reviews_are_counted_before_they_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseflash.lra.documents.MOST_REVIEWS", 1)
    with pytest.raises(ValueError, match="neg holds more than 1 reviews"):
        open_corpus("text", reviews(tmp_path))


def _metadata(level: Path, lines: Iterator[str]) -> None:
    (level / "metadata" / "0.npy").write_text("\n".join(lines))


def test_subfolders_and_images_of_metadata_are_bounded(level: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _metadata(level, (f"{number} s 0 1" for number in range(100_000)))
    with little_memory(256), pytest.raises(ValueError, match="images in 100,000 subfolders, more than 65,536"):
        pathfinder.read(level)
    _metadata(level, (f"imgs/0 sample_{number % 3}.png 0 1" for number in range(60)))
    for number in range(1, 4):
        (level / "metadata" / f"{number}.npy").write_bytes((level / "metadata" / "0.npy").read_bytes())
    monkeypatch.setattr("sparseflash.pathfinder.reader._MAX_IMAGES", 200)
    with pytest.raises(ValueError, match="the metadata files name more than 200 images"):
        pathfinder.read(level)


def test_parts_of_a_path_are_bounded(level: Path) -> None:
    _metadata(level, iter([f"{'a/' * 120} sample_0.png 0 1"]))
    with pytest.raises(FileNotFoundError, match="1 of 1 images missing"):
        pathfinder.read(level)
    _metadata(level, iter([f"{'a/' * 200} sample_0.png 0 1"]))
    with pytest.raises(ValueError, match="a name of 400 characters, more than 255"):
        pathfinder.read(level)


def test_the_largest_images_that_are_written_are_read(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    place = tmp_path / "pathfinder2048" / "curv_contour_length_14"
    (place / "imgs" / "0").mkdir(parents=True)
    (place / "metadata").mkdir()
    Image.fromarray(np.zeros((2048, 2048), np.uint8)).save(place / "imgs" / "0" / "sample_0.png")
    (place / "metadata" / "0.npy").write_text("imgs/0 sample_0.png 0 1\n")
    assert pathfinder.read(tmp_path)[0][0].shape == (2048, 2048)


@pytest.mark.parametrize("changes", [{"size": 10**9}, {"contour_length": 200}])
def test_what_a_folder_says_of_its_generator_is_bounded(
    level: Path, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A geometry out of range, or one whose contours never come, is no known one."""
    monkeypatch.setattr("sparseflash.pathfinder.targets.MAX_ATTEMPTS", 1)
    made = json.loads((level / "generator.json").read_text())
    made["geometry"] |= changes
    (level / "generator.json").write_text(json.dumps(made))
    known = folder_baseline(level)
    assert known in (None, KNOWN[32, "hard"])
    with pytest.raises(ValueError, match=r"holds images of another geometry"):
        pathfinder.write(level.parent.parent, 32, 3, progress=False)
    (level / "generator.json").rename(level.parent.parent.parent / "outside.json")
    (level / "generator.json").symlink_to(level.parent.parent.parent / "outside.json")
    with pytest.raises(ValueError, match=r"generator.json is not readable"):
        pathfinder.write(level.parent.parent, 32, 3, progress=False)
    (level.parent.parent.parent / "outside.json").unlink()
