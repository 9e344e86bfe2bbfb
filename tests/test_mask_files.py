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
from sparseflash.patterns.grid import Ints
from sparseflash.patterns.mask_file import MAX_HEADER
from sparseflash.patterns.pattern import Bools
from tests.strategies import Shape, expressions, per_head, per_sample, shapes


@given(expressions() | per_head(2) | per_sample(), shapes(300))
def test_a_mask_survives_its_file(tmp_path_factory: pytest.TempPathFactory, pattern: Pattern, shape: Shape) -> None:
    path = tmp_path_factory.mktemp("masks") / "m.safetensors"
    mask = shape.compile(pattern)
    mask.save(path)
    again = BlockMask.load(path)
    assert again == mask
    assert again.expression == mask.expression == str(pattern)
    assert not any(a.flags.writeable for a in (again.tiles, again.pattern_of, again.runs.start, again.runs.code))
    assert [p.name for p in path.parent.iterdir()] == [path.name], "a temporary file is left"


def test_a_mask_remembers_its_own_text() -> None:
    """Equal masks of different expressions keep different texts, and operations on masks none."""
    one = (P.local(5) | P.causal()).compile(100, block=16)
    other = (P.causal() | P.local(5)).compile(100, block=16)
    assert one == other
    assert hash(one) == hash(other)
    assert (one.expression, other.expression) == ("local(5) | causal()", "causal() | local(5)")
    assert P.longformer(512).compile(600).expression == "local(256) | global_tokens(1)"
    assert P.bigbird().compile(600).expression == "bigbird()"
    assert P.causal().compile(100, block=16).expression == "causal()", "a part of an expression got its text"
    for made in (one | other, one & other, one - other, ~one, one.transposed(), BlockMask.from_dense(np.eye(3) > 0)):
        assert made.expression == ""
    assert one is (P.local(5) | P.causal()).compile(100, block=16), "a mask compiled again is the cached one"


def test_one_predicate_under_two_names_keeps_both() -> None:
    def near(q: Ints, k: Ints) -> Bools:
        return np.asarray(np.abs(q - k) < 2)

    named = P.register("near_for_two_names", near)
    masks = [P.where(near).compile(64), named.compile(64)]
    assert masks[0] == masks[1]
    assert masks[0].expression.startswith("where(")
    assert masks[1].expression == "near_for_two_names()"


def test_a_text_can_be_given_and_left_out(tmp_path: Path) -> None:
    mask = P.causal().compile(64)
    for text in ("", "drawn by hand \x00 \n \u2603"):
        mask.save(tmp_path / "m.safetensors", expression=text)
        assert BlockMask.load(tmp_path / "m.safetensors").expression == text


def test_a_text_too_long_to_be_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The longest text that is written is read back; a longer one is refused."""
    path, mask = tmp_path / "m.safetensors", P.causal().compile(64)
    mask.save(path, expression="")
    spare = MAX_HEADER - int.from_bytes(path.read_bytes()[:8], "little")
    mask.save(path, expression="x" * spare)
    assert BlockMask.load(path).expression == "x" * spare
    before = path.read_bytes()
    # safetensors pads headers to a multiple of 8.
    with pytest.raises(ValueError, match=rf"expression of {spare + 8:,} characters .* leaves it out"):
        mask.save(path, expression="x" * (spare + 8))
    assert path.read_bytes() == before
    many = P.documents([1] * 400_000).compile(256)
    with pytest.raises(ValueError, match="expression="):
        many.save(tmp_path / "many.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    many.save(path, expression="")
    assert BlockMask.load(path) == many


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
        assert loaded.expression == mask.expression


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
