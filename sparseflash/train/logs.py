"""The output of a training run: a progress bar or lines, TensorBoard, and one JSON line per step."""

import json
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from sparseflash.patterns.atomic_write import append_to, atomic_write, make_folder
from sparseflash.patterns.shown import shown
from sparseflash.patterns.untrusted import open_untrusted
from sparseflash.train.curriculum import CHANCE
from sparseflash.train.curriculum import Progress as Place
from sparseflash.train.evaluate import Score
from sparseflash.utils.untrusted import parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = "steps.jsonl"
# Single steps are noisy, so a mean over this many is shown.
WINDOW = 50
SECONDS_BETWEEN_LINES = 10.0
# A limit for logs from untrusted runs; a step takes 200 bytes.
MOST_BYTES = 2 << 30
MOST_LINES = 1 << 24
MOST_LINE = 1 << 16


class Reporter:
    """Shows and records the steps of a run.

    A terminal gets a progress bar; anything else gets a line every ten seconds. ``steps.jsonl`` holds every step's
    figures at full precision and each evaluation on its own line. It is truncated to the step from which a run resumes.

    Args:
        run: the run folder.
        step: steps done before.
        images: examples per step.
        quiet: show and record nothing (other processes than the first).
        line: called with each line, in place of printing it.
        evaluated: the step of the last evaluation; later evaluations are removed.
    """

    def __init__(
        self,
        run: Path,
        step: int,
        images: int,
        quiet: bool = False,
        line: Callable[[str], None] | None = None,
        evaluated: int = 0,
    ) -> None:
        self._run, self._first, self._images, self._last_evaluation = run, step, images, evaluated
        self._validation: float | None = None
        self._quiet, self._line = quiet, line
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._times: deque[float] = deque(maxlen=WINDOW + 1)
        self._progress: Progress | None = None
        self._until: int | None = None
        self._baseline = CHANCE

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        from torch.utils.tensorboard import SummaryWriter

        self._run.mkdir(parents=True, exist_ok=True)
        _cut(self._run / STEPS, self._first, self._last_evaluation)
        self._file = append_to(self._run / STEPS)
        # Figures of steps that will be repeated are removed.
        self._board = SummaryWriter(str(make_folder(self._run / "tensorboard", self._run)), purge_step=self._first + 1)
        console = Console(stderr=True)
        if self._line is None and console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=8),
                TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
                console=console,
            )
            self._bar = self._progress.add_task("", total=None, completed=self._first, figures="")
            self._progress.start()
        self._told = time.perf_counter()
        self._times.append(self._told)
        return self

    def __exit__(self, *_: object) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._board.close()

    def stage(self, step: int, name: str, rule: str, baseline: Callable[[], float], until: int | None) -> None:
        """Report that a stage begins.

        Args:
            step: steps done.
            name: name of the stage.
            rule: description of the baseline.
            baseline: returns the accuracy of the baseline; may take seconds.
            until: the step at which training ends, if known.
        """
        if self._quiet:
            return
        self._until, self._baseline = until, baseline()
        self._recent.clear()
        self._validation = None
        self._board.add_scalar("baseline", self._baseline, step)
        self._say(f"{name}; {rule} gives {self._baseline:.1%}")
        if self._progress is not None:
            self._progress.update(self._bar, total=until)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Report a completed step; ``figures`` has at least loss and accuracy."""
        if self._quiet:
            return
        self._recent.append(figures)
        self._record({"step": step, **figures})
        now = time.perf_counter()
        self._times.append(now)
        rate = (len(self._times) - 1) * self._images / max(now - self._times[0], 1e-9)
        for name, value in {**figures, "examples_per_second": rate}.items():
            self._board.add_scalar(name, value, step)
        shown = [f"{name.removesuffix('_accuracy')} {self._mean(name):.3f}" for name in figures if "accuracy" in name]
        text = ", ".join([f"loss {self._mean('loss'):.3f}", *shown, f"baseline {self._baseline:.3f}"])
        if self._validation is not None:
            text += f", validation {self._validation:.3f}"
        text += f", {rate:.3g} examples/s"
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, figures=text)
        elif now - self._told >= SECONDS_BETWEEN_LINES or step == self._until:
            self._told = now
            if self._until is None:
                self._say(f"step {step}: {text}")
            else:
                left = (self._until - step) * self._images / rate
                self._say(f"step {step}/{self._until}: {text}, {left:.0f} s left")

    def evaluated(self, step: int, score: Score, progress: Place) -> None:
        """Report an evaluation on validation examples that ``progress`` includes."""
        if self._quiet:
            return
        self._validation = score.accuracy
        figures = {"validation_accuracy": score.accuracy, "best_validation_accuracy": progress.best}
        line = {"step": step, **figures, "validation_examples": score.count, "best_step": progress.best_step}
        self._record(line)
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        best = "the best so far"
        if progress.best_step != step:
            best = f"the best was {progress.best:.1%} at step {progress.best_step}"
        self._say(
            f"step {step}: {score.accuracy:.1%} of {score.count:,} validation examples, {best}; "
            f"running accuracy {progress.accuracy:.1%}"
        )

    def figure(self, name: str, figure: "Figure", step: int) -> None:
        """Keep a matplotlib figure in ``pictures/`` and show it in TensorBoard."""
        if not self._quiet:
            folder = make_folder(self._run / "pictures", self._run)
            with atomic_write(folder / f"step-{step:08d}-{name}.png", inside=self._run) as file:
                figure.savefig(file, dpi=100, format="png")
            self._board.add_figure(name, figure, step)

    def _record(self, line: dict[str, float]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def _say(self, text: str) -> None:
        text = shown(text)
        if self._line is not None:
            self._line(text)
        else:
            console = Console(stderr=True) if self._progress is None else self._progress.console
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _mean(self, name: str) -> float:
        return sum(figures[name] for figures in self._recent) / len(self._recent)


def _cut(path: Path, step: int, evaluated: int) -> None:
    """Remove the lines after a step, evaluations after another step, and an incomplete last line.

    Raises:
        ValueError: a line or a file in another format; then nothing is changed.
    """
    if not path.exists():
        return
    with open_untrusted(path) as (file, size), atomic_write(path) as kept:
        if size > MOST_BYTES:
            raise ValueError(f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are read: {_AWAY}")
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if number > MOST_LINES:
                raise ValueError(f"{path} has more than {MOST_LINES:,} lines: {_AWAY}")
            found = _figures(line, f"{path}, line {number}")
            if found is not None and found["step"] <= (evaluated if "validation_accuracy" in found else step):
                kept.write(line if line.endswith(b"\n") else line + b"\n")


_AWAY = "move the file away to go on without it"


def _figures(line: bytes, where: str) -> dict[str, Any] | None:
    """The data of a line of the log; None for an incomplete line."""
    problem = f"longer than {MOST_LINE:,} bytes" if len(line) > MOST_LINE else ""
    if not problem:
        try:
            found = parse_json(line.decode())
            if isinstance(found, dict) and type(found.get("step")) is int:
                return found
            problem = "no object with the number of a step"
        except UnicodeDecodeError:
            problem = "no text"
        except ValueError as error:
            problem = str(error)
    if not line.endswith(b"\n") and len(line) <= MOST_LINE:
        return None
    raise ValueError(f"{where}: {problem}; {_AWAY}")
