"""What a training run tells: a progress bar or lines, TensorBoard, and one JSON line a step."""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

STEPS = "steps.jsonl"
# Single steps are noisy: what people see is a mean over this many.
WINDOW = 50
SECONDS_BETWEEN_LINES = 10.0


class Reporter:
    """Shows and records the steps of a run.

    A terminal gets a progress bar; anything else gets a line every ten seconds. ``steps.jsonl`` holds every step's
    figures at full precision, and is cut back to the step from which a run resumes.

    Args:
        run: the run folder.
        step: steps done before.
        steps: steps in all.
        images: images a step.
        quiet: show and record nothing (other processes than the first).
        line: takes lines instead of the terminal.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        steps: int,
        images: int,
        quiet: bool = False,
        line: Callable[[str], None] | None = None,
    ) -> None:
        self._run, self._first, self._steps, self._images = run, step, steps, images
        self._quiet, self._line = quiet, line
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self._run.mkdir(parents=True, exist_ok=True)
        _cut(self._run / STEPS, self._first)
        self._file = (self._run / STEPS).open("a")
        # Numbers of steps that are about to be repeated are taken back.
        self._board = SummaryWriter(str(self._run / "tensorboard"), purge_step=self._first + 1)
        console = Console(stderr=True)
        if self._line is None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                console=console,
            )
            self._bar = self._progress.add_task("", total=self._steps, completed=self._first, figures="")
            self._progress.start()
        self._started = self._told = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._board.close()

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Report a completed step; ``figures`` has at least loss and accuracy."""
        if self._quiet:
            return
        self._recent.append(figures)
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        now = time.perf_counter()
        rate = (step - self._first) * self._images / max(now - self._started, 1e-9)
        self._board.add_scalar("images_per_second", rate, step)
        shown = [f"{name.removesuffix('_accuracy')} {self._mean(name):.3f}" for name in figures if "accuracy" in name]
        text = ", ".join([f"loss {self._mean('loss'):.3f}", *shown, f"{rate:.3g} images/s"])
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, figures=text)
        elif now - self._told >= SECONDS_BETWEEN_LINES or step == self._steps:
            self._told = now
            left = (self._steps - step) * (now - self._started) / (step - self._first)
            say = self._line or (lambda line: Console(stderr=True).print(line, highlight=False, soft_wrap=True))
            say(f"step {step}/{self._steps}: {text}, {left:.0f} s left")

    def _mean(self, name: str) -> float:
        return sum(figures[name] for figures in self._recent) / len(self._recent)


def _cut(path: Path, step: int) -> None:
    """Drop the lines after a step, and one that a kill left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError, TypeError):
            break
    path.write_text("".join(kept))
