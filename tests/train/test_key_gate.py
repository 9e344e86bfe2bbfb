"""The gate on the keys of each grey value: weights of lit pixels open for all pixels with the same answers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflash.models import PixelTransformer, PixelTransformerConfig, attention_map
from sparseflash.models.files import WEIGHTS, write_tensors
from sparseflash.models.key_gate import GAIN, KeyGate, opened
from sparseflash.pathfinder import generate
from sparseflash.train import load_preset, recipe
from sparseflash.train.warm_start import load_initial_weights
from tests.cli.test_commands import invoke, refused

COMMITTED = Path(__file__).parent.parent.parent / "benchmarks" / "weights"
LIT = PixelTransformerConfig(
    pattern="neighborhood({shape}, 5, {order})", tokens="lit_pixels", block=(32, 32), width=16, heads=2, layers=2,
    mlp_width=32, lit_above=99,
)  # fmt: skip


def model_of(config: PixelTransformerConfig, seed: int = 0) -> PixelTransformer:
    torch.manual_seed(seed)
    return PixelTransformer(config)


def gates(model: PixelTransformer) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("key_gate.weight")]


def images(side: int, lit: float, seed: int, count: int = 2) -> torch.Tensor:
    """Grey values of all kinds, so that dark pixels differ; a share of them is lit."""
    generator = torch.Generator().manual_seed(seed)
    dark, bright = (torch.randint(a, b, (count, side, side), generator=generator) for a, b in ((0, 100), (100, 256)))
    return torch.where(torch.rand(count, side, side, generator=generator) < lit, bright, dark).to(torch.uint8)


@settings(deadline=None, max_examples=30)
@given(
    side=st.sampled_from([8, 16, 24]), lit=st.sampled_from([0.0, 0.02, 0.2, 1.0]), seed=st.integers(0, 999),
    order=st.sampled_from(["morton", "raster", "hilbert"]), heads=st.sampled_from([1, 2]), tied=st.booleans(),
    dense=st.sampled_from([0, 3]), pattern=st.sampled_from(["full()", "neighborhood({shape}, (2, 6), {order})"]),
)  # fmt: skip
def test_a_model_of_lit_pixels_opens_with_the_same_answers(
    side: int, lit: float, seed: int, order: str, heads: int, tied: bool, dense: int, pattern: str
) -> None:
    if side == 24 and order != "raster":
        side = 16  # a power of two
    config = replace(LIT, order=order, heads=heads, tied=tied, dense_classes=dense, pattern=pattern)
    few = model_of(config, seed)
    wide, pictures = few.over_all_pixels(), images(side, lit, seed)
    assert (wide.config.tokens, wide.config.key_gate) == ("all", True)
    assert wide.tokens(pictures).place.shape == (2, side * side)
    expected, found = few(pictures), wide(pictures)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
    if dense:
        assert found.dense_pixels is not None
        assert found.dense_logits is not None
        assert expected.dense_pixels is not None
        assert expected.dense_logits is not None
        in_place = found.dense_logits[found.dense_pixels.argsort()]
        torch.testing.assert_close(in_place, expected.dense_logits[expected.dense_pixels.argsort()], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "size"), [("path256", 256), ("pathx", 128)])
def test_committed_weights_open_with_the_same_answers(name: str, size: int) -> None:
    few = PixelTransformer.from_pretrained(COMMITTED / name)
    pictures = torch.as_tensor(generate(size=size, count=1, seed=11)[0])
    with torch.no_grad():
        torch.testing.assert_close(few.over_all_pixels()(pictures).logits, few(pictures).logits, atol=1e-5, rtol=0)


def test_without_a_gate_dark_pixels_change_the_answer() -> None:
    few, pictures = model_of(LIT), images(16, 0.2, 0)
    difference = few(pictures, tokens="all").logits - few(pictures).logits
    assert float(difference.detach().abs().max()) > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_a_gate_adds_its_number_to_the_scores_of_keys(seed: int) -> None:
    """Outputs, and the gradient of the gate, of one layer in float64, against a softmax written out."""
    torch.manual_seed(seed)
    gate = KeyGate(2).double()
    with torch.no_grad():
        gate.weight.normal_()
    grey = torch.randint(0, 256, (3, 40), dtype=torch.uint8)
    q, k, v = torch.randn(3, 3, 2, 40, 12, dtype=torch.float64).unbind(0)

    def out(gated: bool) -> torch.Tensor:
        if gated:
            wide_q, wide_k = gate(q, k, grey)
            return torch.nn.functional.scaled_dot_product_attention(wide_q, wide_k, v)
        number = GAIN * gate.weight[grey.long()].permute(0, 2, 1)[:, :, None]
        return ((q @ k.mT * 12**-0.5 + number).softmax(-1)) @ v

    cotangent = torch.randn_like(v)
    (found,), (expected,) = (torch.autograd.grad((out(g) * cotangent).sum(), gate.weight) for g in (True, False))
    torch.testing.assert_close(out(True), out(False), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-9)


def test_a_gate_that_has_learned_nothing_changes_nothing() -> None:
    config = replace(LIT, tokens="all")
    plain, gated = model_of(config), model_of(replace(config, key_gate=True))
    gated.load_state_dict(plain.state_dict(), strict=False)
    pictures = images(16, 0.2, 1)
    torch.testing.assert_close(gated(pictures).logits, plain(pictures).logits, atol=1e-5, rtol=0)


def test_every_gate_learns_and_none_decays() -> None:
    model = model_of(replace(LIT, tokens="all", key_gate=True))
    model(images(16, 0.2, 2)).logits.square().sum().backward()
    assert len(gates(model)) == 2
    for gate in gates(model):
        assert gate.grad is not None
        assert gate.grad.abs().sum(0).min() > 0
    from sparseflash.train.run import adamw

    config = recipe("path256", preset="path256-last", tokens="all", weight_decay=0.5)
    decayed, kept = adamw(model, config).param_groups
    learned = {id(gate) for gate in gates(model)}
    assert not learned & {id(p) for p in decayed["params"]}
    assert learned <= {id(p) for p in kept["params"]}


def test_activations_made_again_change_nothing() -> None:
    gradients = []
    for again in (False, True):
        model = model_of(replace(LIT, tokens="all", key_gate=True))
        model.activation_checkpointing = again
        model(images(16, 0.2, 3)).logits.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)


def test_a_lit_pixel_looks_at_lit_ones_alone() -> None:
    few = model_of(LIT)
    picture = images(16, 0.3, 4, count=1)[0]
    y, x = (picture > LIT.lit_above).nonzero()[0].tolist()
    weights = attention_map(few.over_all_pixels(), picture, (y, x))
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 2))
    assert float(weights[..., picture <= LIT.lit_above].max()) < 1e-20
    torch.testing.assert_close(weights, attention_map(few, picture, (y, x)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (replace(LIT, tokens="all"), 'are of a model of tokens "all"'),
        (replace(LIT, key_gate=True), "have one already"),
    ],
)
def test_what_no_gate_can_open_is_refused(config: PixelTransformerConfig, why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        opened(config, {})
    assert "--no-key-gate" in str(error.value)


def test_a_config_without_the_field_has_no_gate() -> None:
    text = LIT.to_json().replace(',\n  "key_gate": false', "")
    assert "key_gate" not in text
    assert PixelTransformerConfig.from_json(text) == LIT
    with pytest.raises(ValueError, match="key_gate"):
        PixelTransformerConfig.from_json(LIT.to_json().replace('"key_gate": false', '"key_gate": 1'))


# Beginning with other weights.


def test_training_begins_where_the_weights_of_lit_pixels_stand(tmp_path: Path) -> None:
    few = model_of(LIT)
    few.save_pretrained(tmp_path)
    pictures = images(16, 0.2, 5)
    wide = PixelTransformer(replace(LIT, tokens="all", key_gate=True))
    load_initial_weights(wide, tmp_path)
    torch.testing.assert_close(wide(pictures).logits, few(pictures).logits, atol=1e-5, rtol=0)
    deeper = PixelTransformer(replace(wide.config, layers=4))
    load_initial_weights(deeper, tmp_path)
    shut = gates(few.over_all_pixels())[0]
    assert len(gates(deeper)) == 4
    assert all(torch.equal(shut, gate) for gate in gates(deeper))


def test_weights_of_all_pixels_begin_with_gates_of_zero(tmp_path: Path) -> None:
    plain = model_of(replace(LIT, tokens="all"))
    plain.save_pretrained(tmp_path)
    gated = PixelTransformer(replace(plain.config, key_gate=True))
    load_initial_weights(gated, tmp_path)
    assert not any(gate.any() for gate in gates(gated))
    pictures = images(16, 0.2, 6)
    torch.testing.assert_close(gated(pictures).logits, plain(pictures).logits, atol=1e-5, rtol=0)


def test_gates_that_a_model_has_no_place_for_are_refused(tmp_path: Path) -> None:
    model_of(replace(LIT, tokens="all", key_gate=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="have a key gate and the model has none; add --key-gate"):
        load_initial_weights(PixelTransformer(replace(LIT, tokens="all")), tmp_path)


def test_weights_without_a_config_get_no_gate(tmp_path: Path) -> None:
    write_tensors(tmp_path / WEIGHTS, model_of(LIT).state_dict())
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_initial_weights(PixelTransformer(replace(LIT, tokens="all", key_gate=True)), tmp_path)


def test_all_pixels_instead_of_a_presets_lit_ones_come_with_a_gate() -> None:
    def gated(preset: str, **changes: object) -> bool:
        return recipe("path256", preset=preset, **changes).pixel_model.key_gate  # type: ignore[arg-type]

    assert gated("path256-last", tokens="all")
    assert not gated("path256-last", tokens="all", key_gate=False)
    assert not gated("path256-last")
    assert not gated(
        "path256-lit", tokens="all"
    )  # a tile's pixels are seen together: no pixel's own grey value decides
    assert not gated("path256", tokens="all")
    assert not any(load_preset(name).config.pixel_model.key_gate for name in ("path256", "path256-last", "pathx"))


# The command line.


def test_evaluate_opens_weights_of_lit_pixels(tmp_path: Path) -> None:
    model_of(replace(LIT, lit_above=127)).save_pretrained(tmp_path)
    line = ["evaluate", tmp_path, "--task", "demo", "--limit", 20]
    few, wide, plain = (
        invoke(*line, *more).stdout for more in ([], ["--tokens", "all"], ["--tokens", "all", "--no-key-gate"])
    )

    def accuracy(text: str) -> str:
        return next(row for row in text.splitlines() if row.startswith("accuracy"))

    assert accuracy(few) == accuracy(wide)
    assert "key gate: lit pixels do not see those up to grey 127; --no-key-gate: they do" in wide
    assert "key gate" not in few + plain
    assert "576 x 576 tokens" in wide


def test_evaluate_explains_what_it_cannot_open(tmp_path: Path) -> None:
    config = replace(
        LIT,
        pattern="neighborhood({shape}, 1)",
        unit="tile",
        order="tile",
        tokens="lit_tiles",
        tile=(4, 4),
        block=(16, 16),
    )
    model_of(config).save_pretrained(tmp_path)
    said = refused("evaluate", tmp_path, "--task", "demo", "--limit", 4, "--tokens", "all")
    assert 'are of a model of tokens "lit_tiles". With --no-key-gate they are used as they are' in said
    line = ["evaluate", tmp_path, "--task", "demo", "--limit", 4, "--tokens", "all", "--no-key-gate"]
    assert "accuracy" in invoke(*line).stdout


PRESET = """
task = "path256"
summary = "a tiny model of lit pixels"
schedule_steps = 4
batch = 2

[model]
pattern = "neighborhood({shape}, 5, {order})"
tokens = "lit_pixels"
block = [32, 32]
order = "morton"
width = 16
heads = 2
layers = 2
mlp_width = 32
lit_above = 99

[[stages]]
size = 48
length = 2
base = 256
"""


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]


def test_train_begins_with_weights_of_lit_pixels_and_resumes(tmp_path: Path) -> None:
    few, preset = tmp_path / "few", tmp_path / "tiny.toml"
    model_of(LIT).save_pretrained(few)
    preset.write_text(PRESET)

    def run(name: str, *more: object) -> Path:
        line = ["train", "path256", "--preset", preset, "--init", few, "--order", "raster", "--out", tmp_path / name]
        result = invoke(*line, *more)
        assert result.exit_code == 0, result.output
        return tmp_path / name

    lit, wide = losses(run("lit", "--steps", 2)), losses(run("all", "--steps", 2, "--tokens", "all"))
    assert wide[0] == pytest.approx(lit[0], abs=1e-5)
    run("parts", "--steps", 1, "--tokens", "all")
    assert invoke("train", "path256", "--out", tmp_path / "parts", "--resume", "--steps", 2).exit_code == 0
    assert losses(tmp_path / "parts") == wide
    trained = PixelTransformer.from_pretrained(sorted((tmp_path / "all/checkpoints").iterdir())[-1])
    assert not torch.equal(gates(trained)[0], gates(model_of(LIT).over_all_pixels())[0])
    plain = losses(run("plain", "--steps", 1, "--tokens", "all", "--no-key-gate"))
    assert plain[0] != pytest.approx(lit[0], abs=1e-5)
