"""What campaigns of ``make fuzz`` found: each in its smallest case, mended."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.models import PixelTransformerConfig
from sparseflash.pathfinder.metadata import read_rows
from sparseflash.train.checkpoint import STATE, _digest, load_checkpoint
from sparseflash.train.config import TrainConfig
from tests.laws.test_attention_laws import Drawn, all_partial
from tests.oracle import check, ours
from tests.test_files_at_random import MODEL, RECIPE, checkpoint

__all__ = ["checkpoint"]  # a fixture


def test_a_mask_file_whose_metadata_is_null(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    P.causal().compile(64).save(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]) | {"__metadata__": None}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])
    with pytest.raises(ValueError, match="expected format 'sparseflash"):
        P.BlockMask.load(path)


@pytest.mark.parametrize("text", ["0\r0", "(\r", "local(\r3,\rx)", "local(\n", "'''\n"])
def test_a_text_whose_lines_end_otherwise(text: str) -> None:
    with pytest.raises(ValueError, match="\\^"):
        sf.parse(text)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pattern", None),
        ("pattern", ["causal()", 3]),
        ("lit_above", 30.5),
        ("tied", 1),
        ("grey_levels", True),
        ("tile", [8.0, 8]),
    ],
)
def test_a_model_config_with_a_field_of_another_kind(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"wrong type: {field} must be"):
        PixelTransformerConfig.from_dict(json.loads(MODEL.to_json()) | {field: value})


@pytest.mark.parametrize(("field", "value"), [("seed", 1.5), ("stages", [{"geometry": None}]), ("task", None)])
def test_a_recipe_with_a_field_of_another_kind(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="not a training config"):
        TrainConfig.from_dict(json.loads(json.dumps(RECIPE.to_dict())) | {field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("step", None), ("progress", {"stage": 1}), ("progress", {"images": "1"})]
)
def test_a_checkpoint_that_sums_up_but_means_nothing(checkpoint: Path, field: str, value: object) -> None:
    text = (checkpoint / STATE).read_text()
    state = json.loads(text) | {field: value}
    state["sha256"].pop(STATE)
    state["sha256"][STATE] = _digest(state)
    try:
        (checkpoint / STATE).write_text(json.dumps(state))
        with pytest.raises(ValueError, match="does not tell the place in the curriculum"):
            load_checkpoint(checkpoint)
    finally:
        (checkpoint / STATE).write_text(text)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|S14', 'fortran_order': False, 'shape': (2147483647, 11)}",  # 308 GB, of which none is there
        "{'descr': '|S0', 'fortran_order': False, 'shape': (2147483647, 11)}",  # no bytes, and as many strings
        "'descr': '|S14', 'fortran_order': False, 'shape': (3, 11)}",  # not even Python
    ],
)
def test_metadata_with_an_absurd_array_header(tmp_path: Path, header: str) -> None:
    file = tmp_path / "0.npy"
    file.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + bytes(99))
    with pytest.raises(ValueError, match="neither text nor a plain NumPy array"):
        read_rows(file)


def test_configs_of_this_library_still_are_what_they_were() -> None:
    assert TrainConfig.from_dict(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE
    assert replace(MODEL, wavelengths=(4, 80)) == PixelTransformerConfig.from_json(MODEL.to_json())


def test_outputs_below_the_normal_numbers_of_fp16() -> None:
    """A sink of 21 leaves outputs of 6e-8 or 0: how far fp16 rounds those was no part of the tolerance of dsinks."""
    drawn = Drawn(
        pattern=P.full(), heads=2, group=1, batch=1, q_len=584, kv_len=594, block=(16, 16), q_offset=None, dim=64,
        v_dim=16, dtype=torch.float16, seed=258, transposed=False,
        features={"softcap": 2.0, "dropout_p": 0.1, "sinks": 20.0, "alibi": "head"},
    )  # fmt: skip
    mask, case = drawn.mask(), drawn.case()
    check(case, torch.from_numpy(mask.to_dense()), ours(case, all_partial(mask), "cpu"))
