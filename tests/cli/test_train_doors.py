"""How people get into training and back into it: folders, --resume auto, stages by number, the best checkpoint."""

import json
import shutil
from pathlib import Path

import pytest

from sparseflash.cli.resuming import with_value
from sparseflash.cli.train import describe
from sparseflash.train import load_preset, recipe
from sparseflash.train.checkpoint import checkpoints, load_checkpoint
from tests.cli.test_commands import TINY, invoke, refused
from tests.lra.test_lra_files import papers, reviews

CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("release")
    for level, count in (("hard", 40), ("easy", 20)):
        made = invoke("generate", "--size", 32, "--count", count, "--level", level, "--out", out, "--workers", 1)
        assert made.exit_code == 0, made.output
    return out


def done(*arguments: object) -> str:
    """The whole output of a command that must work."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_training_on_the_release_is_examined_on_its_test_part(release: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    told = done("train", "path32", "--folder", release, "--steps", 4, "--eval-every", 2, "--out", run, *TINY)
    assert "path32: 1,024 tokens through neighborhood({shape}, 2)" in told
    assert f"fixed images from files (32 px, hard, s4 split of {release})" in told
    assert "validation examples, the best" in told
    assert f"sparseflash evaluate {run / 'best'}" in told
    assert "so give their folder by --folder" in refused("evaluate", run, *CPU)
    named = json.loads(invoke("evaluate", run, "--folder", release, "--json", *CPU).stdout)
    s4 = json.loads(invoke("evaluate", run, "--data", release, "--split", "s4", "--json", *CPU).stdout)
    assert named["right"] == s4["right"]
    assert (named["count"], named["split"], s4["count"]) == (4, "test", 4)
    val = json.loads(invoke("evaluate", run / "best", "--folder", release, "--split", "val", "--json", *CPU).stdout)
    assert val["accuracy"] == load_checkpoint(run / "best").progress.best
    everything = invoke("evaluate", run, "--folder", release, "--split", "all", *CPU)
    assert "was trained on most of these images: on the s4 split" in everything.stderr
    easy = invoke("evaluate", run, "--folder", release, "--level", "easy", "--json", *CPU)
    assert (json.loads(easy.stdout)["count"], json.loads(easy.stdout)["split"]) == (20, "all")
    assert "trained on" not in easy.stderr
    fixed_set = ["evaluate", run, "--task", "path32"]
    assert "--split must be test or val; got 'all'" in refused(*fixed_set, "--split", "all", *CPU)
    fixed = json.loads(invoke("evaluate", run, "--task", "path32", "--limit", 2, "--json", *CPU).stdout)
    assert fixed["data"] == "path32: 32 px, 14 dashes"


def test_level_and_split_are_kept(release: Path, tmp_path: Path) -> None:
    start = ["train", "path32", "--folder", release, "--level", "easy", "--out", tmp_path / "run", *TINY]
    assert "easy, contiguous split of" in done(*start, "--steps", 1)
    again = ["train", "path32", "--folder", release, "--out", tmp_path / "run", "--resume", "--steps", 2, *CPU]
    message = refused(*again, "--level", "hard")
    assert "started with --level curv_baseline; got curv_contour_length_14" in message
    assert "started with --split contiguous; got s4" in refused(*again, "--split", "s4")
    done(*again, "--level", "easy", "--split", "contiguous")
    assert "the s4 split is of the hard level alone" in refused(
        *start[:-8], "--split", "s4", "--out", tmp_path / "other", *TINY
    )


@pytest.mark.parametrize(("task", "make"), [("text", reviews), ("retrieval", papers), ("path32", None)])
def test_a_run_moves_with_its_files(release: Path, tmp_path: Path, task: str, make: object) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    if callable(make):
        make(data)
    else:
        shutil.copytree(release, data, dirs_exist_ok=True)
    done("train", task, "--folder", data, "--steps", 1, "--out", run, *TINY)
    data.rename(tmp_path / "moved")
    again = ["train", task, "--out", run, "--resume", *CPU]
    gone = f"no longer in {data}: give their folder by --folder"
    assert gone in refused(*again, "--steps", 2)
    assert gone in refused("evaluate", run, *CPU)
    assert f"no folder {tmp_path / 'nowhere'}" in refused(*again, "--steps", 2, "--folder", tmp_path / "nowhere")
    assert "step 2 done" in done(*again, "--steps", 2, "--folder", tmp_path / "moved")
    again += ["--folder", tmp_path / "moved"]
    assert "step 3 done" in done(*again, "--steps", 3)
    assert "error" not in done("evaluate", run, "--folder", tmp_path / "moved", *CPU)
    kind = {"text": "*.txt", "retrieval": "*.tsv", "path32": "curv_contour_length_14/imgs/0/*.png"}[task]
    file = next((tmp_path / "moved").rglob(kind))
    content = file.read_bytes()
    file.write_bytes(content + (content if task == "retrieval" else b" "))
    if task == "path32":  # bytes behind the end of a PNG
        assert "1 of 40 images damaged" in refused(*again, "--steps", 4)
    else:
        assert "does not hold the files that the run began with" in refused(*again, "--steps", 4)
        other = invoke("evaluate", run, "--folder", tmp_path / "moved", *CPU)
        assert other.exit_code == 0, other.output
        assert "does not hold the files that the model was trained on" in other.stderr
    assert load_checkpoint(run).step == 3


def test_drawn_runs_have_no_folder(tmp_path: Path) -> None:
    done("train", "demo", "--steps", 1, "--out", tmp_path / "run", *TINY)
    again = ["train", "demo", "--steps", 2, "--out", tmp_path / "run", "--resume", "--folder", tmp_path]
    assert "the examples of this run are drawn, it has no folder" in refused(*again, *CPU)


def test_one_line_begins_a_run_and_goes_on_with_it(tmp_path: Path) -> None:
    line = ["train", "demo", "--resume", "auto", "--out", tmp_path / "queue", *TINY]
    assert "step 1 done" in done(*line, "--steps", 1)
    assert "step 2 done" in done(*line, "--steps", 2)
    assert "step 2 done" in done(*line, "--steps", 2)
    done("train", "demo", "--out", tmp_path / "whole", "--steps", 2, *TINY)
    assert (tmp_path / "queue" / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()
    assert "started with --batch 2; got 3" in refused(*line, "--steps", 3, "--batch", 3)
    assert "--resume stands alone, or with auto; got 'never'" in refused("train", "demo", "--resume=never", *CPU)
    assert "no folder" in refused("train", "demo", "--resume", "--out", tmp_path / "none", *CPU)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["demo"], ["demo"]),
        (["demo", "--resume"], ["demo", "--resume=latest"]),
        (["--resume", "auto", "demo"], ["--resume=auto", "demo"]),
        (["--resume", "demo"], ["--resume=latest", "demo"]),
        (["--resume=auto", "auto"], ["--resume=auto", "auto"]),
        (["auto", "--out", "auto"], ["auto", "--out", "auto"]),
    ],
)
def test_the_value_of_resume_may_be_left_out(arguments: list[str], found: list[str]) -> None:
    assert with_value(arguments) == found


def test_evaluations_may_be_asked_for_later_and_end_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done("train", "demo", "--steps", 1, "--out", run, *TINY)
    again = ["train", "demo", "--out", run, "--resume", *CPU]
    asked = ["--eval-every", 1, "--eval-examples", 4, "--patience", 1, "--steps", 50]
    told = done(*again, *asked)
    assert "stopped early after step" in told
    assert "1 evaluations without a better one" in told
    assert "started with --eval-examples 4; got 5" in refused(*again, "--eval-examples", 5)
    message = refused("train", "demo", "--patience", 2, "--out", tmp_path / "other", *TINY)
    assert "patience counts evaluations: give --eval-every too" in message
    assert len(checkpoints(run / "best")) == 1


def test_train_says_the_tokens_of_the_stage_that_it_begins_with(tmp_path: Path) -> None:
    config = load_preset("path256").config
    assert describe(config, "cpu").startswith(
        "path256, stage 1 of 11 (65,536 tokens in the last): 2,304 tokens through"
    )
    assert describe(config, "cpu", 10).startswith("path256: 65,536 tokens through")
    lit = load_preset("path256-lit").config
    assert "tokens, those of lit tiles, through" in describe(lit, "cpu")


def test_the_first_stage_is_counted_from_one_or_is_the_last(tmp_path: Path) -> None:
    start = ["train", "path32", *TINY, "--steps", 1]
    for given in ("0", "11", "end"):
        message = refused(*start, "--first-stage", given, "--out", tmp_path / "none")
        assert f"--first-stage must be 1 to 10, or last; got '{given}'" in message
    assert not (tmp_path / "none").exists()
    assert "stage 10 of 10: 32 px" in done(*start, "--first-stage", 10, "--out", tmp_path / "ten")
    assert json.loads((tmp_path / "ten" / "steps.jsonl").read_text())["stage"] == 10
    last = done(*start, "--first-stage", "last", "--out", tmp_path / "last")
    assert "path32: 1,024 tokens" in last
    assert "in stage 1 of 1 (32 px, 14 dashes)" in last
    assert load_checkpoint(tmp_path / "last").config.stages == recipe("path32").stages[-1:]
    again = ["train", "path32", "--resume", "--steps", 2, *CPU, "--first-stage"]
    done(*again, "last", "--out", tmp_path / "last")
    assert "started with --first-stage 10; got 3" in refused(*again, 3, "--out", tmp_path / "ten")
    done(*again, 10, "--out", tmp_path / "ten")


def test_files_and_draws_have_names_of_their_own(tmp_path: Path) -> None:
    out = ["--steps", 1, "--out", tmp_path / "run", *TINY]
    done("train", "demo", "--draw", "fixed", *out)
    again = ["train", "demo", "--resume", *out]
    done(*again, "--data", "fixed")  # the name it had
    assert "started with --draw fixed; got fresh" in refused(*again, "--draw", "fresh")
    assert "--draw must be fixed or fresh; got 'lra_release'. Files are named by --folder" in refused(
        "train", "path32", "--data", "lra_release", *CPU
    )
