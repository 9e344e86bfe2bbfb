"""Diffusion transformers over a pattern: tiny random ones give what they give with the same dense mask."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import sparseflash as sf
from sparseflash import patterns as P

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from sparseflash.integrations.diffusers import use_pattern  # noqa: E402
from sparseflash.integrations.diffusers.tables import Text, mask_of, used_of  # noqa: E402

VIDEO = 48  # tokens of the image or video of each model below: 3 frames of 4 x 4 patches, or 12 x 4
IMAGE = "neighborhood((12, 4), 1)"


class Tiny(NamedTuple):
    """A random transformer, the arguments of a forward pass, and the tokens of text before and after the image."""

    model: Any
    given: dict[str, Any]
    before: int = 0
    after: int = 0

    def run(self, **changed: Any) -> Tensor:
        with torch.no_grad():
            out: Tensor = self.model(**self.given | changed).sample
        return out

    def over(self, pattern: str | P.Pattern | None, **options: Any) -> Tensor:
        """A pass with the model switched to a pattern."""
        use_pattern(self.model, pattern, block=16, **options)
        return self.run()

    def masked(self, image: P.Pattern, **changed: Any) -> Tensor:
        """The model's own attention, over the dense mask of a pattern with text beside it."""
        tokens = self.before + VIDEO + self.after
        mask = P.beside(image, self.before, self.after).compile(tokens).to_dense()
        with Masked(torch.from_numpy(mask)) as masked:
            out = self.run(**changed)
        assert masked.calls == 2, "one per layer"
        return out


class Masked(TorchFunctionMode):
    """Attention of all tokens among each other is over a mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask, self.calls = mask, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
            if given["query"].shape[2] == given["key"].shape[2] == len(self.mask):
                self.calls += 1
                hidden = given.get("attn_mask")
                given["attn_mask"] = self.mask if hidden is None else self.mask & hidden
            return func(**given)
        return func(*args, **(kwargs or {}))


def wan() -> Tiny:
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return Tiny(model, {"hidden_states": torch.randn(2, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(2, 5, 8)})


def hunyuan() -> Tiny:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    padded = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
    given = {
        "hidden_states": torch.randn(2, 4, 3, 8, 8), "encoder_hidden_states": torch.randn(2, 7, 16),
        "pooled_projections": torch.randn(2, 8), "encoder_attention_mask": padded, "guidance": torch.tensor([6.0, 6.0]),
    }  # fmt: skip
    return Tiny(model, given, after=7)


def flux() -> Tiny:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    given = {
        "hidden_states": torch.randn(2, VIDEO, 4), "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32), "img_ids": torch.randn(VIDEO, 3), "txt_ids": torch.randn(6, 3),
    }  # fmt: skip
    return Tiny(model, given, before=6)


def cogvideox() -> Tiny:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8,
        num_layers=2, sample_width=8, sample_height=8, sample_frames=9, patch_size=2, temporal_compression_ratio=4,
        max_text_seq_length=8,
    )  # fmt: skip
    given = {"hidden_states": torch.randn(2, 3, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 8, 8)}
    return Tiny(model, given, before=8)


@pytest.fixture(params=[wan, hunyuan, flux, cogvideox], ids=lambda make: make.__name__)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    torch.manual_seed(0)
    made: Tiny = request.param()
    made.model.eval()
    made.given["timestep"] = torch.tensor([700.0, 700.0])
    return made


def wan_alone() -> Tiny:
    torch.manual_seed(0)
    made = wan()
    made.given["timestep"] = torch.tensor([700.0, 700.0])
    return made


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for the order of sums in fp32; the patterns below move outputs by a hundredth and more."""
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "text",
    [IMAGE, f"{IMAGE} - axial((12, 4))", "local(5)", "documents([16, 16, 16])", f"per_head({IMAGE}, strided(3))"],
)
def test_a_pattern_gives_what_the_dense_mask_gives(tiny: Tiny, text: str) -> None:
    native = tiny.run()
    wanted = native if text.startswith("per_head") else tiny.masked(sf.parse(text))
    found = use_pattern(tiny.model, text, block=16)
    assert found is tiny.model
    sparse = tiny.run()
    if not text.startswith("per_head"):
        assert close(sparse, wanted)
    assert (sparse - native).abs().max() > 0.01
    assert torch.equal(tiny.over(None), native)


def test_everything_is_the_models_own_attention(tiny: Tiny) -> None:
    native = tiny.run()
    use_pattern(tiny.model, "full()", block=32)
    assert close(tiny.run(), native)


def test_tokens_are_put_in_the_order_of_a_pattern_and_back(tiny: Tiny) -> None:
    wanted = tiny.masked(sf.parse(IMAGE))
    use_pattern(tiny.model, P.neighborhood((12, 4), 1, order="morton"), block=16)
    assert close(tiny.run(), wanted)


def test_layers_that_are_left_out_stay_dense(tiny: Tiny) -> None:
    native = tiny.run()
    outs = [native, *(tiny.over(IMAGE, layers=layers) for layers in ([0], [-1], (0, 1)))]
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(outs) for b in outs[:i])
    assert torch.equal(tiny.over(IMAGE, layers=[]), native)


@pytest.mark.parametrize(
    ("wanted", "sparse"),
    [({"dense_steps": 2}, [2, 3, 4]), ({"steps": [1, 3]}, [1, 3]), ({}, [0, 1, 2, 3, 4]), ({"steps": range(0)}, [])],
    ids=str,
)
def test_steps_are_counted_by_their_timesteps(tiny: Tiny, wanted: dict[str, Any], sparse: list[int]) -> None:
    timesteps = [999.0, 800.0, 500.0, 200.0, 1.0]
    native = [tiny.run(timestep=torch.tensor([t, t])) for t in timesteps]
    use_pattern(tiny.model, IMAGE, block=16, **wanted)
    for _ in range(2):  # a second sample begins anew
        for step, timestep in enumerate(timesteps):
            for _ in range(2):  # with and without the prompt
                out = tiny.run(timestep=torch.tensor([timestep, timestep]))
                assert torch.equal(out, native[step]) is (step not in sparse), step


def test_positional_arguments_are_known_too() -> None:
    tiny = wan_alone()
    use_pattern(tiny.model, IMAGE, dense_steps=1, block=16)
    with torch.no_grad():
        for timestep in (900.0, 800.0):
            given = {**tiny.given, "timestep": torch.tensor([timestep] * 2)}
            out = tiny.model(given["hidden_states"], given["timestep"], given["encoder_hidden_states"]).sample
    use_pattern(tiny.model, None)
    assert close(out, tiny.masked(sf.parse(IMAGE), timestep=given["timestep"]))


def test_gradients_are_those_of_the_dense_mask(tiny: Tiny) -> None:
    def gradients() -> list[Tensor]:
        tiny.model.zero_grad()
        tiny.model(**tiny.given).sample.square().sum().backward()
        return [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]

    mask = P.beside(sf.parse(IMAGE), tiny.before, tiny.after).compile(tiny.before + VIDEO + tiny.after).to_dense()
    with Masked(torch.from_numpy(mask)):
        wanted = gradients()
    use_pattern(tiny.model, IMAGE, block=16)
    # The gradient of a key's bias is 0, for softmax does not see it: what is left is the rounding of larger ones.
    largest = max(g.norm() for g in wanted)
    for mine, theirs in zip(gradients(), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-5 * largest


def test_a_compiled_model_attends_outside_of_its_graphs(tiny: Tiny) -> None:
    """The order of tokens and the steps are those of the plain model."""
    timesteps = [torch.tensor([t, t]) for t in (900.0, 800.0, 500.0)]
    setting: dict[str, Any] = {"dense_steps": 1, "block": 16}
    torch._dynamo.reset()
    use_pattern(tiny.model, "neighborhood((12, 4), 1, 'morton')", **setting)
    wanted = [tiny.run(timestep=timestep) for timestep in timesteps]
    use_pattern(tiny.model, "neighborhood((12, 4), 1, 'morton')", **setting)
    compiled = Tiny(torch.compile(tiny.model, backend="eager"), tiny.given)
    found = [compiled.run(timestep=timestep) for timestep in timesteps]
    assert all(map(close, found, wanted))
    assert not close(found[1], tiny.over(None)), "the second step is sparse"
    use_pattern(tiny.model, IMAGE, block=16)
    torch._dynamo.reset()
    whole = Tiny(torch.compile(tiny.model, backend="eager", fullgraph=True), tiny.given)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call torch.compile without\s+fullgraph=True"):
        whole.run()


def test_a_copy_counts_for_itself() -> None:
    tiny = wan_alone()
    native = tiny.run()
    assert torch.equal(tiny.over(IMAGE, dense_steps=1), native)
    twin = Tiny(copy.deepcopy(tiny.model), tiny.given)
    later = {"timestep": torch.tensor([600.0, 600.0])}
    sparse = tiny.run(**later)
    assert torch.equal(twin.run(**later), sparse)
    assert torch.equal(tiny.run(), native), "a larger timestep begins anew"
    assert torch.equal(twin.run(**later), sparse), "and not for the copy"
    tiny.over(None)
    assert torch.equal(twin.run(**later), sparse)


def test_text_after_a_video_ends_where_the_mask_says() -> None:
    own = P.local(2)
    mask = mask_of(own, Text(0, 4, (4, 1)), 10, 16)
    dense = mask.to_dense().reshape(2, 10, 10)
    assert (dense[0] == P.beside(own, after=4).compile(10).to_dense()).all()
    assert (dense[1][:7, :7] == P.beside(own, after=1).compile(7).to_dense()).all()
    assert dense[1].sum() == dense[1][:7, :7].sum()
    keys = torch.arange(10) < torch.tensor([[10], [7]])
    assert used_of(keys[:, None, None], 10, 4) == (4, 1)
    assert used_of(keys[1:, None, None], 10, 4) == (1,)
    assert used_of(keys[:1, None, None], 10, 4) is None
    early = torch.arange(10) < 5
    for wrong in (~keys[:, None, None], keys[:, None, None].float(), keys[:, None], early[None, None, None]):
        with pytest.raises(ValueError, match="hides more than padding at the end of the text"):
            used_of(wrong, 10, 4)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"pattern": "neighborhod((12, 4), 1)"}, ValueError, "did you mean neighborhood"),
    ({"pattern": 3}, TypeError, "use_pattern takes a pattern or its text, got 3"),
    ({"pattern": P.causal}, TypeError, "causal is not called: write causal"),
    ({"pattern": "per_sample(full(), causal())"}, ValueError, "cannot be per sample"),
    ({"pattern": "axial((12, 4)) | axial((12, 4), 'morton')"}, ValueError, "mixes 2 token orders, morton, raster"),
    ({"pattern": "beside(axial((4, 4), 'morton'), 2)"}, ValueError, "the pattern has other tokens too"),
    ({"pattern": IMAGE, "layers": [2]}, ValueError, "layers are numbered from 0 to 1, got 2"),
    ({"pattern": IMAGE, "layers": [True]}, TypeError, "layers must be ints, got True"),
    ({"pattern": IMAGE, "steps": [-1]}, ValueError, "step must be at least 0, got step=-1"),
    ({"pattern": IMAGE, "dense_steps": 0.2}, TypeError, "dense_steps must be an int, got 0.2"),
    ({"pattern": IMAGE, "steps": [1], "dense_steps": 2}, ValueError, "leave out dense_steps=2"),
    ({"pattern": IMAGE, "block": 48}, ValueError, "block sizes are 16, 32, 64, 128, 256; got block=48"),
]


@pytest.mark.parametrize(("given", "kind", "message"), BAD, ids=[message for *_, message in BAD])
def test_refusals_leave_the_model_as_it_was(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    tiny = wan_alone()
    native = tiny.run()
    with pytest.raises(kind, match=message):
        use_pattern(tiny.model, **given)
    assert torch.equal(tiny.run(), native)
    use_pattern(tiny.model, IMAGE, block=16)
    sparse = tiny.run()
    with pytest.raises(kind, match=message):
        use_pattern(tiny.model, **given)
    assert torch.equal(tiny.run(), sparse)


class Pipeline:
    transformer = torch.nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (torch.nn.Linear(2, 2), r"supports CogVideoXTransformer3DModel, .*; got Linear$"),
        (Pipeline(), r"got Pipeline; for a pipeline, give its transformer: use_pattern\(pipe.transformer"),
    ],
)
def test_other_models_are_refused(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_pattern(model, IMAGE)


def test_a_pattern_for_other_sizes_says_what_the_model_has(tiny: Tiny) -> None:
    use_pattern(tiny.model, "neighborhood((12, 5), 1)")
    tokens = 48 + tiny.before + tiny.after
    with pytest.raises(ValueError, match=rf"is for 60 tokens; the image or video has 48 \({tokens} with text\)"):
        tiny.run()


def test_a_backend_that_does_not_call_torchs_attention_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = wan_alone()
    use_pattern(tiny.model, IMAGE, block=16)
    dispatch: Callable[..., Tensor] = lambda q, *_, **__: q  # noqa: E731
    monkeypatch.setattr("diffusers.models.transformers.transformer_wan.dispatch_attention_fn", dispatch)
    with pytest.raises(ValueError, match=r"scaled_dot_product_attention 0 times.*set_attention_backend\('native'\)"):
        tiny.run()


def test_the_example_prints_how_far_sparse_videos_are(capsys: pytest.CaptureFixture[str]) -> None:
    from examples.denoise import main

    patterns = ["full()", "strided(64) | local(64)", "local(2)"]
    rows = main(["--train-steps", "2", "--videos", "1", "--steps", "3", "--dense-steps", "1", "--patterns", *patterns])
    assert [row.pattern for row in rows] == patterns
    full, some, few = (row.psnr for row in rows)
    assert full > 80 > some > few
    assert all(row.psnr_dense_first > row.psnr for row in rows[1:])
    assert [row.density for row in rows] == sorted((row.density for row in rows), reverse=True)
    assert "PSNR" in capsys.readouterr().out
