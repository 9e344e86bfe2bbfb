"""Files are whole or not there, have the umask's permissions, and are never written through a link."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from sparseflash import patterns as P
from sparseflash.models.files import read_tensors, save_model, write_tensors
from sparseflash.patterns import atomic_write as writing
from sparseflash.patterns.atomic_write import atomic_write, make_folder, write_text
from sparseflash.patterns.untrusted import open_untrusted, read_untrusted
from tests.limits import little_memory


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_the_umask(tmp_path: Path, mask: int, mode: int) -> None:
    with umask(mask):
        write_text(tmp_path / "a.txt", "a")
        P.causal().compile(64).save(tmp_path / "m.safetensors")
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise RuntimeError("the writer gave up")

    with pytest.raises(RuntimeError, match="gave up"):
        fail()
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_links_are_replaced_and_never_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    link = tmp_path / "a.txt"
    link.symlink_to(outside)
    write_text(link, "new")
    assert (outside.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)
    # Even a temporary name that somebody guessed is not opened.
    monkeypatch.setattr(writing, "temporary_beside", lambda path: tmp_path / "guessed")
    (tmp_path / "guessed").symlink_to(outside)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "b.txt", "new")
    assert outside.read_text() == "mine"


def test_folders_below_the_given_one_are_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    run = tmp_path / "run"
    run.mkdir()
    (run / "pictures").symlink_to(outside)
    for path in (run / "pictures" / "a.txt", run / "pictures" / "deep" / "a.txt"):
        with pytest.raises(ValueError, match="pictures is a link"):
            write_text(path, "x", inside=run)
        with pytest.raises(ValueError, match="pictures is a link"):
            make_folder(path.parent, inside=run)
    assert not list(outside.iterdir())
    # The folder that the user named may be a link: that is the user's choice.
    (tmp_path / "named").symlink_to(run)
    write_text(make_folder(tmp_path / "named" / "fine", tmp_path / "named") / "a.txt", "x", tmp_path / "named")
    assert (run / "fine" / "a.txt").read_text() == "x"
    (run / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        make_folder(run / "file", run)


def test_only_regular_files_are_opened_and_nothing_waits(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValueError, match="is not a regular file"), open_untrusted(path):
            pass
    listening.close()
    with pytest.raises(FileNotFoundError), open_untrusted(tmp_path / "nothing"):
        pass


def test_a_file_is_read_up_to_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(100))
    assert read_untrusted(path, 100) == bytes(100)
    with pytest.raises(ValueError, match="100 bytes; at most 99 are read"):
        read_untrusted(path, 99)


def test_links_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "within").symlink_to("a")
    (folder / "out").symlink_to("../secret")
    assert read_untrusted(folder / "within", 9, inside=folder) == b"a"
    for path in (folder / "out", folder / ".." / "secret"):
        with pytest.raises(ValueError, match="leads out of"):
            read_untrusted(path, 9, inside=folder)
    (folder / "round").symlink_to("round")
    with pytest.raises(ValueError, match="round leads nowhere: links lead to each other"):
        read_untrusted(folder / "round", 9, inside=folder)


def test_weights_have_the_permissions_of_the_config_beside_them(tmp_path: Path) -> None:
    with umask(0o022):
        save_model(tmp_path / "model", "{}", {"a": torch.ones(3)})
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()} == {0o644}


def test_weights_are_read_once_and_for_all(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.arange(100_000.0)})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    weights = read_tensors(path, digest)
    os.truncate(path, 0)  # a mapped file would end the process here
    assert torch.equal(weights["a"], torch.arange(100_000.0))
    write_tensors(path, {"a": torch.zeros(100_000)})
    with pytest.raises(ValueError, match="checksum"):
        read_tensors(path, digest)


@pytest.mark.parametrize("size", [0, 7, 60, 1 << 36])
def test_a_weights_file_of_another_size_than_its_header_says_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "w.safetensors"
    write_tensors(path, {"a": torch.arange(1000.0)})
    os.truncate(path, size)
    with little_memory(64), pytest.raises(ValueError, match="truncated or foreign"):
        read_tensors(path)
