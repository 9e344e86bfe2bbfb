"""The options of ``sparseflash train``, each once: its group, type, default and help.

Options that change a recipe are called as the field of `TrainConfig`, or of a model's config, that they set;
tests/cli/test_help.py compares them.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from sparseflash.cli.options import DEVICE, IMPORT

GROUPS = ("Recipe", "Data", "Model", "Optimisation", "Run", "Validation", "Several processes")
_Recipe, _Data, _Model, _Optimisation, _Run, _Validation, _Several = (
    partial(typer.Option, rich_help_panel=title) for title in GROUPS
)


def _list_presets(wanted: bool) -> None:
    if wanted:
        from sparseflash.cli.presets import show

        show()
        raise typer.Exit


@dataclass(frozen=True)
class TrainOptions:
    """What the user typed; None where an option was left out."""

    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="path32, path64, pathx, path256, listops, text, retrieval, image or demo."),
    ]
    preset: Annotated[str | None, _Recipe(metavar="NAME", help="A preset such as path256-lit, or a .toml file.")] = None
    list_presets: Annotated[
        bool, _Recipe("--list-presets", callback=_list_presets, is_eager=True, help="List the presets and exit.")
    ] = False
    print_config: Annotated[
        bool, _Recipe("--print-config", help="Print the complete recipe as a preset and exit; nothing is written.")
    ] = False

    folder: Annotated[
        Path | None,
        _Data(
            help="The files to train on: the Long Range Arena release, or the files of text, retrieval, image or "
            "listops. Default: images and listops are generated. With --resume: where the run's files are now."
        ),
    ] = None
    level: Annotated[
        str | None,
        _Data(help="For images in --folder: easy, intermediate or hard. Default: hard, or the folder's level."),
    ] = None
    split: Annotated[
        str | None, _Data(help="For images in --folder: s4 (hard only) or contiguous. Default: s4 if it is defined.")
    ] = None
    data: Annotated[
        str | None,
        _Data("--draw", "--data", help="fixed: epochs over the training set; fresh: an endless stream of examples."),
    ] = None
    workers: Annotated[int | None, _Data(help="Processes that generate images ahead. Default: 0 on a CPU.")] = None
    seed: Annotated[int | None, _Data(help="Seed of weights and images.")] = None

    pattern: Annotated[
        str | None, _Model(help="Attention pattern, in quotes; may use {shape} and {order}. Default: the preset's.")
    ] = None
    imports: Annotated[list[str] | None, _Model("--import", **IMPORT)] = None
    layers: Annotated[int | None, _Model(help="Layers of the model.")] = None
    width: Annotated[int | None, _Model(help="Width of the model.")] = None
    heads: Annotated[int | None, _Model(help="Attention heads.")] = None
    order: Annotated[str | None, _Model(help="Token order: raster, tile, morton or hilbert.")] = None
    block: Annotated[str | None, _Model(help="Block size in tokens: 128, or 128x64.")] = None
    tokens: Annotated[str | None, _Model(help="Which pixels are tokens: all, lit_tiles or lit_pixels.")] = None
    key_gate: Annotated[
        bool | None,
        _Model(
            help="Learn how much keys of each grey value are seen. Default: with --tokens all, where the preset has "
            "lit pixels; weights of lit pixels then begin by leaving the dark ones out.",
        ),
    ] = None
    init: Annotated[
        Path | None,
        _Model(
            help="Start from the weights of this run, checkpoint or saved model, of the same shape or with fewer "
            "layers; copies fill the layers that --layers adds."
        ),
    ] = None

    batch: Annotated[
        int | None, _Optimisation(help="Examples per forward pass. Default: the preset's for the device.")
    ] = None
    accumulate: Annotated[int | None, _Optimisation(help="Forward passes per step.")] = None
    lr: Annotated[float | None, _Optimisation(help="Peak learning rate.")] = None
    schedule_steps: Annotated[
        int | None, _Optimisation(help="Steps of the last stage, over which the learning rate decays.")
    ] = None
    ema: Annotated[float | None, _Optimisation(help="Decay of the moving average of the weights; 0: none.")] = None
    dense_weight: Annotated[float | None, _Optimisation(help="Weight of the dense loss; 0: labels only.")] = None
    first_stage: Annotated[
        str | None,
        _Optimisation(metavar="N", help="Start at this stage, from 1; last: the task itself, without a curriculum."),
    ] = None
    precision: Annotated[str | None, _Optimisation(help="fp32 or bf16. Default: the preset's; fp32 on a CPU.")] = None
    activation_checkpointing: Annotated[
        bool | None,
        _Optimisation("--save-memory", help="Recompute activations in the backward pass.", show_default=False),
    ] = None

    out: Annotated[Path | None, _Run(help="Run folder. Default: runs/PRESET.")] = None
    resume: Annotated[
        str | None,
        _Run(
            metavar="[auto]",
            help="Resume from the latest checkpoint in the run folder; with auto: start if there is none.",
        ),
    ] = None
    steps: Annotated[int | None, _Run(help="Stop after this many steps in total. Default: the schedule's.")] = None
    minutes: Annotated[float | None, _Run(help="Save and stop after this many minutes.")] = None
    device: Annotated[str | None, _Run(help=DEVICE)] = None
    save_every: Annotated[int, _Run(help="Steps between checkpoints.")] = 500
    keep: Annotated[int, _Run(help="Number of checkpoints to keep.")] = 3
    pictures: Annotated[bool, _Run("--pictures", help="Draw mistakes and attention at the end of each stage.")] = False

    eval_every: Annotated[
        int | None,
        _Validation(help="Steps between evaluations on the validation part; the best checkpoint is kept in OUT/best."),
    ] = None
    eval_examples: Annotated[int | None, _Validation(help="Number of validation examples. Default: 1000.")] = None
    patience: Annotated[int | None, _Validation(help="Stop after this many evaluations without improvement.")] = None

    context_parallel: Annotated[
        int, _Several(help="Processes that share the tokens of each image, under torchrun; see below.")
    ] = 1
