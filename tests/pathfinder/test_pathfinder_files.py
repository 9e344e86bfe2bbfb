"""The LRA folder layout: write, resume, read, and every damage that reading must name."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import sparseflash.pathfinder as pf
from sparseflash.pathfinder import lra
from sparseflash.utils.folder_lock import folder_lock

SMALL = pf.Geometry.curriculum(64, 3)
HARD = "curv_contour_length_14"


def write(out: Path, count: int = 7, **changes: object) -> pf.WriteReport:
    arguments: dict[str, object] = {"geometry": SMALL, "seed": 3, "progress": False, **changes}
    return pf.write(out, count=count, **arguments)  # type: ignore[arg-type]


@pytest.fixture
def batches_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lra, "BATCH", 3)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lra")
    pf.write(out, 32, 10, level="hard", seed=1, progress=False)
    return out


@pytest.fixture
def copy(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "copy")
    return tmp_path / "copy"


def test_round_trip(pristine: Path) -> None:
    images, labels = pf.generate(32, 10, seed=1)
    data = pf.read(pristine)
    assert (len(data), data.size, data.dropped) == (10, 32, ())
    np.testing.assert_array_equal(data.labels, labels)
    for i, (image, label) in enumerate(data):  # type: ignore[arg-type, var-annotated]
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, images[i])
        assert label == labels[i]
    with pytest.raises(IndexError):
        data[10]


def test_layout_is_that_of_the_release(pristine: Path, tmp_path: Path) -> None:
    rows = (pristine / "pathfinder32" / HARD / "metadata" / "0.npy").read_text().splitlines()
    assert rows[4].split() == [
        "imgs/0",
        "sample_4.png",
        "4",
        rows[4].split()[3],
        "1.0",
        "14",
        "4",
        "2",
        "0.5",
        "1",
        "1",
    ]
    report = pf.write(tmp_path, 32, 1, level="easy", progress=False)
    assert report.folder == tmp_path / "pathfinder32" / "curv_baseline"
    row = (report.folder / "metadata" / "0.npy").read_text().split()
    assert row == ["imgs/0", "sample_0.png", "0", row[3], "1.0", "6", "2", "2", "0.5", "1", "1"]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("batches_of_three")
def test_resume(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    assert (whole.written, whole.kept, whole.skipped) == (7, 0, ())
    folder = write(tmp_path / "broken").folder
    (folder / "imgs" / "1" / "sample_2.png").unlink()
    (folder / "metadata" / "1.npy").unlink()
    (folder / "imgs" / "2" / "sample_0.png").write_bytes(b"")
    stamp = (folder / "imgs" / "1" / "sample_0.png").stat().st_mtime_ns
    again = write(tmp_path / "broken", workers=2)
    assert (again.written, again.kept, again.skipped) == (2, 2, (0,))
    assert (folder / "imgs" / "1" / "sample_0.png").stat().st_mtime_ns == stamp
    more = write(tmp_path / "broken", 8)
    assert (more.written, more.kept, more.skipped) == (1, 1, (0, 1))
    write(tmp_path / "whole", 8)
    for path in whole.folder.rglob("*.*"):
        assert path.read_bytes() == (folder / path.relative_to(whole.folder)).read_bytes()
    one, other = pf.read(folder), pf.read(whole.folder)
    assert one.files == other.files
    assert len(one) == 8
    assert write(tmp_path / "whole", 8).skipped == (0, 1, 2)


def test_a_killed_writer_leaves_whole_files_and_the_next_one_finishes(tmp_path: Path) -> None:
    call = f"pf.write({str(tmp_path / 'killed')!r}, 32, 40, seed=3, progress=False)"
    folder = tmp_path / "killed" / "pathfinder32" / HARD
    for least in (3, 9, 20):
        writer = subprocess.Popen([sys.executable, "-c", f"import sparseflash.pathfinder as pf; {call}"])
        while writer.poll() is None and len(list(folder.glob("imgs/0/*.png"))) < least:
            time.sleep(0.001)
        writer.kill()
        writer.wait()
    report = pf.write(tmp_path / "killed", 32, 40, seed=3, progress=False)
    assert report.kept >= 20 or report.skipped == (0,)
    whole = pf.write(tmp_path / "whole", 32, 40, seed=3, progress=False).folder
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.*"))
    assert names == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert all((whole / name).read_bytes() == (folder / name).read_bytes() for name in names)


def test_only_labels_missing(tmp_path: Path) -> None:
    folder = write(tmp_path, 3).folder
    rows = (folder / "metadata" / "0.npy").read_text()
    (folder / "metadata" / "0.npy").unlink()
    assert write(tmp_path, 3).written == 0
    assert (folder / "metadata" / "0.npy").read_text() == rows


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"count": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"workers": 0}, ValueError),
        ({"geometry": "64"}, TypeError),
        ({"start": -1}, ValueError),
    ],
)
def test_write_refuses_before_writing(tmp_path: Path, changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        write(tmp_path / "new", **{"count": 2, **changes})  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_write_refuses_foreign_folders(tmp_path: Path, pristine: Path) -> None:
    write(tmp_path, 2)
    with pytest.raises(ValueError, match="another seed"):
        write(tmp_path, 2, seed=4)
    folder = tmp_path / "pathfinder64" / SMALL.folder
    (folder / "generator.json").write_text("{")
    with pytest.raises(ValueError, match="not readable"):
        write(tmp_path, 2)
    (folder / "generator.json").unlink()
    with pytest.raises(ValueError, match="did not make"):
        write(tmp_path, 2)
    with pytest.raises(ValueError, match="is a file"):
        write(pristine / "pathfinder32" / HARD / "generator.json", 2)


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 3, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "3/3" in captured.err


def test_identity_is_plain_json(pristine: Path) -> None:
    identity = json.loads((pristine / "pathfinder32" / HARD / "generator.json").read_text())
    assert identity["seed"] == 1
    assert identity["geometry"]["size"] == 32


def test_every_kind_of_root(copy: Path) -> None:
    sized = copy / "pathfinder32"
    for path in (copy, sized, sized / HARD):
        assert len(pf.read(path)) == len(pf.read(path, "hard")) == len(pf.read(str(path), HARD)) == 10
    outer = copy.parent / "archive"
    inner = outer / "lra_release" / "lra_release"
    inner.mkdir(parents=True)
    shutil.copytree(sized, inner / "pathfinder32")
    # A second copy further out is never merged nor preferred.
    shutil.copytree(sized, outer / "lra_release" / "pathfinder32")
    for path in (outer, outer / "lra_release", inner):
        data = pf.read(path)
        assert data.folder == (inner / "pathfinder32" / HARD).resolve()
        assert len(data) == 10
    shutil.copytree(sized, inner / "pathfinder64")
    with pytest.raises(ValueError, match="32, 64"):
        pf.read(outer)
    assert len(pf.read(outer, size=32)) == 10


def test_batches_sort_by_number_and_numpy_metadata(copy: Path) -> None:
    folder = copy / "pathfinder32" / HARD
    rows = [line.split() for line in (folder / "metadata" / "0.npy").read_text().splitlines()]
    (folder / "metadata" / "0.npy").unlink()
    np.save(folder / "metadata" / "9.npy", np.array(rows[:4]).astype("S"))
    np.save(folder / "metadata" / "10.npy", np.array(rows[4:7]))
    (folder / "metadata" / "11.npy").write_text("\n".join(map(" ".join, rows[7:])))
    data = pf.read(folder)
    assert data.files == tuple(f"imgs/0/sample_{i}.png" for i in range(10))
    assert data.labels.tolist() == [int(row[3]) for row in rows]


def test_empty_images_are_dropped_and_named(copy: Path) -> None:
    (copy / "pathfinder32" / HARD / "imgs" / "0" / "sample_4.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"dropped 1 empty image\(s\): imgs/0/sample_4.png"):
        data = pf.read(copy)
    assert data.dropped == ("imgs/0/sample_4.png",)
    assert len(data) == len(data.labels) == 9
    assert "imgs/0/sample_4.png" not in data.files


def test_splits(copy: Path) -> None:
    data = pf.read(copy)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(42)).tolist()
    parts = data.split()
    assert [len(part) for part in parts] == [8, 1, 1]
    assert [file for part in parts for file in part.files] == [data.files[i] for i in order]
    assert parts.test.labels.tolist() == [int(data.labels[order[-1]])]
    # What random_split does, on the same indices.
    chosen: list[torch.utils.data.Subset[int]] = torch.utils.data.random_split(
        range(10),  # type: ignore[arg-type]
        [8, 1, 1],
        generator=torch.Generator().manual_seed(42),
    )
    assert [list(part.indices) for part in chosen] == [order[:8], order[8:9], order[9:]]
    flat = data.split("contiguous")
    assert flat.train.files + flat.val.files + flat.test.files == data.files
    assert [len(part) for part in flat] == [8, 1, 1]
    with pytest.raises(ValueError, match="split must be"):
        data.split("tfds")
    (copy / "pathfinder32" / HARD).rename(copy / "pathfinder32" / "curv_baseline")
    with pytest.raises(ValueError, match="s4 split"):
        pf.read(copy, "easy").split()


def test_tokens_and_floats(pristine: Path) -> None:
    image, _ = pf.read(pristine)[0]
    tokens = pf.to_tokens(image)
    assert tokens.shape == (1024,)
    assert tokens[33] == image[1, 1]
    np.testing.assert_allclose(pf.to_floats(tokens), tokens / 255, rtol=1e-6)
    centred = pf.to_floats(tokens, center=True)
    assert centred.dtype == np.float32
    assert (centred.min(), centred.max()) == (-1, 1)


def image_file(folder: Path) -> Path:
    return folder / "imgs" / "0" / "sample_3.png"


def metadata_file(folder: Path) -> Path:
    return folder / "metadata" / "0.npy"


def truncate(folder: Path) -> None:
    image_file(folder).write_bytes(image_file(folder).read_bytes()[:-20])


def no_png(folder: Path) -> None:
    image_file(folder).write_bytes(b"GIF89a" + bytes(100))


def huge(folder: Path) -> None:
    data = bytearray(image_file(folder).read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    image_file(folder).write_bytes(data)


def missing(folder: Path) -> None:
    image_file(folder).unlink()
    (folder / "imgs" / "0" / "sample_5.png").unlink()


def rewrite(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = metadata_file(folder).read_text()
        assert old in text
        metadata_file(folder).write_text(text.replace(old, new))

    return change


def pickled(folder: Path) -> None:
    np.save(metadata_file(folder), np.array([{"a": 1}], dtype=object), allow_pickle=True)


def all_empty(folder: Path) -> None:
    for path in folder.glob("imgs/0/*.png"):
        path.write_bytes(b"")


def symlinked(folder: Path) -> None:
    (folder / "imgs" / "0").rename(folder.parent.parent / "elsewhere")
    (folder / "imgs" / "0").symlink_to(folder.parent.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (missing, FileNotFoundError, r"2 of 10 images missing: imgs/0/sample_3.png, imgs/0/sample_5.png"),
        (truncate, ValueError, r"1 of 10 images damaged.*sample_3.png"),
        (no_png, ValueError, r"1 of 10 images damaged.*sample_3.png"),
        (huge, ValueError, r"1 of 10 images damaged.*sample_3.png"),
        (rewrite("imgs/0 sample_2", "../0 sample_2"), ValueError, r"row 3: '\.\./0'"),
        (rewrite("imgs/0 sample_2", "/etc sample_2"), ValueError, "not a path inside"),
        (rewrite("sample_2.png", "../sample_2.png"), ValueError, "not a path inside"),
        (rewrite("sample_2.png", "a\\b.png"), ValueError, "not a path inside"),
        (rewrite("sample_0.png 0 1", "sample_0.png 0 2"), ValueError, "row 1: the label must be 0 or 1, got '2'"),
        (lambda folder: metadata_file(folder).write_text("imgs/0 sample_0.png\n"), ValueError, "11 columns"),
        (lambda folder: metadata_file(folder).write_bytes(b"\x93NUMPY\x01"), ValueError, "plain NumPy"),
        (lambda folder: metadata_file(folder).write_bytes(b"\xff\xfe\x00"), ValueError, "plain NumPy"),
        (lambda folder: metadata_file(folder).write_text("\n"), ValueError, "name no images"),
        (lambda folder: metadata_file(folder).unlink(), ValueError, "no .npy files"),
        (lambda folder: metadata_file(folder).rename(folder / "metadata" / "a.npy"), ValueError, "whole numbers"),
        (pickled, ValueError, "plain NumPy"),
        (symlinked, ValueError, "leads out"),
        (lambda folder: shutil.rmtree(folder), ValueError, "no pathfinder{H} here|no curv"),
    ],
)
def test_damage_is_named(copy: Path, damage: Callable[[Path], object], error: type[Exception], message: str) -> None:
    folder = copy / "pathfinder32" / HARD
    if "label" in message:
        text = metadata_file(folder).read_text().splitlines(keepends=True)
        text[0] = text[0].replace("sample_0.png 0 0", "sample_0.png 0 1")
        metadata_file(folder).write_text("".join(text))
    damage(folder)
    with pytest.raises(error, match=message):
        pf.read(copy)


def test_all_images_empty(copy: Path) -> None:
    all_empty(copy / "pathfinder32" / HARD)
    with pytest.warns(UserWarning, match="dropped 10"), pytest.raises(ValueError, match="all 10 images are empty"):
        pf.read(copy)


@pytest.mark.parametrize("damage", [truncate, no_png, huge])
def test_unverified_damage_shows_when_read(copy: Path, damage: Callable[[Path], None]) -> None:
    damage(copy / "pathfinder32" / HARD)
    data = pf.read(copy, verify=False)
    assert data[2][0].shape == (32, 32)
    with pytest.raises(ValueError, match=r"sample_3.png"):
        data[3]


def test_wrong_places(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        pf.read(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        pf.read(copy / "pathfinder32" / HARD / "metadata" / "0.npy")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match=r"no pathfinder\{H\} here"):
        pf.read(tmp_path / "void")
    with pytest.raises(ValueError, match=f"there is {HARD}"):
        pf.read(copy, "easy")
    with pytest.raises(ValueError, match="level must be"):
        pf.read(copy, "../..")
    with pytest.raises(ValueError, match="is a level folder"):
        pf.read(copy / "pathfinder32" / HARD, "easy")
    with pytest.raises(ValueError, match="pathfinder64"):
        pf.read(copy, size=64)
    with pytest.raises(ValueError, match="images of 32 pixels a side, not of size=64"):
        pf.read(copy / "pathfinder32" / HARD, size=64)


def test_wrong_places_say_what_to_do(copy: Path, tmp_path: Path) -> None:
    archive = tmp_path / "lra_release.tar.gz"
    archive.write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"is an archive: unpack it \(`tar xzf .*lra_release.tar.gz`\)"):
        pf.read(archive)
    with pytest.raises(FileNotFoundError, match=r"no folder .*lra_release; unpack lra_release.tar.gz: `tar xzf"):
        pf.read(tmp_path / "lra_release")
    deep = tmp_path / "data" / "downloads"
    deep.mkdir(parents=True)
    copy.rename(deep / "arena")
    with pytest.raises(ValueError, match=r"no pathfinder32 here.*There is .*arena/pathfinder32: name that folder"):
        pf.read(tmp_path / "data", size=32)
    (deep / "arena" / "pathfinder32" / HARD).rename(deep / "arena" / "pathfinder32" / "curv_baseline")
    with pytest.raises(ValueError, match="there is curv_baseline; say which level is meant: easy"):
        pf.read(deep / "arena")


def test_a_digest_is_that_of_names_labels_and_sizes(copy: Path, tmp_path: Path) -> None:
    digest = pf.read(copy).digest()
    copy.rename(tmp_path / "moved")
    data = pf.read(tmp_path / "moved")
    assert data.digest() == digest
    assert data.subset([0, 1]).digest() != digest
    other = (data.labels == 0).nonzero()[0][0], (data.labels == 1).nonzero()[0][0]
    swapped = [other[1] if i == other[0] else other[0] if i == other[1] else i for i in range(len(data))]
    assert data.subset(swapped).digest() != digest
    image = data.folder / data.files[3]
    image.write_bytes(image.read_bytes() + b"\0")
    assert data.digest() != digest
    image.unlink()
    with pytest.raises(FileNotFoundError, match=image.name):
        data.digest()


def test_writing_goes_through_no_link_and_leaves_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    out = tmp_path / "out"
    pf.write(out, 32, 2, progress=False)
    folder = out / "pathfinder32" / "curv_contour_length_14"
    images = folder / "imgs" / "0"
    (images / "sample_1.png").unlink()
    for planted in (images / ".sample_1.png.tmp", folder / ".generator.json.tmp", images / f".sample_1.png.{'0' * 16}"):
        planted.symlink_to(outside / "mine.txt")
    assert pf.write(out, 32, 2, progress=False).written == 1
    assert (outside / "mine.txt").read_text() == "mine"
    assert not (images / f".sample_1.png.{'0' * 16}").is_symlink(), "what a kill left goes"
    shutil.rmtree(images)
    images.symlink_to(outside)
    with pytest.raises(ValueError, match="imgs/0 is a link"):
        pf.write(out, 32, 2, progress=False)
    assert [path.name for path in outside.iterdir()] == ["mine.txt"]


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    pf.write(tmp_path, 32, 1, progress=False)
    folder = tmp_path / "pathfinder32" / "curv_contour_length_14"
    with folder_lock(folder), pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        pf.write(tmp_path, 32, 2, progress=False)
    assert pf.write(tmp_path, 32, 2, progress=False).written == 1
    assert not (folder / ".lock").exists()


def test_a_folder_that_another_process_has_just_begun_is_in_use_and_not_foreign(tmp_path: Path) -> None:
    folder = tmp_path / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)  # what a writer makes first
    with folder_lock(folder), pytest.raises(ValueError, match="in use by process"):
        pf.write(tmp_path, 32, 1, progress=False)
