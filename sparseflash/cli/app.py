"""Names, arguments and help of the commands, each of which is implemented in its own module."""

from pathlib import Path
from typing import Annotated

import typer

from sparseflash.cli.errors import block_size, plain_errors
from sparseflash.cli.help import Command, Group
from sparseflash.cli.options import Device, Imports, Json, takes
from sparseflash.cli.resuming import ResumingCommand
from sparseflash.cli.train_options import TrainOptions

app = typer.Typer(
    name="sparseflash",
    help="Block-sparse attention: draw a pattern, train with it, measure the result.",
    no_args_is_help=True,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line."""
    app()


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
    seq_len: Annotated[
        int | None, typer.Option(help="Query tokens, and key tokens. Default: what the pattern is for, as a grid is.")
    ] = None,
    kv_len: Annotated[int | None, typer.Option(help="Number of key tokens, if different.")] = None,
    block: Annotated[str, typer.Option(help="Block size in tokens: 128, or 128x64 for queries x keys.")] = "128",
    out: Annotated[Path | None, typer.Option(help="Draw the mask into this file (.png, .svg, .pdf).")] = None,
    window: Annotated[
        str | None, typer.Option(metavar="Q0:Q1,K0:K1", help="Draw only these queries and keys, counted from 0.")
    ] = None,
    token: Annotated[
        int | None, typer.Option(help="Draw what this query sees in the image of the pattern, counted from 0.")
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
    log_sparse() star() streaming(sinks, window) columns(list) diagonals(list) axial((H, W), order)
    neighborhood((H, W), radius, order) neighborhood((T, H, W), kernel_size=(7, 21, 27)) sliding_tile(shape, tile,
    window) radial(frames, tokens) spatial(frames, tokens) temporal(frames, tokens) bigbird() longformer(window) and
    other presets; per_head(p, q, ...), per_sample(p, q, ...), packed(p, q, ...), beside(p, before, after); joined by
    | & - ~ and parentheses.

    [bold]Examples[/bold]

        sparseflash show "causal() & local(1024)" --seq-len 65536

        sparseflash show "local(512) | butterfly(unit=256)" --seq-len 65536 --block 128 --out mask.png

        sparseflash show "causal() & local(1024)" --seq-len 65536 --out corner.png --window 0:2048,0:2048

        sparseflash show "beside(neighborhood((32, 32), 4), before=77)" --out seen.png --token 600

        sparseflash show "causal() & (local(1024) | butterfly())" --seq-len 1048576 --html mask.html

        sparseflash show "knights_move() & causal()" --seq-len 64 --import mine.py
    """
    from sparseflash.cli.show import run

    run(expression, seq_len, kv_len, block, out, html, window, token, imports or [], json)


@app.command(cls=Command)
@plain_errors
def bench(
    pattern: Annotated[str, typer.Option(help="A pattern, in quotes; see show.", show_default=False)],
    seq_len: Annotated[
        int | None, typer.Option(help="Query tokens, and key tokens. Default: what the pattern is for, as a grid is.")
    ] = None,
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
        pattern, seq_len, dtype, device, imports or [], json, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, backward=backward, block=block_size(block), runs=runs, flex=flex,
    )  # fmt: skip


@app.command(cls=ResumingCommand)
@plain_errors
@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a transformer over pixels or bytes, one token each, with attention through a pattern.

    Pathfinder images are generated on the fly, and contours grow as the model learns; with --folder the images are
    those of the Long Range Arena release. The other tasks are those of the Arena. A preset sets every option that you
    leave out: --print-config shows all of them. Ctrl-C saves and stops; --resume continues, on a CPU with the same
    losses bit for bit.

    Several processes, started by torchrun, share the images of a step. With --context-parallel N, groups of N also
    share the tokens of each image: with 8 processes and N = 4, each of two groups draws its own images, and each
    process computes and stores a quarter of an image. N must divide the number of processes, and every pixel must be a
    token (--tokens all). --resume accepts any other N and number of groups that divides a step's batches; losses agree
    up to rounding.

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

    run(options)


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
