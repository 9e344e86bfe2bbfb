"""Processes that run a function together, one rank each, on Gloo: started once, asked many times."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds in which every rank must have answered


class Ranks:
    """So many processes in one process group. ``run`` calls a module's function on all of them at once."""

    def __init__(self, count: int) -> None:
        # The server imports torch once, and every rank is a fork of it: seconds instead of seconds for each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["tests.distributed.programs", "tests.distributed.training", "tests.distributed.trainer"]
        )
        self.count = count
        self.folder = tempfile.TemporaryDirectory()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, count, str(Path(self.folder.name) / "store"), there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> list[Any]:
        """What ``function(*arguments)`` gives on each rank.

        Raises:
            AssertionError: a rank raised, ended, or was not done in time; the text has each rank's account.
        """
        answers = self.outcomes(function, *arguments, patience=patience)
        bad = [f"rank {rank} of {self.count}: {text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not bad, "\n".join(bad)
        return [result for _, result in answers]

    def outcomes(
        self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE
    ) -> list[tuple[bool, Any]]:
        """(True, result) or (False, account of what went wrong) of each rank."""
        assert all(p.is_alive() for p in self.processes), "a rank has ended in an earlier test"
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__qualname__, arguments))
        end = time.monotonic() + patience
        answers: list[tuple[bool, Any]] = []
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            try:
                if pipe.poll(max(0.0, end - time.monotonic())):
                    answers.append(pipe.recv())
                else:
                    answers.append((False, f"no answer in {patience} s"))
            except EOFError:
                process.join(1)
                answers.append((False, f"ended with exit code {process.exitcode}"))
        if any(not ok and str(text).startswith("no answer") for ok, text in answers):
            self.close()  # it hangs in a collective: no later call could be trusted
        return answers

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.5)
            if process.is_alive():
                process.kill()
                process.join()
        self.folder.cleanup()


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=FileStore(store, count), rank=rank, world_size=count, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        try:
            module, name, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
