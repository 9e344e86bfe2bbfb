"""Vision models over patterns of their patches: equal to dense attention under the same mask."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from io import StringIO
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from torch import Tensor

import sparseflash as sf
from sparseflash.integrations.transformers import describe, use_pattern
from tests.integrations.batches import like, spread
from tests.integrations.test_transformers_models import check

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Grid = tuple[int, ...]
SIZES: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_channels": 1,
}  # fmt: skip
IMAGE = SIZES | {"image_size": 24, "patch_size": 4}
CLIP: dict[str, Any] = {
    "crop_size": 16, "frames_per_clip": 8, "tubelet_size": 2, "patch_size": 4, "in_chans": 1, "hidden_size": 24,
    "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_ratio": 2.0, "pred_hidden_size": 24,
    "pred_num_attention_heads": 2, "pred_num_hidden_layers": 2, "num_pooler_layers": 1,
}  # fmt: skip


class Kind(NamedTuple):
    """A model, the tokens before its patches, and a grid other than its config's."""

    make: Callable[[], Any]
    special: int
    home: Grid
    other: Grid | None


KINDS = {
    "vit": Kind(lambda: transformers.ViTModel(transformers.ViTConfig(**IMAGE)), 1, (6, 6), (4, 9)),
    "dinov2": Kind(lambda: transformers.Dinov2Model(transformers.Dinov2Config(**IMAGE)), 1, (6, 6), (4, 9)),
    "dinov2_with_registers": Kind(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**IMAGE, num_register_tokens=3)
        ),
        *(4, (6, 6), (4, 9)),
    ),
    "dinov3": Kind(
        lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**IMAGE, num_register_tokens=4)),
        *(5, (6, 6), (4, 9)),
    ),
    "siglip": Kind(lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)), 0, (6, 6), (4, 9)),
    "siglip2": Kind(
        lambda: transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(**SIZES, patch_size=4, num_patches=36)
        ),
        *(0, (6, 6), (4, 9)),
    ),
    "videomae": Kind(
        lambda: transformers.VideoMAEModel(
            transformers.VideoMAEConfig(**SIZES, image_size=16, patch_size=4, num_frames=6, tubelet_size=2)
        ),
        *(0, (3, 4, 4), None),
    ),
    "vjepa2": Kind(lambda: transformers.VJEPA2Model(transformers.VJEPA2Config(**CLIP)), 0, (4, 4, 4), (3, 5, 4)),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return spread(KINDS[name].make().eval())


def images(name: str, grid: Grid, batch: int = 2) -> dict[str, Any]:
    """What a model takes for images or videos of so many patches."""
    generator = torch.Generator().manual_seed(0)
    height, width = (4 * side for side in grid[-2:])
    if name == "siglip2":
        patches, shape = grid[0] * grid[1], torch.tensor([grid] * batch)
        return {
            "pixel_values": torch.rand(batch, patches, 16, generator=generator),
            "pixel_attention_mask": torch.ones(batch, patches, dtype=torch.long), "spatial_shapes": shape,
        }  # fmt: skip
    if len(grid) == 3:
        clip = torch.rand(batch, 2 * grid[0], 1, height, width, generator=generator)
        return {"pixel_values_videos" if name == "vjepa2" else "pixel_values": clip}
    given: dict[str, Any] = {"pixel_values": torch.rand(batch, 1, height, width, generator=generator)}
    return given | ({"interpolate_pos_encoding": True} if name in ("vit", "siglip") else {})


def results(model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Hidden states, and the gradient of every weight for a random cotangent of them."""
    dtype = next(model.parameters()).dtype
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    hidden = model(**given).last_hidden_state
    cotangent = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    hidden.backward(cotangent.to(dtype))
    grads = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return {"hidden": hidden.detach(), **grads}


def expected(model: Any, name: str, text: str, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """Dense attention of the layers that read patches, over the mask of the pattern beside the other tokens."""
    dense = like(model, "reference", dtype)
    special = KINDS[name].special
    for module in dense.modules():
        if hasattr(module, "config"):
            module.config.block_sparse_pattern = None
    trunk = dense.encoder if name == "vjepa2" else dense
    for module in trunk.modules():
        if hasattr(module, "block_sparse_patches"):
            module.config = copy.copy(module.config)
            module.config.block_sparse_pattern = f"beside({text.replace('{grid}', str(grid))}, before={special})"
    return results(dense, images(name, grid))


@pytest.mark.parametrize("name", KINDS)
def test_a_grid_is_for_the_patches_and_other_tokens_stand_beside_them(name: str) -> None:
    model = made(name)
    native = results(like(model, "eager"), images(name, KINDS[name].home))["hidden"]
    text = "neighborhood({grid}, kernel_size=3)"
    assert use_pattern(model, text, block=16) is model
    assert model.config.block_sparse_pattern == text
    for grid in (KINDS[name].home, KINDS[name].other):
        if grid is None:  # VideoMAE takes clips of one size
            continue
        found = results(model, images(name, grid))
        exact, dense = (expected(model, name, text, grid, dtype) for dtype in (torch.float64, torch.float32))
        check(found, exact, dense, found["hidden"].shape[1])
    use_pattern(model, "full()", block=16)
    everything = model(**images(name, KINDS[name].home)).last_hidden_state
    torch.testing.assert_close(everything, native, rtol=1e-4, atol=1e-5)
    use_pattern(model, text, block=16)
    assert (model(**images(name, KINDS[name].home)).last_hidden_state - native).abs().max() > 0.01


def test_what_reads_no_patches_sees_everything() -> None:
    """The predictor of V-JEPA 2 has tokens of its own, its poolers come after the encoder."""
    torch.manual_seed(0)
    model = spread(transformers.VJEPA2ForVideoClassification(transformers.VJEPA2Config(**CLIP)).eval())
    clip = images("vjepa2", (4, 4, 4))
    eager = like(model, "eager")
    use_pattern(model, ["neighborhood({grid}, 1)", None], block=16)
    sparse = model.vjepa2(**clip)
    assert (sparse.last_hidden_state - eager.vjepa2(**clip).last_hidden_state).abs().max() > 0.01
    hidden = sparse.last_hidden_state
    torch.testing.assert_close(model.pooler(hidden), eager.pooler(hidden), rtol=1e-4, atol=1e-5)
    masks = [torch.arange(64).expand(2, -1)]
    mine, theirs = (made.vjepa2.predictor(hidden, masks, masks).last_hidden_state for made in (model, eager))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert model(**clip).logits.shape == (2, 2)


def test_images_of_mixed_sizes_in_one_batch_have_each_their_grid() -> None:
    model = use_pattern(made("siglip2"), "neighborhood({grid}, 1)", block=16)
    mixed: dict[str, Any] = images("siglip2", (4, 9))
    mixed["spatial_shapes"] = torch.tensor([[4, 9], [6, 5]])
    mixed["pixel_attention_mask"][1, 30:] = 0
    together = model(**mixed)
    for row, grid in enumerate([(4, 9), (6, 5)]):
        number = grid[0] * grid[1]
        alone = {key: value[row : row + 1, :number] for key, value in mixed.items() if key != "spatial_shapes"}
        wanted = model(**alone, spatial_shapes=torch.tensor([grid]))
        found = together.last_hidden_state[row : row + 1, :number]
        torch.testing.assert_close(found, wanted.last_hidden_state, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.pooler_output[row], wanted.pooler_output[0], rtol=1e-4, atol=1e-5)


def test_numbers_of_a_video_and_patterns_by_head() -> None:
    model, clip = made("videomae"), images("videomae", (3, 4, 4))
    for text, shape in (
        ("spatial({frames}, {tokens_per_frame}, 0)", "spatial(3, 16, 0)"),
        ("per_head(axial({grid}), neighborhood({grid}, 1))", "per_head(axial((3, 4, 4)), neighborhood((3, 4, 4), 1))"),
    ):
        found = use_pattern(model, text, block=16)(**clip).last_hidden_state
        wanted = use_pattern(model, shape, block=16)(**clip).last_hidden_state
        assert torch.equal(found, wanted), text


def test_layers_and_what_describe_says_of_them() -> None:
    model = use_pattern(made("dinov3"), "neighborhood({grid}, 1)", layers=[1], block=16)
    console = Console(file=StringIO(), width=120)
    first, second = describe(model, console=console)
    assert (first.pattern, second.pattern) == (None, "neighborhood({grid}, 1)")
    mask = sf.parse("beside(neighborhood((6, 6), 1), before=5)").compile(41, block=16)
    assert second.density == mask.density
    assert first.density == 1
    assert isinstance(console.file, StringIO)
    assert "41 tokens" in console.file.getvalue()
    assert describe(model, 41, console=console) == [first, second]
    with pytest.raises(ValueError, match=r"images of 6 x 6 patches make 41 tokens, got tokens=100: leave it out"):
        describe(model, 100)


def test_a_copy_and_a_thread_have_images_of_their_own() -> None:
    model = use_pattern(made("dinov3"), "neighborhood({grid}, 1)", block=16)
    tall, wide = images("dinov3", (9, 4)), images("dinov3", (4, 9))
    wanted = [model(**given).last_hidden_state for given in (tall, wide)]
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**wide).last_hidden_state, wanted[1])
    waiting = threading.Barrier(2)
    found: list[bool] = [False, False]

    def pass_through(index: int, given: dict[str, Any]) -> None:
        for _ in range(3):
            found[index] = torch.equal(model(**given).last_hidden_state, wanted[index])

    def wait(*_: Any) -> None:  # both images are cut before a layer attends
        waiting.wait(30)

    handle = model.model.layer[0].register_forward_pre_hook(wait)
    threads = [threading.Thread(target=pass_through, args=pair) for pair in enumerate((tall, wide))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert found == [True, True]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_recomputes_for_the_images_it_was_made_for_or_says_it_cannot(reentrant: bool) -> None:
    model = use_pattern(made("dinov3"), "neighborhood({grid}, 1)", block=16).train()
    model.config.pos_embed_rescale = None  # which moves positions at random
    given = images("dinov3", (4, 9))
    wanted = results(model, given)
    # Its name from Transformers 5.2x on, and before.
    enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    found = results(model, given)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    hidden = model(**given).last_hidden_state
    model(**images("dinov3", (9, 4)))
    with pytest.raises(ValueError, match=r"36 patches, and this model has read images of 4 x 9 and of 9 x 4"):
        hidden.sum().backward()


def test_a_compiled_model_is_one_graph_for_every_size() -> None:
    model = use_pattern(made("vit"), "neighborhood({grid}, 1)", block=16)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    for grid in ((6, 6), (4, 9), (9, 4)):
        given = images("vit", grid)
        torch.testing.assert_close(
            compiled(**given).last_hidden_state, model(**given).last_hidden_state, rtol=1e-4, atol=1e-5
        )


def test_a_saved_model_keeps_the_text_and_is_told_of_its_patches_before_the_first_pass(tmp_path: Any) -> None:
    model = use_pattern(made("dinov2"), "neighborhood({grid}, 1)", block=16)
    given = images("dinov2", (4, 9))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="block_sparse").eval()
    torch.testing.assert_close(loaded(**given).last_hidden_state, model(**given).last_hidden_state)
    fresh = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="block_sparse").eval()
    for part in (fresh.encoder.layer[0].attention, fresh.encoder):
        with pytest.raises(ValueError, match=r"the patches of Dinov2Attention are not known yet: .*use_pattern"):
            part(torch.zeros(1, 37, 24))
    torch.testing.assert_close(fresh(**given).last_hidden_state, model(**given).last_hidden_state)


REFUSED = [
    ("vit", "neighborhod({grid}, 1)", "did you mean neighborhood"),
    ("vit", "per_sample(neighborhood({grid}, 1), full())", "cannot be per sample"),
    ("vit", "neighborhood({grid}, (1, 1, 1))", r"radius must be one for all axes or one for each of the 2"),
    ("vit", "neighborhood({grid}, 1, 'morton')", r"row by row, not in morton order: leave order= out"),
    (
        "vit",
        "radial({frames}, {tokens_per_frame})",
        r"\{frames\} and \{tokens_per_frame\} are for videos; .*use \{grid\}",
    ),
    ("vit", "neighborhood({shape}, 1)", r"a model fills in only \{grid\}, \{frames\} and \{tokens_per_frame\}"),
]


@pytest.mark.parametrize(("name", "text", "words"), REFUSED, ids=[text for _, text, _ in REFUSED])
def test_patterns_that_do_not_fit_are_refused_at_once_and_change_nothing(name: str, text: str, words: str) -> None:
    model = made(name)
    before = model(**images(name, (6, 6))).last_hidden_state
    with pytest.raises((TypeError, ValueError), match=words):
        use_pattern(model, text)
    assert torch.equal(model(**images(name, (6, 6))).last_hidden_state, before)


def test_models_without_patches_are_told_what_to_write() -> None:
    text = "neighborhood({grid}, 1)"
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    both = transformers.SiglipModel(
        transformers.SiglipConfig(
            text_config={**small, "vocab_size": 9, "max_position_embeddings": 8, "projection_size": 24},
            vision_config=IMAGE,
        )
    )
    with pytest.raises(ValueError, match=r"SiglipAttention is of 'siglip_text_model'.*use_pattern\(model.vision_model"):
        use_pattern(both, text)
    use_pattern(both.vision_model, text, block=16)
    assert both.vision_model(torch.rand(1, 1, 24, 24)).last_hidden_state.shape == (1, 36, 24)
    with pytest.raises(ValueError, match=r"CLIPAttention is of 'clip_vision_model'.*beside\(neighborhood\(\(14, 14\)"):
        use_pattern(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**IMAGE)), text)


def test_images_that_do_not_fit_say_so() -> None:
    model = use_pattern(made("videomae"), "neighborhood({grid}, 1)", block=16)
    hidden = torch.arange(48).expand(2, -1) >= 30
    with pytest.raises(
        ValueError, match=r"30 tokens.*has 3 x 4 x 4 patches.*\(bool_masked_pos\).*use_pattern\(model, None\)"
    ):
        model(**images("videomae", (3, 4, 4)), bool_masked_pos=hidden)
    with pytest.raises(ValueError, match=r"compile, the whole model, or write the shape in place of \{grid\}"):
        model.encoder(torch.zeros(1, 48, 24))
    wide = use_pattern(made("dinov2"), "neighborhood({grid}, kernel_size=5)", block=16)
    with pytest.raises(ValueError, match=re.escape("a window of 5 does not fit axis 0 of 2 places")):
        wide(**images("dinov2", (2, 9)))
    use_pattern(wide, "neighborhood({grid}, kernel_size=9)", block=16)(**images("dinov2", (9, 9)))
    with pytest.raises(ValueError, match=r"a window of 9 does not fit axis 0 of 6 places; nearest is kernel_size=6"):
        wide(**images("dinov2", (6, 6)))
