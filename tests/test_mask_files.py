"""Masks survive a file, and damaged or foreign files are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.mask_file import load
from tests.strategies import Shape, expressions, per_head, per_sample, shapes


@given(expressions() | per_head(2) | per_sample(), shapes(300))
def test_a_mask_survives_its_file(tmp_path_factory: pytest.TempPathFactory, pattern: Pattern, shape: Shape) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    mask = shape.compile(pattern)
    mask.save(path, expression=str(pattern))
    again, text = load(path)
    assert again == mask
    assert text == str(pattern)
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file is left"


@given(st.data(), st.integers(0, 255))
def test_any_changed_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, byte: int) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    mask = (P.causal() & P.local(30)).compile(200, block=32)
    mask.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = byte
    path.write_bytes(content)
    try:
        loaded = BlockMask.load(path)
    except ValueError as error:
        refused = str(error)
        assert refused.startswith(str(path))
    else:
        assert loaded == mask


def test_foreign_and_cut_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError):
        BlockMask.load(path)
    for content in (b"", b"\x80\x04pickle", b"\xff" * 100, b"PK\x03\x04"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a block mask file"):
            BlockMask.load(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(ValueError, match="expected format"):
        BlockMask.load(path)
    mask = P.local(30).compile(200, block=32)
    mask.save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a block mask file"):
        BlockMask.load(path)


@given(expressions(), shapes(300))
def test_a_dense_mask_compiles_to_the_same(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    assert BlockMask.from_dense(mask.to_dense(), shape.block, shape.q_offset) == mask


def test_from_dense_takes_booleans_only() -> None:
    for wrong in (np.zeros((3, 3)), np.zeros(3, bool)):
        with pytest.raises(TypeError, match="booleans"):
            BlockMask.from_dense(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        BlockMask.from_dense(np.zeros((0, 3), bool))
