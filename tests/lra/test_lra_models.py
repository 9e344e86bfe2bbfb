"""The sequence transformer: exact padding, patterns against dense, files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflash import reference
from sparseflash.functional.attention import Mask
from sparseflash.models import (
    PixelTransformer,
    PixelTransformerConfig,
    SequenceTransformer,
    SequenceTransformerConfig,
    config_from,
    from_pretrained,
)
from sparseflash.models.pixel_transformer import Layer
from sparseflash.patterns import parse

CONFIG = SequenceTransformerConfig(
    symbols=15, classes=10, pattern="local(5) | global_tokens(1)", block=(16, 16), width=16, heads=2, layers=2,
    mlp_width=16,
)  # fmt: skip
PATTERNS = ("full()", "local(5) | global_tokens(1)", "butterfly(unit=16) | local(3)", "dilated(4, 3)")


def model_of(config: SequenceTransformerConfig) -> SequenceTransformer:
    torch.manual_seed(0)
    return SequenceTransformer(config).double()


def padded(documents: list[list[int]], length: int) -> torch.Tensor:
    return torch.tensor([[*document, *[-1] * (length - len(document))] for document in documents])


DOCUMENTS = st.lists(st.lists(st.integers(0, 14), min_size=1, max_size=50), min_size=1, max_size=4)


@given(DOCUMENTS, st.sampled_from(PATTERNS), st.sampled_from(["mean", "first"]), st.integers(0, 30))
@settings(max_examples=25)
def test_an_example_s_logits_and_gradients_do_not_depend_on_its_company(
    documents: list[list[int]], pattern: str, readout: str, more: int
) -> None:
    model = model_of(replace(CONFIG, pattern=pattern, readout=readout))
    together = model(padded(documents, max(map(len, documents)) + more)).logits
    together.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    alone = torch.cat([model(torch.tensor([document])).logits for document in documents])
    alone.sum().backward()
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_masked_dense_attention(pattern: str) -> None:
    model = model_of(replace(CONFIG, pattern=pattern))
    lengths = [40, 23, 1]
    documents = [torch.randint(15, (length,)).tolist() for length in lengths]
    tokens = padded(documents, 41)
    found = model(tokens).logits
    q, k = torch.arange(41)[:, None], torch.arange(41)
    allowed = torch.from_numpy(parse(pattern).allows(q.numpy(), k.numpy()))
    ends = torch.tensor(lengths)[:, None, None]
    masks = (allowed & (q < ends) & (k < ends))[:, None]

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> torch.Tensor:
        out = reference.attention(q, k, v, masks)
        assert isinstance(out, torch.Tensor)
        return out

    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.attend = dense
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-9, atol=1e-9)


def test_pairs_are_read_by_the_same_weights_each_alone() -> None:
    model = model_of(replace(CONFIG, documents=2, classes=2))
    first, second = [1, 2, 3], [4, 5, 6, 7, 8]
    pair = torch.stack([padded([first], 6), padded([second], 6)], 1)
    found = model(pair).logits
    seen: list[torch.Tensor] = []
    model.head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    torch.testing.assert_close(model(pair).logits, found)
    u, v, product, difference = seen[0].chunk(4, -1)
    torch.testing.assert_close(product, u * v)
    torch.testing.assert_close(difference, u - v)
    model(torch.stack([padded([second], 6), padded([first], 6)], 1))
    torch.testing.assert_close(seen[1].chunk(4, -1)[0], v)


def test_activation_checkpointing_and_tied_layers_compute_the_same() -> None:
    model = model_of(replace(CONFIG, tied=True))
    assert len(model.layers) == 1
    tokens = padded([[1, 2, 3], [4]], 5)
    gradients = []
    for model.activation_checkpointing in (False, True):
        model.zero_grad(set_to_none=True)
        model(tokens).logits.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_files_round_trip_and_tell_the_kinds_apart(tmp_path: Path) -> None:
    model = SequenceTransformer(replace(CONFIG, pattern=("local(3)", "full()")))
    model.save_pretrained(tmp_path / "sequences")
    PixelTransformer(PixelTransformerConfig(width=16, layers=1)).save_pretrained(tmp_path / "pixels")
    assert isinstance(from_pretrained(tmp_path / "pixels"), PixelTransformer)
    for again in (from_pretrained(tmp_path / "sequences"), SequenceTransformer.from_pretrained(tmp_path / "sequences")):
        assert again.config == model.config
        for name, value in again.state_dict().items():
            assert torch.equal(value, model.state_dict()[name])
    (tmp_path / "sequences" / "config.json").write_text(replace(model.config, symbols=16).to_json())
    with pytest.raises(ValueError, match=r"not of the model in its config\.json: 'embedding\.weight'"):
        from_pretrained(tmp_path / "sequences")
    (tmp_path / "sequences" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not a model config"):
        from_pretrained(tmp_path / "sequences")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"symbols": 257}, "symbols must be in 1..256"),
        ({"width": 15}, "width / heads must be an even number"),
        ({"readout": "last"}, "readout must be one of mean, first"),
        ({"documents": 3}, "documents must be 1 or 2"),
        ({"block": [100, 100]}, "block must be two of"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"rotary_base": 0.0}, "rotary_base must be positive"),
        ({"layers": 2, "pattern": ["full()"]}, "one for each of the 2 layers"),
        ({"pattern": "locl(3)"}, "locl"),
        ({"order": "morton"}, "no field 'order'"),
        ({"layers": "two"}, "wrong type"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_from({"symbols": 15, **fields})


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 3), "tokens must be int"),
        (torch.zeros(2, 2, 3, dtype=torch.int16), "tokens must be int"),
        (torch.tensor([[3, 15]]), "a token must be below 15"),
        (torch.tensor([[3, 4], [-1, -1]]), "at least one token"),
    ],
)
def test_bad_tokens_are_refused(tokens: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SequenceTransformer(CONFIG)(tokens)
    with pytest.raises(ValueError, match="2 documents"):
        SequenceTransformer(replace(CONFIG, documents=2))(torch.zeros(1, 3, 4, dtype=torch.int16))
