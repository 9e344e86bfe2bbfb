"""Training that ends at random moments again and again, and what is left of it each time.

python -m tests.train.crash --deaths 50                            # SIGKILL
python -m tests.train.crash --deaths 50 --by KILL INT TERM FULL READONLY TWO

Each life is a fork of this process, so a death costs a second. By signals half of the lives end while a checkpoint is
written or an old one removed, a quarter anywhere in their first steps, a quarter while they start. FULL leaves a random
number of bytes free on a file system of its own, READONLY forbids to write to it; both need Linux, and the right to
mount one (root, or user namespaces). TWO begins a second trainer on the folder, which has to be refused, and kills the
first, and again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch._dynamo  # what a first step imports, once for all lives
import torch.utils.tensorboard

from sparseflash.models import PixelTransformerConfig
from sparseflash.train import DataShard, Stage, TrainConfig, curriculum, recipe, train
from sparseflash.train.checkpoint import checkpoints, load_checkpoint

SAVE_EVERY = 2
KEEP = 2
(_STAGE,) = [stage for stage in recipe("demo").stages[:1] if isinstance(stage, Stage)]
_EASY = _STAGE.geometry
# All that a resume has to put back: two stages, an average of the weights, several parts a step, turned images,
# evaluations.
CONFIG = TrainConfig(
    task="demo",
    model=PixelTransformerConfig(
        pattern="neighborhood({shape}, 1)", unit="tile", order="tile", tile=(4, 4), tokens="lit_tiles",
        block=(64, 64), width=16, heads=1, layers=1, mlp_width=16, dense_classes=3,
    ),
    stages=(Stage(_EASY, baseline=0.5), Stage(replace(_EASY, num_distractors=1), baseline=0.5)),
    schedule_steps=10_000, promote_at=0.6, batch=2, accumulate=2, lr=1e-2, warmup=2, dense_weight=1.0, ema=0.9,
    augment=True, eval_every=3, eval_examples=4,
)  # fmt: skip


@dataclass
class Report:
    """What a campaign saw."""

    lives: int = 0
    steps: int = 0
    lost: int = 0  # steps that were logged and had to be repeated, at most
    remains: int = 0  # deaths that left something half written behind


def campaign(run: Path, whole: Path, deaths: int, end: Callable[[Path, random.Random], None], seed: int) -> Report:
    """Train with interruptions and without, and compare.

    Args:
        run: folder for the run that dies.
        whole: folder for the one that does not.
        deaths: how often.
        end: lets one life begin and end.
        seed: of the moments.

    Raises:
        AssertionError: something was lost, damaged or different.
    """
    torch.set_num_threads(1)  # a fork of a process with threads would wait for those it does not have
    DataShard(CONFIG).take(0, 1)  # fills the generator's caches for all lives
    curriculum.IMAGES = 4  # a running accuracy over so few images that guessing is promoted within steps
    chance, report = random.Random(seed), Report()
    for _ in range(deaths):
        end(run, chance)
        report.lives += 1
        _check(run, 0 if end in (by_int, by_term) else SAVE_EVERY, report)
    report.steps = _logged(run) + 3
    for out in (run, whole):
        assert _code(_begin(out, report.steps)) == DONE, f"the last life of {out.name}"
    last, uninterrupted = (checkpoints(out)[-1] for out in (run, whole))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert (last / name).read_bytes() == (uninterrupted / name).read_bytes(), f"{name} differs"
    assert (run / "steps.jsonl").read_bytes() == (whole / "steps.jsonl").read_bytes(), "losses differ"
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, f"never cleaned up: {left}"
    return report


def by_kill(run: Path, chance: random.Random) -> None:
    status = _signalled(run, chance, signal.SIGKILL)
    assert os.WIFSIGNALED(status), status


def by_int(run: Path, chance: random.Random) -> None:
    assert os.waitstatus_to_exitcode(_signalled(run, chance, signal.SIGINT)) == DONE


def by_term(run: Path, chance: random.Random) -> None:
    status = _signalled(run, chance, signal.SIGTERM)  # before training begins, it ends the process
    assert status == signal.SIGTERM or os.waitstatus_to_exitcode(status) == DONE


def _signalled(run: Path, chance: random.Random, number: signal.Signals) -> int:
    before = _logged(run)
    life = _begin(run, 1_000_000)
    when = chance.random()
    if when < 0.25:
        time.sleep(chance.uniform(0, 0.5))
    else:
        multiple = SAVE_EVERY if when < 0.75 else 1  # a step is logged just before its checkpoint is written
        while (step := _logged(run)) <= before or step % multiple:
            assert os.waitpid(life, os.WNOHANG) == (0, 0), "it ended by itself"
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1 if when < 0.75 else 0.6))
    os.kill(life, number)
    patience = time.monotonic() + 120
    while (ended := os.waitpid(life, os.WNOHANG)) == (0, 0):
        if time.monotonic() > patience:
            os.kill(life, signal.SIGKILL)
            raise AssertionError(f"{number.name} was ignored")
        time.sleep(0.001)
    return ended[1]


def by_full(run: Path, chance: random.Random) -> None:
    ballast, free = run.parent / "ballast", chance.randrange(100_000)
    disk = os.statvfs(run.parent)
    ballast.write_bytes(bytes(disk.f_bavail * disk.f_frsize - free))
    try:
        assert _code(_begin(run, _logged(run) + 5)) in (REFUSED, DONE)
    finally:
        ballast.unlink()


def by_readonly(run: Path, chance: random.Random) -> None:
    disk = run.parent
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    try:
        assert _code(_begin(run, _logged(run) + 5)) == REFUSED
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert _code(_begin(run, _logged(run) + chance.randint(1, 3))) == DONE


def by_two(run: Path, chance: random.Random) -> None:
    lives = {_begin(run, 1_000_000)}
    if chance.random() < 0.5:
        time.sleep(chance.uniform(0, 0.5))
    lives.add(_begin(run, 1_000_000))
    patience = time.monotonic() + 120
    while not (ended := [end for life in lives if (end := os.waitpid(life, os.WNOHANG)) != (0, 0)]):
        assert time.monotonic() < patience, "both train"
        time.sleep(0.001)
    ((life, status),) = ended
    assert os.waitstatus_to_exitcode(status) == IN_USE, f"the second ended with {status}"
    time.sleep(chance.uniform(0, 0.5))
    (first,) = lives - {life}
    assert os.waitpid(first, os.WNOHANG) == (0, 0), "the first ended by itself"
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)


ENDS = {"KILL": by_kill, "INT": by_int, "TERM": by_term, "FULL": by_full, "READONLY": by_readonly, "TWO": by_two}
DONE, REFUSED, WRONG, IN_USE = 0, 3, 4, 5


def _check(run: Path, most: int, report: Report) -> None:
    """Whatever the moment: all checkpoints are whole, and the newest is no older than what was promised."""
    found = [load_checkpoint(path).step for path in checkpoints(run)]
    lost = _logged(run) - (found[-1] if found else 0)
    assert lost <= most, f"{lost} steps were lost, at most {most} were to be"
    report.lost = max(report.lost, lost)
    hidden = run / "checkpoints"
    report.remains += hidden.is_dir() and any(path.name.startswith(".") for path in hidden.iterdir())


def _logged(run: Path) -> int:
    """The last step whose figures stand in the log."""
    log = run / "steps.jsonl"
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _begin(out: Path, steps: int) -> int:
    """A process that trains; its number."""
    ready, begun = os.pipe()
    life = os.fork()
    if life:
        os.close(begun)
        os.read(ready, 1)  # a signal before this is lost: Python forgets, in a new fork, those that have come
        os.close(ready)
        return life
    code = WRONG
    try:
        os.close(begun)
        train(
            CONFIG, out, steps=steps, resume=bool(checkpoints(out)), save_every=SAVE_EVERY, keep=KEEP,
            line=lambda text: None,
        )  # fmt: skip
        code = DONE
    except KeyboardInterrupt:
        code = DONE  # before training began
    except OSError:
        code = REFUSED
    except ValueError as error:
        code = IN_USE if "is in use by process" in str(error) else WRONG
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _code(life: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(life, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=50, help="of each kind")
    parser.add_argument("--by", nargs="+", choices=ENDS, default=["KILL"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in arguments.by:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            disk = Path(folder)
            if name in ("FULL", "READONLY"):
                disk = disk / "disk"
                disk.mkdir()
                subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
            try:
                report = campaign(disk / "run", Path(folder) / "whole", arguments.deaths, ENDS[name], arguments.seed)
            finally:
                if disk != Path(folder):
                    subprocess.run(["umount", disk], check=True)
        print(
            f"{report.lives} deaths by {name}, {report.steps:,} steps: losses, weights and optimizer equal those of an "
            f"uninterrupted run bit for bit; at most {report.lost} logged steps had to be repeated (a checkpoint every "
            f"{SAVE_EVERY}); {report.remains} deaths left something half written; {time.perf_counter() - begun:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
