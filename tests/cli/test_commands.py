"""The command line: what it prints, what it refuses, what it leaves behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from sparseflash import pathfinder
from sparseflash.cli import app
from sparseflash.cli.train import begun_at
from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.pathfinder.workers import WorkerError
from sparseflash.patterns import parse
from sparseflash.tools.bench import Case, Comparison, Figures
from sparseflash.train import recipe
from sparseflash.train.baseline import KNOWN, folder_baseline

TINY = ["--batch", "2", "--layers", "1", "--width", "16", "--heads", "1", "--device", "cpu"]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def refused(*arguments: object) -> str:
    """The message of a command that must fail in plain words."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.stderr


def test_help_teaches_by_examples() -> None:
    assert invoke("--help").exit_code == 0
    for command, example in {
        "show": 'sparseflash show "causal() & local(1024)" --seq-len 65536',
        "bench": 'sparseflash bench --pattern "local(512) | butterfly(unit=128)" --seq-len 8192',
        "train": 'sparseflash train path256 --pattern "local(512) | butterfly(unit=256)" --first-stage last',
        "evaluate": "sparseflash evaluate runs/path256",
        "generate": "sparseflash generate --size 256 --count 1000",
        "doctor": "test each with a small run",
        "demo": "six minutes",
    }.items():
        assert example in " ".join(invoke(command, "--help").stdout.split())
    shared = "torchrun --nproc-per-node 8 -m sparseflash train path256 --context-parallel 4"
    assert shared in " ".join(invoke("train", "--help").stdout.split())


def test_dead_workers_are_told_in_plain_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(*_: object, **__: object) -> None:
        raise WorkerError("worker processes died 3 times before they finished anything")

    monkeypatch.setattr(pathfinder, "write", dies)
    assert "error: worker processes died 3 times" in refused("generate", "--size", 32, "--count", 1, "--out", tmp_path)


def test_bench_measures_us_beside_dense_attention() -> None:
    options = ("--pattern", "local(64)", "--seq-len", 1024, "--heads", 2, "--head-dim", 16, "--runs", 2)
    found = json.loads(invoke("bench", *options, "--backward", "--kv-heads", 1, "--json").stdout)
    assert found["density"] == pytest.approx(22 / 64)
    assert set(found["contenders"]) == {"sparseflash", "sdpa"}
    medians = {name: c["median_ms"] for name, c in found["contenders"].items()}
    assert found["speedup"] == pytest.approx(medians["sdpa"] / medians["sparseflash"])
    assert found["share_of_ideal"] == pytest.approx(found["speedup"] * found["density"])
    assert "forward and backward" in found["verdict"]
    assert set(found) == {
        *("pattern", "seq_len", "batch", "heads", "kv_heads", "head_dim", "dtype", "device", "backward", "block"),
        *("runs", "flex", "density", "token_density", "contenders", "left_out", "speedup", "ideal_speedup"),
        *("share_of_ideal", "verdict"),
    }
    assert set(found["contenders"]["sdpa"]) == {"median_ms", "spread_ms", "first_call_s", "peak_extra_mb"}
    text = " ".join(invoke("bench", *options, "--flex", "--backward").stdout.split())
    assert "FlexAttention, compiled left out: FlexAttention has no backward on a CPU" in text
    assert "dense SDPA" in text


@pytest.mark.parametrize(
    ("density", "ours", "verdict"),
    [
        (0.25, 2.0, "is 2.0 times as fast as dense attention; the mask stores 25.0% of the blocks, which allows 4.0"),
        (0.5, 8.0, "takes 2.0 times as long as dense attention although the mask stores 50.0% of the blocks."),
        (0.0, 1.0, "is 4.0 times as fast as dense attention; the mask stores 0.0% of the blocks."),
    ],
)  # fmt: skip
def test_the_verdict_follows_from_the_figures(density: float, ours: float, verdict: str) -> None:
    case = Case(parse("local(4)"), seq_len=64)
    contenders = {"sparseflash": Figures(ours, 0.0, 0.0, None), "sdpa": Figures(4.0, 0.0, 0.0, 1.0)}
    found = Comparison(case, density, density / 2, contenders, {"flex": "not asked for"})
    assert verdict in found.verdict
    plain = json.loads(json.dumps(found.to_dict()))
    assert (plain["pattern"], plain["dtype"], plain["speedup"]) == ("local(4)", "float32", 4 / ours)
    assert plain["ideal_speedup"] == (1 / density if density else None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--dtype", "int8"), "--dtype must be float16"),
        (("--heads", 3, "--kv-heads", 2), "--heads must be a multiple of --kv-heads, got 3 and 2"),
        (("--kv-heads", 0), "--kv-heads must be at least 1, got 0"),
        (("--runs", 0), "--runs must be at least 1"),
        (("--device", "toaster"), "--device must be cpu, cuda or cuda:N"),
    ],
)
def test_bench_refuses(options: tuple[object, ...], words: str) -> None:
    assert words in refused("bench", "--pattern", "local(4)", "--seq-len", 64, *options)


def test_a_grid_says_how_many_tokens_there_are() -> None:
    grid = "beside(neighborhood((8, 8), 1), before=5)"
    assert "69 queries x 69 keys" in invoke("show", grid).stdout
    found = json.loads(invoke("bench", "--pattern", grid, "--heads", 1, "--head-dim", 8, "--runs", 1, "--json").stdout)
    assert found["seq_len"] == 69
    for command in (("show", "local(3)"), ("bench", "--pattern", "local(3)")):
        assert "local(3) is for any number of tokens; write --seq-len 4096 for 4,096" in refused(*command)


def test_version() -> None:
    from sparseflash import __version__

    assert invoke("--version").stdout.strip() == __version__


def test_show_prints_figures_and_draws(tmp_path: Path) -> None:
    result = invoke("show", "local(512) | butterfly(unit=256)", "--seq-len", 4096, "--out", tmp_path / "m.png")
    assert result.exit_code == 0, result.output
    for words in ("local(512) | butterfly(unit=256)", "32 x 32 blocks", "heaviest rows", "compiled in"):
        assert words in result.stdout
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


def test_show_draws_what_a_token_sees(tmp_path: Path) -> None:
    pattern = parse("beside(axial((8, 8)), before=3)")
    pattern.compile(67).plot(tmp_path / "own.png", title=str(pattern), token=20)
    result = invoke("show", str(pattern), "--seq-len", 67, "--out", tmp_path / "m.png", "--token", 20)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "m.png").read_bytes() == (tmp_path / "own.png").read_bytes()


def test_show_writes_a_page_and_a_window(tmp_path: Path) -> None:
    page, picture = tmp_path / "m.html", tmp_path / "m.png"
    whole = invoke("show", "causal()", "--seq-len", 4096, "--out", picture)
    assert whole.exit_code == 0, whole.output
    all_of_it = picture.read_bytes()
    options = ["--html", page, "--out", picture, "--window", "0:512, 256:768"]
    result = invoke("show", "causal()", "--seq-len", 4096, *options, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["page"], found["picture"]) == (str(page), str(picture))
    assert "<title>causal() - block mask</title>" in page.read_text()
    assert picture.read_bytes() != all_of_it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.html", "m.png"]
    assert str(page) in invoke("show", "causal()", "--seq-len", 4096, "--html", page).stdout


def test_show_tells_the_ideal_speedup() -> None:
    command = ["show", "random_blocks(4)", "--seq-len", 4096]
    assert json.loads(invoke(*command, "--json").stdout)["ideal_speedup"] == 8
    assert "8.0 times dense attention" in invoke(*command).stdout
    nothing = ["show", "causal() - causal()", "--seq-len", 4096]
    assert json.loads(invoke(*nothing, "--json").stdout)["ideal_speedup"] is None
    assert "nothing to compute" in invoke(*nothing).stdout


def test_show_prints_advice_once() -> None:
    wasteful = ["show", "strided(64)", "--seq-len", 8192]
    result = invoke(*wasteful, "--json")
    told = json.loads(result.stdout)["advice"]
    assert "strided(64)" in told
    assert result.stderr == ""
    table = invoke(*wasteful)
    assert table.stderr == ""
    assert told in " ".join(table.stdout.split())
    assert json.loads(invoke("show", "local(64)", "--seq-len", 8192, "--json").stdout)["advice"] is None


def test_show_as_json() -> None:
    result = invoke("show", "causal()", "--seq-len", 1000, "--kv-len", 1280, "--block", "128x64", "--json")
    found = json.loads(result.stdout)
    assert found["shape"] == [1000, 1280]
    assert found["block"] == [128, 64]
    assert found["full_blocks"] + found["partial_blocks"] == found["blocks"]
    assert sum(bin_["rows"] for bin_ in found["row_blocks"]["histogram"]) == found["grid"][0]
    assert found["row_blocks"]["heaviest"][0] == {"mask": 0, "row": 7, "blocks": 20}


def test_show_tells_how_heavy_rows_are_cut() -> None:
    command = ["show", "per_head(local(512), local(512) | global_tokens(64))", "--seq-len", 65536]
    cut = json.loads(invoke(*command, "--json").stdout)["row_blocks"]["cut"]
    assert (cut["longest"], cut["busiest_before"]) == (512, 512)
    assert cut["pieces"] * cut["longest_piece"] >= 512
    assert cut["busiest"] < 60
    told = " ".join(invoke(*command).stdout.split())
    assert f"row of 512 blocks in {cut['pieces']} splits, none over {cut['longest_piece']};" in told
    assert f"walks {cut['busiest']} blocks, not 512" in told
    whole = ["show", "causal()", "--seq-len", 65536]
    assert json.loads(invoke(*whole, "--json").stdout)["row_blocks"]["cut"] is None
    assert "heavy rows cut" not in invoke(*whole).stdout


def test_show_per_head_counts_distinct_masks() -> None:
    result = invoke("show", "per_head(causal(), local(3), causal())", "--seq-len", 512, "--json")
    assert json.loads(result.stdout)["masks"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["local(", "--seq-len", 64], "local("),
        (["lokal(3)", "--seq-len", 64], "no pattern is called 'lokal'"),
        (["local(-1)", "--seq-len", 64], "-1"),
        (["full()", "--seq-len", 0], "--seq-len must be 1 to 1,099,511,627,776 tokens; got 0"),
        (["full()", "--seq-len", 64, "--kv-len", -1], "--kv-len must be 1 to 1,099,511,627,776 tokens; got -1"),
        (["full()", "--seq-len", 64, "--block", "7"], "--block must be of 16, 32, 64, 128, 256 tokens; got '7'"),
        (["full()", "--seq-len", 64, "--block", "big"], "--block must be a number such as 128"),
        (["full()", "--seq-len", 64, "--out", "mask.xyz"], "must end in .png, .svg or .pdf"),
        (["full()", "--seq-len", 64, "--out", "nowhere/mask.png"], "no folder nowhere"),
        (["full()", "--seq-len", 64, "--html", "mask.png"], "--html must end in .html or .htm; got 'mask.png'"),
        (["full()", "--seq-len", 64, "--html", "nowhere/mask.html"], "no folder nowhere"),
        (["full()", "--seq-len", 64, "--window", "0:8,0:8"], "--window says what --out draws"),
        (["full()", "--seq-len", 64, "--token", 3], "--token says what --out draws: give both"),
        (["full()", "--seq-len", 64, "--out", "m.png", "--token", 3], "full() has none"),
        (["axial((8, 8))", "--seq-len", 64, "--out", "m.png", "--token", 64], "token must be 0 to 63"),
        (["full()", "--seq-len", 64, "--out", "m.png", "--window", "0-8"], "such as 0:512,0:512; got '0-8'"),
        (["full()", "--seq-len", 64, "--out", "m.png", "--window", "0:65,0:8"], "queries within 0:64; got 0:65"),
        (["full()", "--seq-len", 64, "--out", "m.png", "--window", "0:8,9:9"], "keys within 0:64; got 9:9"),
    ],
)
def test_show_refuses(arguments: list[object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused("show", *arguments)
    assert not list(tmp_path.iterdir())


def test_train_resume_evaluate(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    first = invoke("train", "demo", "--steps", 1, "--out", run, *TINY)
    assert first.exit_code == 0, first.output
    assert "labels and a dense loss" in first.stderr
    assert "step 1 done" in first.stdout
    second = invoke("train", "demo", "--steps", 2, "--out", run, "--resume", "--device", "cpu")
    assert second.exit_code == 0, second.output
    whole = invoke("train", "demo", "--steps", 2, "--out", tmp_path / "whole", *TINY)
    assert whole.exit_code == 0
    assert (run / "steps.jsonl").read_text() == (tmp_path / "whole" / "steps.jsonl").read_text()
    assert list((run / "tensorboard").iterdir())

    made = invoke("generate", "--task", "demo", "--count", 5, "--out", data, "--workers", 1)
    assert made.exit_code == 0, made.output
    assert "5 images written" in made.stdout
    folder = data / "pathfinder24" / "curv_contour_length_2"
    scored = invoke("evaluate", run, "--data", folder, "--device", "cpu", "--json")
    assert scored.exit_code == 0, scored.output
    found = json.loads(scored.stdout)
    assert found["count"] == 5
    assert found["accuracy"] == found["right"] / 5
    assert 0.4 < found["marker_distance_baseline"] < 0.6
    told = invoke("evaluate", run, "--data", folder, "--device", "cpu", "--limit", 3)
    assert "of 3 examples (95 % interval" in told.stdout
    assert "marker-distance baseline" in told.stdout


def test_a_preset_trains_within_its_minutes_and_is_examined_on_the_fixed_set(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = ["train", "path256", "--preset", "path256-cpu", "--out", run, "--layers", 1, "--batch", 2]
    start += ["--data", "fresh", "--pattern", "neighborhood({shape}, 16, {order})"]
    first = invoke(*start, "--minutes", 1e-9, "--pictures", "--device", "cpu")
    assert first.exit_code == 0, first.output
    assert "path256, stage 1 of 13 (65,536 tokens in the last): 2,304 tokens, the lit ones" in first.stderr
    assert "the lit ones, through neighborhood({shape}, 16, {order})" in first.stderr
    assert "the distance between the discs alone gives 52.3%" in first.stderr
    assert "time is up after step 1, in stage 1 of 13 (48 px, 2 dashes)" in first.stdout
    assert "52.3% by the distance between the discs alone" in first.stdout
    assert len(list((run / "pictures").iterdir())) == 2
    second = invoke("train", "path256", "--out", run, "--resume", "--steps", 2, "--device", "cpu")
    assert second.exit_code == 0, second.output

    ask = ["--device", "cpu", "--limit", 6, "--json"]
    found = json.loads(invoke("evaluate", run, *ask).stdout)
    assert (found["data"], found["split"], found["count"]) == ("path256: 48 px, 2 dashes", "test", 6)
    assert found["marker_distance_baseline"] == 0.523
    # The same figure from the weights alone.
    (weights,) = run.glob("checkpoints/step-00000002")
    alone = tmp_path / "weights"
    PixelTransformer.from_pretrained(weights).save_pretrained(alone)
    again = json.loads(invoke("evaluate", alone, "--task", "path256", "--stage", 1, *ask).stdout)
    assert found["right"] == json.loads(invoke("evaluate", run, "--workers", 1, *ask).stdout)["right"]
    assert again["data"] == "path256: 48 px, 2 dashes"
    assert (again["views"], again["right_in_one_view"]) == (1, None)
    seen = json.loads(invoke("evaluate", run, "--views", 2, *ask).stdout)
    assert (seen["views"], seen["right_in_one_view"]) == (2, found["right"])
    assert "in one view" in invoke("evaluate", run, "--views", 2, *ask[:-1]).stdout
    last = json.loads(invoke("evaluate", alone, "--task", "path256", "--device", "cpu", "--limit", 1, "--json").stdout)
    assert (last["data"], last["marker_distance_baseline"]) == ("path256: 256 px, 14 dashes", KNOWN[256, "hard"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name their --task, or images by --folder"),
        (["--task", "path512"], "path512"),
        (["--task", "path256", "--stage", 99], "--stage must be at most 11"),
        (["--task", "path256", "--split", "train"], "--split must be test or val; got 'train'"),
        (["--task", "path256", "--size", 64], "--level and --size are for images in --folder"),
        (["--task", "path256", "--data", "."], "leave them out with --folder"),
        (["--task", "path256", "--limit", 20_001], "the test set has 20,000 examples"),
        (["--task", "path256", "--workers", -1], "--workers must be at least 0"),
        (["--task", "path256", "--views", 9], "--views must be 1 to 8; got 9"),
    ],
)
def test_evaluate_refuses_sets_that_are_none(arguments: list[object], words: str, model: Path) -> None:
    assert words in refused("evaluate", model, "--device", "cpu", *arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["path512"], "TASK must be one of"),
        (["demo", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["demo", "--workers", "-1"], "--workers must be at least 0; got -1"),
        (["demo", "--save-every", "0"], "--save-every must be at least 1; got 0"),
        (["demo", "--width", "30"], "got --width 30 and --heads 1"),
        (["demo", "--tokens", "lit_pixels"], "lit pixels see what a neighborhood"),
        (["demo", "--steps", "-5"], "-5"),
        (["demo", "--device", "cuda:99"], "device 'cuda:99' is not here"),
        (["demo", "--device", "toaster"], "device must be cpu, cuda or cuda:N; got 'toaster'"),
        (["demo", "--device", "meta"], "got 'meta'"),
        (["demo", "--pattern", "local(5"], "local(5"),
        (["demo", "--lr", "nan"], "lr must be a positive number"),
        (["demo", "--order", "spiral"], "spiral"),
        (["demo", "--resume"], "no folder"),
        (["demo", "--precision", "fp4"], "fp4"),
        (["demo", "--minutes", "0"], "minutes must be a positive number; got 0.0"),
        (["demo", "--preset", "path257"], "preset must be one of"),
        (["demo", "--preset", "pathx-lit"], "is for the task pathx; got 'demo'"),
        (["demo", "--preset", "mine.toml"], "no file mine.toml"),
        (["demo", "--data", "old"], "--draw must be fixed or fresh; got 'old'. Files are named by --folder"),
        (["demo", "--tokens", "lit_tiles"], "need unit"),
        (["demo", "--context-parallel", "2"], "one process does not divide into groups of 2; start a multiple of 2"),
        (["demo", "--context-parallel", "0"], "--context-parallel must be at least 1; got 0"),
    ],
)
def test_train_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    if "--device" not in arguments:
        arguments = [*arguments, "--device", "cpu"]
    assert words in refused("train", *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_recipe(tmp_path: Path) -> None:
    assert invoke("train", "demo", "--steps", 1, "--out", tmp_path, *TINY).exit_code == 0
    assert "already holds a run" in refused("train", "demo", "--steps", 2, "--out", tmp_path, *TINY)
    again = ["--steps", 2, "--out", tmp_path, "--resume", "--device", "cpu"]
    assert "started with --lr 0.004; got 0.1" in refused("train", "demo", "--lr", 0.1, *again)
    assert "started with TASK demo; got path32" in refused("train", "path32", *again)
    assert "started with --pattern local(112); got full()" in refused("train", "demo", "--pattern", "full()", *again)
    assert invoke("train", "demo", "--pattern", "local( 112 )", *again).exit_code == 0


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = PixelTransformerConfig(pattern="local(32)", block=(32, 32), width=16, layers=1, mlp_width=16)
    PixelTransformer(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate_takes_a_saved_model_and_knows_the_lra_baseline(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = invoke("generate", "--size", 32, "--count", 2, "--out", data, "--workers", 1)
    assert made.exit_code == 0, made.output
    result = invoke("evaluate", model, "--data", data, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["count"] == 2
    assert found["marker_distance_baseline"] == KNOWN[32, "hard"]


def test_evaluate_refuses_bad_data(model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    ask = ["evaluate", model, "--device", "cpu", "--data"]
    assert "empty" in refused(*ask, empty)
    assert "nowhere" in refused(*ask, tmp_path / "nowhere")
    invoke("generate", "--task", "demo", "--count", 3, "--out", tmp_path / "data", "--workers", 1)
    folder = tmp_path / "data" / "pathfinder24" / "curv_contour_length_2"
    assert "--limit must be at least 1; got 0" in refused(*ask, folder, "--limit", 0)
    assert "--split must be all, s4 or contiguous; got 'mine'" in refused(*ask, folder, "--split", "mine")
    image = folder / "imgs" / "0" / "sample_1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-20])
    assert "1 of 3 images damaged" in refused(*ask, folder)
    image.unlink()
    message = refused(*ask, folder)
    assert "1 of 3 images missing" in message
    assert "sample_1.png" in message


def test_evaluate_notes_what_the_reader_drops(model: Path, tmp_path: Path) -> None:
    invoke("generate", "--task", "demo", "--count", 3, "--out", tmp_path / "data", "--workers", 1)
    folder = tmp_path / "data" / "pathfinder24" / "curv_contour_length_2"
    (folder / "imgs" / "0" / "sample_0.png").write_bytes(b"")
    result = invoke("evaluate", model, "--data", folder, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["count"] == 2
    assert "note:" in result.stderr
    assert "dropped 1 empty image" in result.stderr


def test_evaluate_refuses_bad_checkpoints(model: Path, tmp_path: Path) -> None:
    assert "no folder" in refused("evaluate", tmp_path / "nowhere", "--data", tmp_path)
    assert "neither a checkpoint nor a run" in refused("evaluate", tmp_path, "--data", tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "truncated or foreign" in refused("evaluate", model, "--data", tmp_path)
    weights.write_bytes(b"\x80\x04\x95pickle")
    assert "truncated or foreign" in refused("evaluate", model, "--data", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", 1], "name either --size (32, 64, 128 or 256, or any from 28 to 2048) or --task"),
        (["--count", 1, "--size", 32, "--task", "demo"], "and not both"),
        (["--count", 0, "--size", 32], "0"),
        (["--count", 1, "--size", 27], "--size must be 28 to 2,048; got 27"),
        (["--count", 1, "--size", 2049], "got 2049"),
        (["--count", 1, "--task", "text"], "--task must be listops, or a task over pixels; got 'text'"),
        (["--count", 0, "--task", "listops"], "--count must be 1 to 96,000 training trees; got 0"),
        (["--count", 1, "--size", 32, "--level", "brutal"], "brutal"),
        (["--count", 1, "--size", 32, "--seed", -1], "-1"),
        (["--count", 1, "--size", 32, "--workers", 0], "0"),
        (["--count", 1, "--task", "path1"], "path1"),
    ],
)
def test_generate_refuses(arguments: list[object], words: str, tmp_path: Path) -> None:
    assert words in refused("generate", *arguments, "--out", tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("size", [28, 48, 300])
def test_generate_makes_canvases_between_the_published_ones(size: int, model: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    made = invoke("generate", "--size", size, "--count", 3, "--out", data, "--workers", 1)
    assert made.exit_code == 0, made.output
    dataset = pathfinder.read(data)
    assert (dataset.size, len(dataset)) == (size, 3)
    base = max(side for side in (32, 64, 128, 256) if side <= max(size, 32))
    sized, published = pathfinder.Geometry.sized(size, "hard"), pathfinder.Geometry.lra(base, "hard")
    for name in ("paddle_length", "paddle_margins", "paddle_thickness", "continuity", "marker_radius"):
        assert getattr(sized, name) == getattr(published, name)
    assert sized.contour_length == published.contour_length
    if size == 48:
        found = json.loads(invoke("evaluate", model, "--data", data, "--device", "cpu", "--json").stdout)
        assert found["count"] == 3


def test_published_sizes_are_the_published_geometries() -> None:
    for size, level in itertools.product((32, 64, 128, 256), ("easy", "intermediate", "hard")):
        assert pathfinder.Geometry.sized(size, level) == pathfinder.Geometry.lra(size, level)
    with pytest.raises(ValueError, match="level must be one of"):
        pathfinder.Geometry.sized(48, "brutal")


def test_baselines_are_those_of_the_images(tmp_path: Path) -> None:
    released = tmp_path / "pathfinder256" / "curv_contour_length_14"
    released.mkdir(parents=True)
    assert folder_baseline(released) == pytest.approx(0.63, abs=0.03)
    assert folder_baseline(tmp_path) is None


def test_doctor_tells_what_works() -> None:
    found = json.loads(invoke("doctor", "--json").stdout)
    assert list(found) == ["versions", "machine", "backends", "cpu_kernel"]
    assert list(found["machine"]) == ["system", "cores", "torch_threads", "gpus"]
    assert set(found["backends"]["cpu"]) == {"works", "tried", "largest_error"}
    assert found["backends"]["cpu"]["works"]
    assert found["versions"]["torch"]
    told = invoke("doctor").stdout
    assert "backend cpu" in told
    assert "works" in told


def test_demo_does_not_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "must be a folder" in refused("demo", "--out", file)
    assert "--seed must be at least 0; got -1" in refused("demo", "--out", tmp_path / "new", "--seed", -1)
    assert not (tmp_path / "new").exists()
    taken = tmp_path / "taken"
    (taken / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert "is not the demo's" in refused("demo", "--out", taken)
    assert [path.name for path in taken.iterdir()] == ["run"]


@pytest.mark.tier2
def test_the_quick_demo_shows_every_part(tmp_path: Path) -> None:
    out = tmp_path / "tour [1]"
    command = [sys.executable, "-m", "sparseflash", "demo", "--quick", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("1. A mask", "2. Attention", "3. Learning", "4. The real thing", "Done", "s in all"):
        assert part in done.stdout
    told = " ".join(done.stdout.split())
    assert f"In {out}/ you find" in told
    # What part 3 says of itself: how much was run, and neither goal reached nor missed.
    assert "A quick run: 1,200 images instead of 8,000" in told
    assert "Goal" not in told
    for picture in ("mask-65536.png", "pathfinder.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    for run, tokens in (("run", 576), ("run-65536", 65_536)):
        (checkpoint,) = (out / run / "checkpoints").iterdir()
        model = PixelTransformer.from_pretrained(checkpoint)
        assert model.masks((int(tokens**0.5),) * 2)[0].shape == (tokens, tokens)
        assert list((out / run / "tensorboard").iterdir())


def test_control_c_in_a_real_process_saves_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sparseflash", "train", "demo", "--out", str(run), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        for _ in range(6000):
            if (run / "steps.jsonl").exists() and (run / "steps.jsonl").read_text().count("\n") >= 2:
                break
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped after step" in out
    assert f"go on with: sparseflash train demo --out {run} --resume" in out
    assert "Traceback" not in err
    assert list((run / "checkpoints").iterdir())


def test_the_path256_command_of_the_presets_page_is_a_recipe_for_65536_tokens() -> None:
    page = (Path(__file__).parent.parent.parent / "docs/presets.md").read_text()
    line = 'sparseflash train path256 --pattern "local(512) | butterfly(unit=256)" --first-stage last --steps 100'
    assert line in page
    config = begun_at("last", recipe("path256", pattern="local(512) | butterfly(unit=256)"))
    assert [stage.tokens_each for stage in config.stages] == [65_536]
    model = PixelTransformer(config.pixel_model)
    (mask, *_) = model.masks((256, 256))
    assert mask.shape == (65_536, 65_536)
    assert mask.density < 0.05
