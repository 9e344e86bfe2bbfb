"""Runs that begin with the weights of a saved model, which may have fewer layers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparseflash.models import Model, ModelConfig, PixelTransformerConfig, SequenceTransformerConfig, build
from sparseflash.models.files import WEIGHTS, write_tensors
from sparseflash.train.warm_start import load_initial_weights, source
from tests.cli.test_commands import invoke, refused
from tests.train.test_training import SMALL, run, weights

PIXELS = PixelTransformerConfig(
    pattern="local(16)", block=(16, 16), width=8, heads=1, layers=3, mlp_width=8, dense_classes=3
)
LINE = SequenceTransformerConfig(symbols=15, pattern="local(16)", width=8, heads=1, layers=3, mlp_width=8, documents=2)
BOTH = pytest.mark.parametrize("config", [PIXELS, LINE], ids=["pixels", "sequence"])


def saved(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """The weights of a model that now lies in a folder; no two of its layers have an equal one."""
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder)
    return model.state_dict()


def begun(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    model: Model = build(config)
    load_initial_weights(model, folder)
    return model.state_dict()


@pytest.mark.parametrize(
    ("stored", "sources"),
    [
        (1, [0, 0]),
        (2, [0, 1, 1]),  # the half in the middle goes up
        (2, [0, 0, 1, 1]),
        (4, [0, 1, 2, 2, 3]),
        (6, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5]),
        (6, [0, 1, 1, 2, 3, 3, 4, 4, 5]),
    ],
)
def test_each_layer_has_its_source(stored: int, sources: list[int]) -> None:
    assert [source(layer, stored, len(sources)) for layer in range(len(sources))] == sources


def test_sources_begin_and_end_at_the_ends_in_order_and_leave_none_out() -> None:
    for stored in range(1, 40):
        for layers in range(stored + 1, 80):
            sources = [source(layer, stored, layers) for layer in range(layers)]
            assert sources == sorted(sources)
            assert set(sources) == set(range(stored))


@BOTH
@pytest.mark.parametrize("layers", [3, 4, 5, 8])
def test_a_deeper_model_begins_with_copies_of_layers_and_all_else_as_it_was(
    config: ModelConfig, layers: int, tmp_path: Path
) -> None:
    old = saved(config, tmp_path)
    new = begun(replace(config, layers=layers), tmp_path)
    sources = {3: [0, 1, 2], 4: [0, 1, 1, 2], 5: [0, 1, 1, 2, 2], 8: [0, 0, 1, 1, 1, 1, 2, 2]}[layers]
    assert len(sources) == layers
    expected = {name: value for name, value in old.items() if not name.startswith("layers.")}
    for layer, number in enumerate(sources):
        prefix = f"layers.{number}."
        of_layer = {name.removeprefix(prefix): value for name, value in old.items() if name.startswith(prefix)}
        assert len(of_layer) == 8
        expected |= {f"layers.{layer}.{name}": value for name, value in of_layer.items()}
    assert new.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in new.items())


def test_copies_do_not_share_memory(tmp_path: Path) -> None:
    saved(PIXELS, tmp_path)
    new = begun(replace(PIXELS, layers=6), tmp_path)
    assert len({value.data_ptr() for value in new.values()}) == len(new)


@BOTH
def test_tied_models_of_all_depths_take_each_others_weights_as_they_are(config: ModelConfig, tmp_path: Path) -> None:
    old = saved(replace(config, tied=True), tmp_path)
    for layers in (2, 7):
        new = begun(replace(config, tied=True, layers=layers), tmp_path)
        assert new.keys() == old.keys()
        assert all(torch.equal(value, old[name]) for name, value in new.items())
    # Untied, each layer begins as the one that all shared.
    new = begun(config, tmp_path)
    for layer in range(config.layers):
        assert torch.equal(new[f"layers.{layer}.qkv.weight"], old["layers.0.qkv.weight"])


@BOTH
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 2}, r"layers stored: 3 there, 2 here\)[\s\S]* more layers [\s\S]*layers\.2\.qkv"),
        ({"tied": True}, r"layers stored: 3 there, 1 here\)[\s\S]*layers\.2\.qkv"),
        ({"mlp_width": 16}, r"of another shape[\s\S]* must be theirs[\s\S]*layers\.0\.mlp_in\.weight"),
        ({"mlp_width": 16, "layers": 5}, r"3 there, 5 here\)[\s\S]*layers\.4\.mlp_in\.weight"),
        ({"classes": 5, "layers": 5}, r"head\.(2\.)?weight"),
    ],
    ids=["shallower", "tied", "wider", "deeper and wider", "deeper and more classes"],
)
def test_any_other_shape_is_refused(
    config: ModelConfig, change: dict[str, int | bool], words: str, tmp_path: Path
) -> None:
    saved(config, tmp_path)
    with pytest.raises(ValueError, match=words):
        begun(replace(config, **change), tmp_path)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", ["layers.1.extra", "layers.00.qkv.weight", "layers.9.qkv.weight", "layers.1", "more"])
def test_foreign_names_are_refused_in_a_deeper_model_too(odd: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, saved(PIXELS, tmp_path) | {odd: torch.zeros(1)})
    with pytest.raises(ValueError, match="of another shape"):
        begun(replace(PIXELS, layers=5), tmp_path)


def test_a_missing_layer_is_refused_in_a_deeper_model_too(tmp_path: Path) -> None:
    old = saved(PIXELS, tmp_path)
    for gone in ("layers.1.", "layers.", "layers.2.mlp_out.bias"):
        write_tensors(tmp_path / WEIGHTS, {name: value for name, value in old.items() if not name.startswith(gone)})
        with pytest.raises(ValueError, match="of another shape"):
            begun(replace(PIXELS, layers=5), tmp_path)


def test_a_grown_run_resumes_bit_for_bit_without_the_weights_that_it_began_with(tmp_path: Path) -> None:
    model = replace(SMALL.pixel_model, layers=2)
    run(tmp_path / "shallow", 1, replace(SMALL, model=model))
    config = replace(SMALL, model=replace(model, layers=3), init=str(tmp_path / "shallow"))
    whole = run(tmp_path / "whole", 3, config)
    first = run(tmp_path / "parts", 1, config)
    (tmp_path / "shallow").rename(tmp_path / "elsewhere")
    second = run(tmp_path / "parts", 3, config, resume=True)
    assert first.losses + second.losses == whole.losses
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(second).items())


def test_the_command_grows_a_model_and_refuses_to_cut_one(tmp_path: Path) -> None:
    shape = ("--width", 16, "--heads", 1, "--batch", 2, "--device", "cpu", "--steps", 1)
    invoke("train", "demo", *shape, "--layers", 2, "--out", tmp_path / "two")
    grow = ("train", "demo", *shape, "--init", tmp_path / "two")
    result = invoke(*grow, "--layers", 4, "--out", tmp_path / "four")
    assert result.exit_code == 0, result.output
    assert "layers stored: 2 there, 1 here" in " ".join(
        refused(*grow, "--layers", 1, "--out", tmp_path / "one").split()
    )
    assert not (tmp_path / "one").exists()
