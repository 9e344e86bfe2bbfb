"""Mask files of which each part is well-formed, and which mean nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sparseflash import patterns as P
from sparseflash.patterns.mask_file import save
from sparseflash.patterns.runs import Runs
from tests.limits import little_memory

MASK = (P.causal() & P.local(30)).compile(200, block=32)  # 7 x 7 blocks
HUGE = [1 << 40, 1 << 40]

FORGED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"other": np.zeros(1)}, {}, "expected the arrays"),
    ({"start": np.zeros(1, np.float64)}, {}, "start must be <i8, got float64"),
    ({}, {"shape": json.dumps(HUGE)}, r"block rows for \d+ runs; at most"),
    ({}, {"shape": "[200]"}, "shape is"),
    ({}, {"block": '["32", 32]'}, "block is"),
    ({"tiles": np.zeros((1, 16, 1), np.uint32)}, {}, "tiles of shape"),
    ({"pattern_of": np.full((1, 1), 5)}, {}, "pattern_of is out of range"),
    ({"start": np.zeros(1, np.int64)}, {}, "runs of unequal number"),
    ({"start": MASK.runs.start[::-1]}, {}, "runs are out of range or overlap"),
    ({"stop": np.append(MASK.runs.stop[:-1], MASK.runs.start[-1])}, {}, "runs are out of range or overlap"),
    ({"stop": MASK.runs.stop + 49}, {}, "runs are out of range or overlap|crosses a row"),
    ({"letter": MASK.runs.code + 9}, {}, "a block code has no tile"),
    ({"letter": np.ones_like(MASK.runs.code)}, {}, "the checksum does not match"),
]


@pytest.mark.parametrize(("arrays", "metadata", "message"), FORGED, ids=[f"{i}: {f[2]}" for i, f in enumerate(FORGED)])
def test_a_forged_mask_is_refused(
    tmp_path: Path, arrays: dict[str, Any], metadata: dict[str, str], message: str
) -> None:
    path = tmp_path / "m.safetensors"
    MASK.save(path)
    with safe_open(path, "numpy") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
        said = dict(file.metadata())
    for name, array in arrays.items():
        kind = held[name].dtype if name in held and array.dtype.kind != "f" else array.dtype
        held[name] = np.ascontiguousarray(array.astype(kind))
    save_file(held, path, said | metadata)
    with pytest.raises(ValueError, match=f"m.safetensors: damaged block mask.*({message})"):
        P.BlockMask.load(path)


def test_a_run_that_crosses_a_row_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    P.causal().compile(64, block=32).save(path)
    with safe_open(path, "numpy") as file:
        held, said = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    kinds = {name: held[name].dtype for name in ("start", "stop", "letter")}
    held |= {name: np.array([n], kinds[name]) for name, n in (("start", 1), ("stop", 3), ("letter", 1))}
    save_file(held, path, said)
    with pytest.raises(ValueError, match="a run crosses a row"):
        P.BlockMask.load(path)


def test_runs_that_are_not_the_longest_are_refused(tmp_path: Path) -> None:
    """Two runs of one code side by side, with a checksum of their own: another mask than the one it equals."""
    whole = P.full().compile(64, block=32)
    start, stop = (np.array(values, np.int64) for values in ([0, 1, 2, 3], [1, 2, 3, 4]))
    forged = replace(whole, runs=Runs(whole.runs.shape, start, stop, np.ones(4, np.int32)))
    path = tmp_path / "m.safetensors"
    save(forged, path, "")
    with pytest.raises(ValueError, match="not in canonical form"):
        P.BlockMask.load(path)


def forged_rows(path: Path, shape: list[int], patterns: int) -> None:
    """A small file that claims many block rows."""
    with safe_open(path, "numpy") as file:
        held, said = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    held["pattern_of"] = np.arange(patterns, dtype=np.int32)[None]
    save_file(held, path, said | {"shape": json.dumps(shape)})


@pytest.mark.parametrize(
    ("shape", "patterns"), [([1 << 30, 1 << 40], 1), ([200, 200], 1 << 18), ([1 << 20, 1 << 40], 64)]
)
def test_a_small_file_cannot_claim_many_rows(tmp_path: Path, shape: list[int], patterns: int) -> None:
    path = tmp_path / "m.safetensors"
    MASK.save(path)
    forged_rows(path, shape, patterns)
    with little_memory(256), pytest.raises(ValueError, match="block rows for 13 runs; at most 1,048,784 are read"):
        P.BlockMask.load(path)


def test_empty_rows_in_reasonable_number_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    sparse = (P.causal() - P.causal()).compile(1 << 20, block=128)
    sparse.save(path)
    assert P.BlockMask.load(path) == sparse


def test_a_sparse_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    MASK.save(path)
    with path.open("r+b") as file:
        file.truncate(60 << 30)
    with little_memory(256), pytest.raises(ValueError, match=r"64,424,509,440 bytes; at most 1,073,741,824 are read"):
        P.BlockMask.load(path)
    small = tmp_path / "small.safetensors"
    MASK.save(small)
    with pytest.raises(
        ValueError, match=r"bytes; at most 100 are read, unless load\(path, max_bytes=...\) allows more"
    ):
        P.BlockMask.load(small, max_bytes=100)
