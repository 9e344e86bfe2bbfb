"""The pixel transformer: positions, readout, files."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflash import models
from sparseflash import patterns as P
from sparseflash.models import PixelTransformer, PixelTransformerConfig, attention_map
from sparseflash.models.pixel_transformer import Layer
from sparseflash.rotary import rotary_table_2d, rotate
from sparseflash.tables.table import LookupTable

SMALL = PixelTransformerConfig(
    pattern="local(40) | butterfly(unit=16)", block=(16, 16), width=16, heads=2, layers=2, mlp_width=32, dense_classes=3
)


def model_of(config: PixelTransformerConfig, seed: int = 0) -> PixelTransformer:
    torch.manual_seed(seed)
    return PixelTransformer(config)


def images(count: int = 2, side: int = 16, seed: int = 0) -> torch.Tensor:
    values = torch.randint(0, 256, (count, side, side), generator=torch.Generator().manual_seed(seed))
    return torch.where(values > 128, values, 0).to(torch.uint8)


@settings(deadline=None)
@given(st.tuples(*[st.integers(0, 30)] * 4), st.tuples(st.integers(-20, 20), st.integers(-20, 20)), st.integers(0, 99))
def test_rotary_scores_depend_on_relative_positions_only(
    places: tuple[int, int, int, int], shift: tuple[int, int], seed: int
) -> None:
    width = 128
    q, k = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def score(y0: int, x0: int, y1: int, x1: int) -> float:
        cos, sin = rotary_table_2d(np.array([y0 * width + x0, y1 * width + x1]), width, 16)
        q_turned, k_turned = rotate(torch.stack([q, k]), cos, sin)
        return float(q_turned @ k_turned)

    y0, x0, y1, x1 = (place + 20 for place in places)
    dy, dx = shift
    assert score(y0, x0, y1, x1) == pytest.approx(score(y0 + dy, x0 + dx, y1 + dy, x1 + dx), abs=1e-4)


def test_rotary_positions_keep_lengths_and_tell_directions_apart() -> None:
    cos, sin = rotary_table_2d(np.arange(64), 8, 8)
    vectors = torch.randn(64, 8)
    turned = rotate(vectors, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    same = rotate(torch.ones(64, 8), cos, sin)
    assert len(torch.unique((same @ same[0]).round(decimals=3))) > 32


def test_token_order_does_not_change_the_answer_of_dense_attention() -> None:
    answers = []
    for order in ("raster", "tile", "morton", "hilbert"):
        config = PixelTransformerConfig(
            pattern="full()", order=order, block=(64, 64), width=16, layers=2, mlp_width=16, dense_classes=3
        )
        output = model_of(config)(images())
        assert output.dense_pixels is not None
        assert output.dense_logits is not None
        answers.append((output.logits, output.dense_logits[output.dense_pixels.argsort()]))
    for logits, dense in answers[1:]:
        torch.testing.assert_close(logits, answers[0][0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(dense, answers[0][1], atol=1e-5, rtol=1e-4)


def test_grey_values_are_interpolated_and_black_stands_apart() -> None:
    embedding = model_of(SMALL).embedding
    vectors = embedding(torch.arange(256, dtype=torch.uint8)[None])[0]
    anchors = embedding.anchors
    torch.testing.assert_close(vectors[[0, 1, 255]], anchors[[0, 1, SMALL.grey_levels]])
    middle = (vectors[100] + vectors[102]) / 2
    torch.testing.assert_close(vectors[101], middle)
    with torch.autocast("cpu", torch.bfloat16):
        assert embedding(torch.zeros(1, 4, dtype=torch.uint8)).dtype == torch.float32


def test_dense_pixels_name_the_lit_pixels() -> None:
    picture = images(3)
    output = model_of(SMALL)(picture)
    assert output.dense_logits is not None
    assert output.dense_pixels is not None
    lit = picture.flatten().gt(SMALL.lit_above).nonzero().flatten()
    torch.testing.assert_close(output.dense_pixels.sort().values, lit)
    assert output.dense_logits.shape == (len(lit), 3)


def test_black_images_get_finite_answers() -> None:
    output = model_of(SMALL)(torch.zeros(2, 16, 16, dtype=torch.uint8))
    assert torch.isfinite(output.logits).all()


def test_one_model_takes_many_sizes_and_a_mask_in_place_of_its_pattern() -> None:
    model = model_of(SMALL)
    for side in (8, 12, 16):
        assert model(images(1, side)).logits.shape == (1, 2)
    same = [P.parse("local(40) | butterfly(unit=16)").compile(256, block=32)] * 2
    torch.testing.assert_close(model(images(), same).logits, model(images()).logits)
    with pytest.raises(ValueError, match="each of the 2 layers; got 1"):
        model(images(), same[:1])


TILES = PixelTransformerConfig(
    pattern=("neighborhood({shape}, 1)", "full()"),
    unit="tile",
    order="tile",
    tile=(4, 4),
    block=(16, 16),
    width=16,
    layers=2,
    mlp_width=32,
    dense_classes=3,
)
LIT = replace(TILES, tokens="lit_tiles")


def sparse_images(count: int = 3, side: int = 24, seed: int = 0) -> torch.Tensor:
    """A few lit pixels: some tiles have none."""
    noise = torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed))
    return torch.where(noise > 0.97, 200, 0).to(torch.uint8)


def test_tiles_see_whole_tiles() -> None:
    near, everything = model_of(TILES).masks((12, 8))
    tiles = [(y, x) for y in range(3) for x in range(2)]
    wanted = np.array([[abs(a[0] - b[0]) <= 1 and abs(a[1] - b[1]) <= 1 for b in tiles] for a in tiles])
    assert (near.to_dense() == wanted.repeat(16, 0).repeat(16, 1)).all()
    assert everything.to_dense().all()
    with pytest.raises(ValueError, match="24 x 22 pixels is not made of tiles of 4 x 4"):
        model_of(TILES).masks((24, 22))


def test_lit_tiles_are_all_pixels_with_the_black_tiles_left_out() -> None:
    """The same weights over all pixels, through masks in which nobody sees a pixel of a black tile."""
    picture = sparse_images()
    model = model_of(LIT)
    found = model(picture)
    blocks = model.tokens(picture, "all").place % picture[0].numel()
    for image, logits in zip(picture, found.logits, strict=True):
        lit = (image.flatten() > LIT.lit_above)[blocks[0]].view(-1, 16).any(-1).numpy()
        assert 0 < lit.sum() < len(lit)
        masks = [
            P.from_blocks(mask.to_dense()[::16, ::16] & lit & lit[:, None], unit=16).compile(576, block=16)
            for mask in model.masks((24, 24))
        ]
        torch.testing.assert_close(model(image[None], masks, tokens="all").logits[0], logits, atol=1e-5, rtol=1e-4)


def test_lit_tiles_of_one_image_do_not_see_those_of_another() -> None:
    picture = sparse_images()
    model = model_of(LIT)
    together = model(picture)
    for image, logits in zip(picture, together.logits, strict=True):
        torch.testing.assert_close(model(image[None]).logits[0], logits, atol=1e-5, rtol=1e-4)
    assert together.dense_pixels is not None
    assert sorted(together.dense_pixels.tolist()) == picture.flatten().gt(31).nonzero().flatten().tolist()
    together.logits.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "dense" not in name)


PIXELS = replace(
    TILES, pattern=("neighborhood({shape}, 3, {order})", "full()"), unit="pixel", order="morton", tokens="lit_pixels"
)


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("order", ["morton", "raster"])
def test_lit_pixels_are_all_pixels_through_their_pattern_with_the_dark_ones_left_out(order: str, block: int) -> None:
    picture = torch.cat([images(2, 24), sparse_images(1), torch.zeros(1, 24, 24, dtype=torch.uint8)])
    model = model_of(replace(PIXELS, order=order, block=(block, block)))
    found = model(picture)
    for table in model.tokens(picture).masks:
        assert isinstance(table, LookupTable)
        table.check()
    place = model.tokens(picture[:1], "all").place[0]
    for image, logits in zip(picture, found.logits, strict=True):
        lit = (image.flatten()[place] > 31).numpy()
        masks = [
            P.from_blocks(mask.to_dense() & lit & lit[:, None], unit=1).compile(576, block=16)
            for mask in model.masks((24, 24))
        ]
        torch.testing.assert_close(model(image[None], masks, tokens="all").logits[0], logits, atol=1e-5, rtol=1e-4)
    found.logits.sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "dense" not in name}
    model.zero_grad()
    sum(model(image[None]).logits.sum() for image in picture).backward()
    for name, p in model.named_parameters():
        if "dense" not in name:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-4, rtol=1e-3)


def test_lit_pixels_want_patterns_that_reach_a_distance() -> None:
    with pytest.raises(ValueError, match=r'got "local\(3\)"'):
        model_of(replace(PIXELS, pattern="local(3)"))(sparse_images())
    with pytest.raises(ValueError, match="81 pixels are not a whole number of blocks of 16"):
        model_of(PIXELS)(torch.zeros(1, 9, 9, dtype=torch.uint8))


def test_black_images_among_lit_tiles() -> None:
    picture = sparse_images()
    picture[1] = 0
    output = model_of(LIT)(picture)
    assert torch.isfinite(output.logits).all()
    torch.testing.assert_close(output.logits[0], model_of(LIT)(picture[:1]).logits[0], atol=1e-5, rtol=1e-4)


def test_tied_layers_share_one_set_of_weights() -> None:
    tied = model_of(replace(SMALL, tied=True, layers=3))
    assert len(tied.layers) == 1
    untied = model_of(replace(SMALL, layers=3))
    for layer in untied.layers:
        layer.load_state_dict(tied.layers[0].state_dict())
    rest = {name: value for name, value in tied.state_dict().items() if not name.startswith("layers")}
    untied.load_state_dict(rest, strict=False)
    assert torch.equal(tied(images()).logits, untied(images()).logits)


def test_patterns_are_filled_in_for_the_image() -> None:
    config = replace(SMALL, pattern="neighborhood({shape}, 2, {order})", order="hilbert")
    (first, _) = config.patterns((16, 16))
    assert first == P.neighborhood((16, 16), 2, "hilbert")
    assert model_of(config)(images()).logits.shape == (2, 2)


def test_the_readout_can_be_the_insides_of_discs() -> None:
    picture = torch.zeros(1, 16, 16, dtype=torch.uint8)
    picture[0, 2:7, 2:7] = 255  # 5 x 5: its inside is 3 x 3
    picture[0, 10:12, 1:15] = 255  # a dash two pixels thick
    output = model_of(replace(SMALL, readout_reach=1))(picture)
    assert output.dense_pixels is not None
    assert sorted(output.dense_pixels.tolist()) == [y * 16 + x for y in range(3, 6) for x in range(3, 6)]


@pytest.mark.parametrize(
    "config",
    [SMALL, LIT, replace(SMALL, tokens="lit_pixels", pattern="neighborhood({shape}, 5, {order})")],
    ids=["all", "tiles", "pixels"],
)
def test_looks_are_the_weights_of_attention(config: PixelTransformerConfig) -> None:
    model = model_of(config)
    picture = sparse_images(1, 16)[0]
    picture[5, 6] = 255
    weights = attention_map(model, picture, (5, 6))
    assert weights.shape == (2, 2, 16, 16)
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(2, 2))
    tokens = model.tokens(picture[None])
    x = model.embedding(picture.flatten()[tokens.place])
    (layer, *_) = model.layers
    assert isinstance(layer, Layer)
    q, k, _ = layer.project(x, tokens.cos, tokens.sin)
    at = int((tokens.place[0] == 5 * 16 + 6).nonzero())
    scores = (q[0, :, at, None] * k[0]).sum(-1) / config.head_dim**0.5
    seen = weights[0].flatten(1)[:, tokens.place[0]]
    for head in range(2):
        visible = seen[head] > 0
        torch.testing.assert_close(seen[head][visible], scores[head][visible].softmax(0))
    with pytest.raises(ValueError, match="must lie in the image of 16 x 16"):
        attention_map(model, picture, (16, 0))


def test_a_pixel_of_a_black_tile_is_no_token() -> None:
    picture = torch.zeros(16, 16, dtype=torch.uint8)
    picture[0, 0] = 255
    with pytest.raises(ValueError, match="is not a token"):
        attention_map(model_of(LIT), picture, (12, 12))


def test_the_former_name_of_attention_map_works_and_warns() -> None:
    with pytest.warns(
        DeprecationWarning, match=r"sparseflash\.models\.looks is now sparseflash\.models\.attention_map"
    ):
        assert models.looks is attention_map  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="has no attribute 'look'"):
        _ = models.look  # type: ignore[attr-defined]


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = model_of(SMALL)
        model.activation_checkpointing = checkpointing
        model(images()).logits.sum().backward()
        gradients.append([p.grad for name, p in model.named_parameters() if "dense" not in name])
    for plain, recomputed in zip(*gradients, strict=True):
        assert plain is not None
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("bad", [torch.zeros(2, 16, 16), torch.zeros(16, 16, dtype=torch.uint8)])
def test_other_images_are_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[B, height, width\]"):
        model_of(SMALL)(bad)


@pytest.mark.parametrize("pattern", ["causal() & local(7)", ("full()", "local(3)")])
def test_config_round_trips_through_json(pattern: str | tuple[str, ...]) -> None:
    config = PixelTransformerConfig(pattern=pattern, layers=2, tile=(4, 8), wavelengths=(3.0, 50.0))
    assert PixelTransformerConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json())["pattern"] == (pattern if isinstance(pattern, str) else list(pattern))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pattern": "lokal(3)"}, "lokal"),
        ({"width": 30, "heads": 4}, "multiple of 4; got width=30 and heads=4"),
        ({"layers": 0}, "layers must be at least 1; got 0"),
        ({"order": "zigzag"}, "zigzag"),
        ({"pattern": ("full()",), "layers": 2}, "each of the 2 layers; got 1"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"wavelengths": (8.0, 4.0)}, "shortest <= longest"),
        ({"width": "wide"}, "width must be int, got 'wide'"),
        ({"wavelengths": "ab"}, "wrong type"),
        ({"layers": 1 << 30}, "layers must be at most 1,024; got 1073741824"),
        ({"dense_classes": 1 << 30}, "dense_classes must be 0 or more, and at most 1,048,576"),
        ({"unit": "patch"}, "unit must be one of pixel, tile"),
        ({"tokens": "some"}, "tokens must be one of all, lit_tiles, lit_pixels"),
        ({"unit": "tile"}, "needs order \"tile\"; got 'morton'"),
        ({"tokens": "lit_tiles", "order": "tile"}, 'need unit "tile"'),
        ({"unit": "tile", "order": "tile", "tile": (3, 3)}, "a tile of 3 x 3"),
        ({"readout_reach": -1}, "readout_reach must be 0 or more"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PixelTransformerConfig.from_dict(fields)


def test_weights_round_trip(tmp_path: Path) -> None:
    model = model_of(SMALL)
    model.save_pretrained(tmp_path / "model")
    loaded = PixelTransformer.from_pretrained(tmp_path / "model")
    assert loaded.config == SMALL
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model: it has no config"):
        PixelTransformer.from_pretrained(tmp_path)
    model_of(SMALL).save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="truncated or foreign"):
        PixelTransformer.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    other = PixelTransformerConfig.from_json(SMALL.to_json().replace('"mlp_width": 32', '"mlp_width": 48'))
    (tmp_path / "config.json").write_text(other.to_json())
    with pytest.raises(
        ValueError, match=r"not of the model in its config.json: 'layers.0.mlp_in.bias' should be \(48,\)"
    ):
        PixelTransformer.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        PixelTransformer.from_pretrained(tmp_path)
