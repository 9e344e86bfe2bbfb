"""Files that others wrote, or that were damaged, are read as they were or refused with an error that names them."""

from __future__ import annotations

import json
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparseflash.pathfinder as pf
from sparseflash import patterns as P
from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.patterns import BlockMask
from sparseflash.train.checkpoint import STATE, _digest, load_checkpoint, save_checkpoint
from sparseflash.train.config import TrainConfig
from sparseflash.train.curriculum import Progress
from sparseflash.train.image_stage import Stage
from tests.refusing import or_refused

# One folder serves all examples of a law: each begins by writing the file anew.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

NUMBERS = st.sampled_from([0, -1, 1, 2, 255, 256, 65535, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1, 1 << 63])
HOSTILE = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | st.just("causal()"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The bytes with some stretches changed, left out, repeated or put elsewhere."""
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.integers(0, max(0, len(content) - 1)))
        last = min(len(content), first + draw(st.sampled_from([1, 2, 4, 8, 64, 1 << 20])))
        there = content[first:last]
        new = draw(
            st.binary(max_size=8)
            | st.sampled_from([b"", there * 2, bytes(len(there)), b"\xff" * len(there), content[:first]])
            | NUMBERS.map(lambda n: struct.pack("<Q", n % (1 << 64)))
            | NUMBERS.map(lambda n: str(n).encode())
        )
        content = content[:first] + new + content[last:]
    return content


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """Plain data with one thing in it that is something else."""
    if isinstance(value, dict) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value)))
        return {k: draw(altered(v)) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(value) - 1))
        return [draw(altered(v)) if i == at else v for i, v in enumerate(value)]
    if isinstance(value, dict) and draw(st.booleans()):
        return value | draw(st.dictionaries(st.text(max_size=5), HOSTILE, max_size=2))
    return draw(HOSTILE)


MASK = P.per_head(P.causal() & P.local(30), P.strided(3)).compile(200, block=32)


@one_folder
@given(st.data())
def test_a_damaged_mask_file_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.safetensors"
    MASK.save(path)
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with or_refused(path):
        loaded = BlockMask.load(path)
        assert (loaded, loaded.expression) == (MASK, MASK.expression)


@one_folder
@given(st.data())
def test_a_mask_file_with_another_header_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "m.safetensors"
    MASK.save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = data.draw(
        st.dictionaries(
            st.sampled_from([*header["__metadata__"], "other"]), HOSTILE.map(json.dumps) | st.text(max_size=20)
        ).map(lambda changes: header["__metadata__"] | changes)
        | altered(header["__metadata__"])
    )
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])
    with or_refused(path):
        loaded = BlockMask.load(path)
        assert (loaded, loaded.expression) == (MASK, MASK.expression)


MODEL = PixelTransformerConfig(width=16, heads=1, layers=1, pattern="local(16)")


@given(altered(json.loads(MODEL.to_json())))
def test_a_model_config_is_read_or_refused(fields: Any) -> None:
    with or_refused():
        config = PixelTransformerConfig.from_json(json.dumps(fields))
        assert PixelTransformerConfig.from_json(config.to_json()) == config


@given(st.data())
def test_a_damaged_model_config_is_read_or_refused(data: st.DataObject) -> None:
    text = data.draw(damaged(MODEL.to_json().encode())).decode(errors="replace")
    with or_refused():
        PixelTransformerConfig.from_json(text)


RECIPE = TrainConfig("test", MODEL, (Stage(pf.Geometry.curriculum(64, 3)),), schedule_steps=10)


@given(altered(json.loads(json.dumps(RECIPE.to_dict()))))
def test_a_recipe_is_read_or_refused(fields: Any) -> None:
    with or_refused():
        config = TrainConfig.from_dict(fields)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    model = PixelTransformer(MODEL)
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return save_checkpoint(tmp_path_factory.mktemp("run"), 1, Progress(), RECIPE, model, optimizer)


@given(st.data())
def test_a_damaged_checkpoint_is_refused(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("copy") / checkpoint.name
    shutil.copytree(checkpoint, folder)
    name = data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    before = (folder / name).read_bytes()
    after = data.draw(damaged(before))
    (folder / name).write_bytes(after)
    with or_refused(folder):
        loaded = load_checkpoint(folder)
        assert after == before or name == STATE
        assert loaded.config == RECIPE
    shutil.rmtree(folder.parent)


@given(st.data())
def test_a_forged_checkpoint_is_read_or_refused(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """One whose checksums fit: whoever alters a file can sum it up anew."""
    folder = tmp_path_factory.mktemp("copy") / checkpoint.name
    shutil.copytree(checkpoint, folder)
    state = data.draw(altered(json.loads((folder / STATE).read_text())))
    if isinstance(state, dict) and isinstance(state.get("sha256"), dict):
        state["sha256"].pop(STATE, None)
        state["sha256"][STATE] = _digest(state)
    (folder / STATE).write_text(json.dumps(state))
    with or_refused(kinds=(ValueError, FileNotFoundError)):
        loaded = load_checkpoint(folder)
        assert type(loaded.step) is int
    shutil.rmtree(folder.parent)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("images")
    pf.write(out, 32, 3, seed=1, progress=False)
    return out


def all_of(folder: Path) -> list[tuple[bytes, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that empty images were dropped
        return [(image.tobytes(), label) for image, label in pf.read(folder)]  # type: ignore[attr-defined]


@given(st.data())
def test_damaged_images_and_metadata_are_read_or_refused(
    images: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("copy") / "out"
    shutil.copytree(images, folder)
    file = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*.*g*") if path.suffix == ".png")) | st.just(
        next(folder.rglob("*.npy"))
    ))  # fmt: skip
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    with or_refused(folder, kinds=(ValueError, FileNotFoundError)):
        found = all_of(folder)
        assert all(len(image) == 32 * 32 and label in (0, 1) for image, label in found)
    shutil.rmtree(folder.parent)


@given(st.data())
def test_a_damaged_numpy_array_of_metadata_is_read_or_refused(
    images: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("copy") / "out"
    shutil.copytree(images, folder)
    file = next(folder.rglob("*.npy"))
    np.save(file, np.array([line.split() for line in file.read_text().splitlines()]).astype("S"))
    content = file.read_bytes()
    if data.draw(st.booleans()):
        shape = data.draw(st.lists(NUMBERS, max_size=3).map(tuple))
        kind = data.draw(st.sampled_from(["|S14", "<U14", "|O", "<f8", "|V8", "|S2147483647", "<M8[s]"]))
        header = repr({"descr": kind, "fortran_order": data.draw(st.booleans()), "shape": shape}).encode() + b"\n"
        content = content[:8] + struct.pack("<H", len(header)) + header + content[128:]
    else:
        content = data.draw(damaged(content))
    file.write_bytes(content)
    with or_refused(folder, kinds=(ValueError, FileNotFoundError)):
        found = all_of(folder)
        assert all(label in (0, 1) for _, label in found)
    shutil.rmtree(folder.parent)
