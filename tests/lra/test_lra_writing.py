"""Files of ListOps are written whole, by one process, and through no link."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.lra.listops_files import write
from sparseflash.utils.folder_lock import folder_lock
from tests.lra.test_lra_listops import SHORT

NAMES = ["basic_test.tsv", "basic_train.tsv", "basic_val.tsv"]
WRITER = """
import sys
from pathlib import Path
from sparseflash.lra.listops_files import write
from tests.lra.test_lra_listops import SHORT
print("ready", flush=True)
sys.stdin.read(1)
try:
    print(write(Path(sys.argv[1]), SHORT, train=3000))
except (ValueError, FileExistsError) as error:
    print(error)
    sys.exit(3)
"""


def test_of_two_processes_one_writes_and_the_other_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "data")]
    pair = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for each in pair:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in pair:
        assert each.stdin is not None
        each.stdin.write("x")
        each.stdin.flush()
    said = [each.communicate(timeout=100)[0] for each in pair]
    assert sorted(each.returncode for each in pair) == [0, 3], said
    (refused,) = [text for text, each in zip(said, pair, strict=True) if each.returncode]
    assert "is in use by process" in refused or "is there already" in refused
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == NAMES
    write(tmp_path / "alone", SHORT, train=3000)
    for name in NAMES:
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "data"]


def test_the_second_is_told_of_the_first(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "data", beside=True), pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
        write(tmp_path / "data", SHORT, train=2)
    assert not (tmp_path / "data").exists()


def test_a_folder_gets_its_name_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def fail(*_: object) -> bytes:
        nonlocal calls
        calls += 1
        if calls == 3:  # in the last of the three files
            raise OSError(28, "No space left on device")
        return b"1\t1\r\n"

    with monkeypatch.context() as patched:
        patched.setattr("sparseflash.lra.listops_files._rows", fail)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path / "data", SHORT, train=2)
    assert not list(tmp_path.iterdir())
    (tmp_path / f".data.{'0' * 16}").mkdir()  # what a kill leaves
    write(tmp_path / "data", SHORT, train=2)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_there_keeps_what_is_in_it(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    data = tmp_path / "data"
    data.mkdir()
    (data / "notes.txt").write_text("mine")
    for number in range(os.getpid() - 3, os.getpid() + 3):
        (data / f".basic_train.{number}").symlink_to(outside)
    write(data, SHORT, train=2)
    assert (outside.read_text(), (data / "notes.txt").read_text()) == ("mine", "mine")
    assert set(NAMES) < {path.name for path in data.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "basic_val.tsv").symlink_to(outside)
    with pytest.raises(FileExistsError, match=r"basic_val\.tsv is there already"):
        write(tmp_path / "other", SHORT, train=2)
    (tmp_path / "named").symlink_to(tmp_path / "real")  # the user's own choice
    write(tmp_path / "named", SHORT, train=2)
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == NAMES
