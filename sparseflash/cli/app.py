"""Names, arguments and help of the commands; what they do is in the module of each."""

from pathlib import Path
from typing import Annotated

import typer

from sparseflash.cli.errors import block_size, plain_errors
from sparseflash.cli.help import Command, Group, grouped
from sparseflash.cli.resuming import ResumingCommand

app = typer.Typer(
    name="sparseflash",
    help="Block-sparse attention: draw a pattern, train with it, measure the result.",
    no_args_is_help=True,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...  Default: a GPU if there is one.")]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Your own code that registers patterns: a module or a .py file. Can be repeated.",
    ),
]

TRAIN = {
    "Recipe": "--preset --list-presets --print-config",
    "Data": "--folder --level --split --draw --workers --seed",
    "Model": "--pattern --import --layers --width --heads --order --block --tokens --key-gate --init",
    "Optimisation": "--batch --accumulate --lr --schedule-steps --ema --dense-weight --first-stage --precision "
    "--save-memory",
    "Run": "--out --resume --steps --minutes --device --save-every --keep --pictures",
    "Validation": "--eval-every --eval-examples --patience",
    "Several processes": "--context-parallel",
}


def main() -> None:
    """Run the command line."""
    app()


def _list_presets(wanted: bool) -> None:
    if wanted:
        from sparseflash.cli.presets import show

        show()
        raise typer.Exit


def _version(wanted: bool) -> None:
    if wanted:
        from sparseflash import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(cls=Command)
@plain_errors
def show(
    expression: Annotated[str, typer.Argument(metavar="EXPR", help="A pattern, in quotes.", show_default=False)],
    seq_len: Annotated[int, typer.Option(help="Number of query tokens, and of key tokens.")],
    kv_len: Annotated[int | None, typer.Option(help="Number of key tokens, if different.")] = None,
    block: Annotated[str, typer.Option(help="Block size in tokens: 128, or 128x64 for queries x keys.")] = "128",
    out: Annotated[Path | None, typer.Option(help="Draw the mask into this file (.png, .svg, .pdf).")] = None,
    window: Annotated[
        str | None, typer.Option(metavar="Q0:Q1,K0:K1", help="Draw only these queries and keys, counted from 0.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a zoomable page for any browser into this file (.html).")
    ] = None,
    imports: Imports = None,
    json: Json = False,
) -> None:
    """Show the cost of a pattern: blocks, densities, tiles, distribution over rows, compile time; and draw it.

    Patterns: full() causal() local(window) dilated(window, dilation) strided(stride, unit) fixed(stride, summary, unit)
    butterfly(unit, max_stride) global_tokens(n or list) random_blocks(per_row, unit, seed) documents(lengths) prefix(n)
    log_sparse() star() streaming(sinks, window) axial((H, W), order) neighborhood((H, W), radius, order) bigbird()
    longformer(window) and other presets; per_head(p, q, ...), per_sample(p, q, ...); joined by | & - ~ and parentheses.

    [bold]Examples[/bold]

        sparseflash show "causal() & local(1024)" --seq-len 65536

        sparseflash show "local(512) | butterfly(unit=256)" --seq-len 65536 --block 128 --out mask.png

        sparseflash show "causal() & local(1024)" --seq-len 65536 --out corner.png --window 0:2048,0:2048

        sparseflash show "causal() & (local(1024) | butterfly())" --seq-len 1048576 --html mask.html

        sparseflash show "knights_move() & causal()" --seq-len 64 --import mine.py
    """
    from sparseflash.cli.show import run

    run(expression, seq_len, kv_len, block, out, html, window, imports or [], json)


@app.command(cls=Command)
@plain_errors
def bench(
    pattern: Annotated[str, typer.Option(help="A pattern, in quotes; see show.", show_default=False)],
    seq_len: Annotated[int, typer.Option(help="Number of query tokens, and of key tokens.")],
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key heads, for grouped queries. Default: as many as query heads.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="Time the backward pass too.")] = False,
    block: Annotated[str, typer.Option(help="Block size in tokens: 128, or 128x64 for queries x keys.")] = "128",
    runs: Annotated[int, typer.Option(help="Timed runs of each; the median is reported.")] = 5,
    flex: Annotated[bool, typer.Option("--flex", help="Compile and time FlexAttention too.")] = False,
    imports: Imports = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure the speed-up of a mask on this machine over dense SDPA (and FlexAttention), interleaved in one process.

    [bold]Examples[/bold]

        sparseflash bench --pattern "local(512) | butterfly(unit=128)" --seq-len 8192

        sparseflash bench --pattern "causal() & local(1024)" --seq-len 16384 --dtype bfloat16 --backward --json
    """
    from sparseflash.cli.bench import run

    run(
        pattern, dtype, device, imports or [], json, seq_len=seq_len, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, backward=backward, block=block_size(block), runs=runs, flex=flex,
    )  # fmt: skip


@app.command(cls=grouped(TRAIN, ResumingCommand))
@plain_errors
def train(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="path32, path64, pathx, path256, listops, text, retrieval, image or demo."),
    ],
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A preset such as path256-lit, or a .toml file.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Attention pattern, in quotes; may use {shape} and {order}. Default: the preset's."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Stop after this many steps in total. Default: the schedule's.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Save and stop after this many minutes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/PRESET.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto]",
            help="Resume from the latest checkpoint in the run folder; with auto: start if there is none.",
        ),
    ] = None,
    device: Device = None,
    batch: Annotated[
        int | None, typer.Option(help="Examples per forward pass. Default: the preset's for the device.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forward passes per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    schedule_steps: Annotated[
        int | None, typer.Option(help="Steps of the last stage, over which the learning rate decays.")
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            "--draw", "--data", help="fixed: epochs over the training set; fresh: an endless stream of examples."
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="The files to train on: the Long Range Arena release, or the files of text, retrieval, image or "
            "listops. Default: images and listops are generated. With --resume: where the run's files are now."
        ),
    ] = None,
    level: Annotated[
        str | None,
        typer.Option(help="For images in --folder: easy, intermediate or hard. Default: hard, or the folder's level."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="For images in --folder: s4 (hard only) or contiguous. Default: s4 if it is defined."),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations on the validation part; the best checkpoint is kept in OUT/best."),
    ] = None,
    eval_examples: Annotated[int | None, typer.Option(help="Number of validation examples. Default: 1000.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after this many evaluations without improvement.")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of the moving average of the weights; 0: none.")] = None,
    dense_weight: Annotated[float | None, typer.Option(help="Weight of the dense loss; 0: labels only.")] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Start from the weights of this run, checkpoint or saved model, of the same shape or with fewer "
            "layers; copies fill the layers that --layers adds."
        ),
    ] = None,
    first_stage: Annotated[
        str | None,
        typer.Option(metavar="N", help="Start at this stage, from 1; last: the task itself, without a curriculum."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and images.")] = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    order: Annotated[str | None, typer.Option(help="Token order: raster, tile, morton or hilbert.")] = None,
    block: Annotated[str | None, typer.Option(help="Block size in tokens: 128, or 128x64.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Which pixels are tokens: all, lit_tiles or lit_pixels.")] = None,
    key_gate: Annotated[
        bool | None,
        typer.Option(
            help="Learn how much keys of each grey value are seen. Default: with --tokens all, where the preset has "
            "lit pixels; weights of lit pixels then begin by leaving the dark ones out.",
        ),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: the preset's; fp32 on a CPU.")] = None,
    save_memory: Annotated[
        bool | None,
        typer.Option("--save-memory", help="Recompute activations in the backward pass.", show_default=False),
    ] = None,
    context_parallel: Annotated[
        int, typer.Option(help="Processes that share the tokens of each image, under torchrun; see below.")
    ] = 1,
    workers: Annotated[
        int | None, typer.Option(help="Processes that generate images ahead. Default: 0 on a CPU.")
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    keep: Annotated[int, typer.Option(help="Number of checkpoints to keep.")] = 3,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Draw mistakes and attention at the end of each stage.")
    ] = False,
    imports: Imports = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the complete recipe as a preset and exit; nothing is written.")
    ] = False,
    list_presets: Annotated[
        bool,
        typer.Option("--list-presets", callback=_list_presets, is_eager=True, help="List the presets and exit."),
    ] = False,
) -> None:
    """Train a transformer over pixels or bytes, one token each, with attention through a pattern.

    Pathfinder images are generated on the fly, and contours grow as the model learns; with --folder the images are
    those of the Long Range Arena release. The other tasks are those of the Arena. A preset sets every option that you
    leave out: --print-config shows all of them. Ctrl-C saves and stops; --resume continues, on a CPU with the same
    losses bit for bit.

    Several processes, started by torchrun, share the images of a step. With --context-parallel N, groups of N also
    share the tokens of each image: of 8 processes with N = 4, two groups draw images of their own, and each process
    computes and stores a quarter of an image. N must divide the number of processes, and every pixel must be a token
    (--tokens all). --resume accepts any other N and number of groups that divides a step's batches; losses agree up to
    rounding.

    [bold]Examples[/bold]

        sparseflash train demo --out runs/first

        sparseflash train path256 --pattern "local(512) | butterfly(unit=256)" --first-stage last --steps 100

        sparseflash train path256 --preset path256-lit --resume auto --minutes 25

        sparseflash train pathx --folder lra_release --eval-every 500 --patience 10

        sparseflash train path256 --out runs/path256-lit --resume --minutes 25

        sparseflash train path256 --preset path256-lit --lr 2e-3 --print-config > mine.toml

        sparseflash train listops --preset listops-short

        sparseflash train text --folder aclImdb --pattern "local(256) | global_tokens(16)"

        torchrun --nproc-per-node 4 -m sparseflash train path256

        torchrun --nproc-per-node 8 -m sparseflash train path256 --context-parallel 4
    """
    from sparseflash.cli.train import run

    options = {
        "pattern": pattern,
        "batch": batch,
        "accumulate": accumulate,
        "lr": lr,
        "schedule_steps": schedule_steps,
        "dense_weight": dense_weight,
        "init": None if init is None else str(init),
        "seed": seed,
        "layers": layers,
        "width": width,
        "heads": heads,
        "order": order,
        "tokens": tokens,
        "key_gate": key_gate,
        "data": draw,
        "level": level,
        "split": split,
        "eval_every": eval_every,
        "eval_examples": eval_examples,
        "patience": patience,
        "ema": ema,
        "block": block,
        "precision": precision,
        "activation_checkpointing": save_memory,
        "imports": tuple(imports) if imports else None,
    }
    run(
        task, preset, out, steps, minutes, resume, device, folder, first_stage, options, context_parallel,
        workers, save_every, keep, pictures, print_config,
    )  # fmt: skip


@app.command(cls=Command)
@plain_errors
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a saved model.")],
    folder: Annotated[
        Path | None,
        typer.Option(
            "--folder",
            "--data",
            help="Files: images in the layout of the Long Range Arena release, or the files of another task. "
            "Default: the fixed test set, or the files that the run was trained on.",
        ),
    ] = None,
    level: Annotated[
        str | None, typer.Option(help="easy, intermediate or hard. Default: hard, or the folder's level.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Which pathfinder{SIZE} folder, if there are several.")] = None,
    split: Annotated[
        str | None,
        typer.Option(help="test or val. For images in --folder: all, or the test part of the split s4 or contiguous."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="The task whose fixed set to use. Default: the task of the checkpoint.")
    ] = None,
    stage: Annotated[
        int | None,
        typer.Option(help="The stage whose fixed set to use, from 1. Default: the run's own, otherwise the last."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="all, lit_tiles or lit_pixels. Default: as trained. all: weights of lit pixels get a key gate that "
            "shuts out the dark ones, and answer as before."
        ),
    ] = None,
    key_gate: Annotated[
        bool, typer.Option(help="With --tokens all: whether weights of lit pixels get that gate.")
    ] = True,
    limit: Annotated[int | None, typer.Option(help="Use only this many examples, the first ones.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples per forward pass.")] = None,
    views: Annotated[
        int,
        typer.Option(help="Average over this many views of each image: itself, 3 mirrored, 4 transposed."),
    ] = 1,
    workers: Annotated[int, typer.Option(help="Processes that generate images ahead.")] = 0,
    imports: Imports = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Measure accuracy on held-out examples, with a 95 % interval, beside a simple baseline.

    [bold]Examples[/bold]

        sparseflash evaluate runs/path256

        sparseflash evaluate weights/path256 --task path256 --limit 500 --views 4

        sparseflash evaluate weights/path256 --task path256 --limit 100 --tokens all

        sparseflash evaluate runs/path256 --folder lra_release --split s4 --json

        sparseflash evaluate runs/path256/best
    """
    from sparseflash.cli.evaluate import run

    run(
        checkpoint, folder, device, imports or [], json, level=level, size=size, split=split, task=task, stage=stage,
        tokens=tokens, key_gate=key_gate, limit=limit, batch=batch, workers=workers, views=views,
    )  # fmt: skip


@app.command(cls=Command)
@plain_errors
def generate(
    out: Annotated[Path, typer.Option(help="Folder for a pathfinder{SIZE} folder, or for the ListOps files.")],
    count: Annotated[int, typer.Option(help="Number of images; for listops, of training trees.")],
    size: Annotated[
        int | None,
        typer.Option(
            help="32, 64, 128 (Path-X) or 256. Other sizes from 28 to 2048 have the dashes of the next smaller one."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Instead of --size: the images of a training task, e.g. demo; or listops.")
    ] = None,
    level: Annotated[str, typer.Option(help="easy, intermediate or hard: 6, 9 or 14 dashes.")] = "hard",
    seed: Annotated[int, typer.Option(help="An image is determined by (seed, index).")] = 0,
    start: Annotated[int, typer.Option(help="Index of the first image.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one per core.")] = None,
) -> None:
    """Write Pathfinder images and their metadata, or ListOps files. A stopped run of images resumes where it was.

    [bold]Examples[/bold]

        sparseflash generate --size 256 --count 1000 --out data

        sparseflash generate --task demo --count 500 --out data --seed 7

        sparseflash generate --task listops --count 96000 --out data/listops-1000
    """
    from sparseflash.cli.generate import run

    run(out, size, task, level, count, seed, start, workers)


@app.command(cls=Command)
@plain_errors
def doctor(json: Json = False) -> None:
    """Show versions, devices and backends, and test each with a small run.

    [bold]Examples[/bold]

        sparseflash doctor --json
    """
    from sparseflash.cli.doctor import run

    run(json)


@app.command(cls=Command)
@plain_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures and checkpoints.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Seed of weights and images.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run smaller versions of all parts: under 90 seconds.")
    ] = False,
) -> None:
    """Take a tour in under six minutes on two cores: a mask, exactness, speed, learning, and 65,536 tokens.

    [bold]Examples[/bold]

        sparseflash demo --quick

        sparseflash demo --out tour --seed 1
    """
    from sparseflash.tools.demo import FULL, QUICK, run

    run(out, seed, QUICK if quick else FULL)
