"""Text, Retrieval and Image: files in the published layout, made here."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparseflash.lra import TASKS, Corpus, open_corpus
from sparseflash.lra.cifar import RECORD, grey
from sparseflash.lra.lines import Lines

RNG = np.random.default_rng(0)


def reviews(folder: Path) -> Path:
    for split in ("train", "test"):
        for answer in ("neg", "pos"):
            place = folder / "aclImdb" / split / answer
            place.mkdir(parents=True)
            for number in (10, 2):
                (place / f"{number}_7.txt").write_bytes(f"{split} {answer} {number} é<br />".encode())
    (folder / "aclImdb" / "train" / "unsup").mkdir()
    return folder


def papers(folder: Path) -> Path:
    place = folder / "lra_release" / "lra_release" / "tsv_data"
    place.mkdir(parents=True)
    for split, count in (("train", 3), ("eval", 1), ("test", 1)):
        lines = [f"{i % 2}.0\t{i}\t{i + 7}\tb'{split} \"{i}\\n'\tb'second \\xc3'" for i in range(count)]
        (place / f"new_aan_pairs.{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def images(folder: Path, count: int = 4) -> Path:
    place = folder / "cifar-10-batches-bin"
    place.mkdir()
    for number, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        records = RNG.integers(0, 256, (count, RECORD), np.uint8)
        records[:, 0] = number
        records.tofile(place / name)
    return folder


def opened(task: str, folder: Path) -> Corpus:
    with pytest.warns(UserWarning, match="not the published"):
        return open_corpus(task, folder)


@pytest.mark.parametrize("inner", [False, True])
def test_reviews(tmp_path: Path, inner: bool) -> None:
    corpus = opened("text", reviews(tmp_path) / ("aclImdb" if inner else ""))
    assert corpus.splits == {"train": range(4), "test": range(4, 8)}
    found = [(bytes(document).decode(), label) for (document,), label in map(corpus.__getitem__, range(8))]
    order = [("neg", 2), ("neg", 10), ("pos", 2), ("pos", 10)]
    expected = [(f"{split} {a} {n} é<br />", int(a == "pos")) for split in ("train", "test") for a, n in order]
    assert found == expected


def test_papers(tmp_path: Path) -> None:
    corpus = opened("retrieval", papers(tmp_path))
    assert corpus.splits == {"train": range(3), "val": range(3, 4), "test": range(4, 5)}
    (first, second), label = corpus[1]
    assert (bytes(first), bytes(second), label) == (b"b'train \"1\\n'", b"b'second \\xc3'", 1)
    assert bytes(corpus[4].documents[0]) == b"b'test \"0\\n'"


def test_images(tmp_path: Path) -> None:
    corpus = opened("image", images(tmp_path))
    assert corpus.splits == {"train": range(18), "val": range(18, 20), "test": range(20, 24)}
    (pixels,), label = corpus[21]
    assert label == 5
    record = np.fromfile(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", np.uint8)[RECORD : 2 * RECORD]
    planes = record[1:].reshape(3, 32, 32)
    weights = np.array([0.299, 0.587, 0.114])
    luma = np.tensordot(weights, planes.astype(float), 1).ravel()
    assert np.abs(pixels - luma).max() <= 0.5 + 1e-9
    assert grey(np.full((3, 1), 255, np.uint8)).tolist() == [255]


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    place = tmp_path / "cifar-10-batches-bin"
    place.mkdir()
    (place / "data_batch_1").write_bytes(pickle.dumps({"data": [], "labels": []}))
    with pytest.raises(FileNotFoundError, match="data_batch_1 is a pickle and is not read: get the binary version"):
        open_corpus("image", tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    place = images(tmp_path) / "cifar-10-batches-bin"
    whole = (place / "data_batch_3.bin").read_bytes()
    for damaged, words in ((whole[:-1], "must be whole records of 3,073 bytes"), (b"\x0a" + whole[1:], "the label 10")):
        (place / "data_batch_3.bin").write_bytes(damaged)
        with pytest.raises(ValueError, match=f"data_batch_3.bin.*{words}"):
            open_corpus("image", place)
    place = papers(tmp_path) / "lra_release" / "lra_release" / "tsv_data"
    for line, words in (
        (b"1.0\t1\t2\ta", "has 5 fields .*; got 4"),
        (b"2.0\t1\t2\ta\tb", "label must be 0.0 or 1.0; got b'2.0'"),
        (b"1.0\t1\t2\t\tb", "a text is empty"),
    ):
        folder = tmp_path / words[:9].replace(" ", "-")
        folder.mkdir()
        for split in ("train", "eval", "test"):
            (folder / f"new_aan_pairs.{split}.tsv").write_bytes(b"0.0\t1\t2\ta\tb\n" + line + b"\n")
        with pytest.raises(ValueError, match=f"new_aan_pairs.train.tsv, line 2: .*{words}"):
            opened("retrieval", folder)[1]


def test_missing_files_are_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for task, words in (
        ("listops", "no file .*basic_train.tsv"),
        ("text", "has no folder neg"),
        ("retrieval", "no file .*new_aan_pairs.train.tsv"),
        ("image", "no file .*data_batch_1.bin"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            open_corpus(task, empty)
        with pytest.raises(FileNotFoundError, match="no folder"):
            open_corpus(task, tmp_path / "nowhere")
    (reviews(tmp_path) / "aclImdb" / "test" / "neg" / "2_7.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"2_7\.txt is empty"):
        opened("text", tmp_path)[4]
    for task in set(TASKS) - {"listops"}:
        with pytest.raises(ValueError, match=f"the task {task} is read from files"):
            open_corpus(task)
    with pytest.raises(ValueError, match="task must be one of image, listops"):
        open_corpus("pathfinder")


@pytest.mark.parametrize("chunk", [1, 5, 1 << 24])
@pytest.mark.parametrize("end", ["", "\n", "\n\n", "\r\n\r\n"])
def test_lines_are_found_whatever_the_chunks(
    tmp_path: Path, chunk: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseflash.lra.lines._CHUNK", chunk)
    file = tmp_path / "lines"
    file.write_bytes(f"head\none\r\ntwo three\n4 {end}".encode())
    lines = Lines(file, header=1)
    assert [lines[i] for i in range(len(lines))] == [b"one", b"two three", b"4 "]
    assert lines.where(1) == f"{file}, line 3"


def trees(folder: Path, *lines: bytes) -> Path:
    place = folder / "listops-1000"
    place.mkdir()
    for split in ("train", "val", "test"):
        rows = lines if split == "train" else lines[:1]
        (place / f"basic_{split}.tsv").write_bytes(b"Source\tTarget\r\n" + b"".join(line + b"\r\n" for line in rows))
    return folder


TREE = b"( ( ( [MAX 2 ) 9 ) ] )\t9"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"( ( ( [MAX 2 ) 9 ) ] )\t12", "the target must be a digit; got b'12'"),
        (b"( ( ( [MAX 2 ) x ) ] )\t9", "b'x' is not a symbol of ListOps"),
        (b"( ( ( [MAX 2 ) 9\t9", "no whole tree: 1 operators, 0 brackets"),
        (b"\t9", "no whole tree"),
        (b"", "the target must be a digit"),
    ],
)
def test_every_tree_is_checked_when_the_files_are_opened(tmp_path: Path, line: bytes, words: str) -> None:
    trees(tmp_path, TREE, TREE, line, TREE)
    with pytest.raises(ValueError, match=f"basic_train.tsv, line 4: {words}"):
        opened("listops", tmp_path)


def test_every_pair_and_review_is_checked_when_the_files_are_opened(tmp_path: Path) -> None:
    file = papers(tmp_path) / "lra_release" / "lra_release" / "tsv_data" / "new_aan_pairs.train.tsv"
    whole = file.read_text()
    file.write_text(whole + "1.0\t8\t9\n")
    with pytest.raises(ValueError, match="line 4: label and two ids, but no texts; tsv_data of the release has both"):
        opened("retrieval", tmp_path)
    file.write_text(whole + "1.0\t8\n")
    with pytest.raises(ValueError, match="line 4: a pair has 5 fields"):
        opened("retrieval", tmp_path)
    assert open_corpus("retrieval", tmp_path, verify=False)[0].label == 0
    (reviews(tmp_path) / "aclImdb" / "test" / "pos" / "2_7.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"test/pos/2_7\.txt is empty"):
        opened("text", tmp_path)


@pytest.mark.parametrize(("task", "make"), [("text", reviews), ("retrieval", papers), ("image", images)])
def test_files_that_change_are_read_anew_and_copies_are_equal(
    tmp_path: Path, task: str, make: Callable[[Path], Path]
) -> None:
    make(tmp_path)
    before = opened(task, tmp_path)
    digest = before.digest
    assert open_corpus(task, tmp_path) is before
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert opened(task, tmp_path / "copy").digest == digest
    first = next(path for path in sorted(tmp_path.rglob("*")) if path.is_file() and "copy" not in path.parts)
    if task == "text":
        first.with_name("11_7.txt").write_text("one more")
    else:
        first.write_bytes(2 * first.read_bytes())
    after = opened(task, tmp_path)
    assert after.digest != digest
    assert sum(map(len, after.splits.values())) > sum(map(len, before.splits.values()))


def test_misplaced_files_get_a_hint(tmp_path: Path) -> None:
    archive = tmp_path / "aclImdb_v1.tar.gz"
    archive.write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"is an archive: unpack it \(`tar xzf .*aclImdb_v1.tar.gz`\); name"):
        open_corpus("text", archive)
    with pytest.raises(FileNotFoundError, match=r"no folder .*; unpack aclImdb_v1.tar.gz: `tar xzf"):
        open_corpus("text", tmp_path / "aclImdb_v1")
    with pytest.raises(FileNotFoundError, match=r"has no folder neg; an archive lies there, unpack it: `tar xzf"):
        open_corpus("text", tmp_path)
    deep = tmp_path / "downloads" / "reviews"
    deep.mkdir(parents=True)
    reviews(deep)
    with pytest.raises(FileNotFoundError, match=r"; there is .*downloads/reviews/aclImdb: name that folder"):
        open_corpus("text", tmp_path)
    (tmp_path / "release").mkdir()
    with pytest.raises(FileNotFoundError, match=r"retrieval is read from a folder tsv_data with new_aan_pairs"):
        open_corpus("retrieval", tmp_path / "release")
    archive = tmp_path / "data.zip"
    archive.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"unpack it \(`unzip .*data.zip`\)"):
        open_corpus("image", archive)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="file is a file; name the folder that holds the files"):
        open_corpus("listops", tmp_path / "file")
