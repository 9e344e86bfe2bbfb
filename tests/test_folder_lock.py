"""One process writes into a folder at a time."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.utils.folder_lock import NAME, folder_lock

HOLDER = """
import sys, time
from pathlib import Path
from sparseflash.utils.folder_lock import folder_lock
with folder_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_with_the_process_and_host_of_the_first(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    words = rf"in use by process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=words), folder_lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert (tmp_path / NAME).exists(), "a kill leaves the file"
    with folder_lock(tmp_path):
        assert (tmp_path / NAME).read_text() == f"{os.getpid()} {socket.gethostname()}\n"
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(outside)
    with pytest.raises(ValueError, match="is a link"), folder_lock(tmp_path / "run"):
        pass
    assert outside.read_text() == "mine"


def test_a_lock_that_is_a_pipe_or_a_folder_or_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for plant in (os.mkfifo, lambda path: os.link(tmp_path / "mine.txt", path)):
        plant(tmp_path / NAME)
        with pytest.raises(ValueError, match="is not a regular file of one name"), folder_lock(tmp_path):
            pass
        (tmp_path / NAME).unlink()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / NAME).mkdir()
    with pytest.raises(IsADirectoryError), folder_lock(tmp_path):
        pass
