"""The launch table, and what keeps one binary per configuration."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.gpu.launch_file import written
from sparseflash.kernels.launch import (
    COMMITTED,
    FILE,
    INTERPRETER,
    SHARED_MEMORY,
    Configuration,
    Launch,
    committed,
    configuration,
    family,
    parsed,
)

TABLE, TMA, NARROW, FEATURED, SPLIT = COMMITTED[:5]
HEAD_DIMS = (32, 64, 128, 256)


def test_every_architecture_head_dim_and_dtype_has_a_row() -> None:
    assert set(TABLE) == {(a, d, t) for a in SHARED_MEMORY for d in HEAD_DIMS for t in ("half", "single")}


def test_a_cpu_gets_the_interpreter() -> None:
    cpu = torch.device("cpu")
    assert family(cpu) == "interpreter"
    assert configuration(cpu, 64, torch.float16, featured=False, split=False, block=(64, 64), tma=True) == INTERPRETER


def test_replacements_for_features_replace_something() -> None:
    for key, launches in FEATURED.items():
        for kernel, launch in launches.items():
            assert launch != getattr(TABLE[key], kernel)


def taken(key: tuple[str, int, str], **more: Any) -> Configuration:
    """What is committed for plain attention through whole lines of square blocks of 128, but for what is said."""
    usual: dict[str, Any] = {"featured": False, "split": False, "block": (128, 128), "tma": False}
    return committed(key, **(usual | more))


def test_launches_for_descriptors_and_narrow_blocks_are_taken_where_they_serve() -> None:
    for key, launches in TMA.items():
        assert all(launch.tma for launch in launches.values())
        assert taken(key, tma=True)._asdict() == TABLE[key]._asdict() | launches
        assert taken(key) == TABLE[key]
        featured = taken(key, featured=True, tma=True)
        assert featured == taken(key, featured=True), "with features programs hold too much for these launches"
    for key, launches in NARROW.items():
        for block, held in (
            ((64, 128), ("forward", "queries")),
            ((128, 64), ("keys",)),
            ((64, 64), TABLE[key]._fields),
        ):
            wanted = {kernel: launch for kernel, launch in launches.items() if kernel in held}
            readable = TABLE[key]._asdict() | TMA.get(key, {}) | wanted
            assert taken(key, block=block, tma=True)._asdict() == readable
            through_pointers = taken(key, block=block)
            assert not any(launch.tma for launch in through_pointers), "no descriptors, no launch that asks for them"
            assert through_pointers._asdict() == TABLE[key]._asdict() | {
                kernel: launch._replace(tma=False) for kernel, launch in wanted.items()
            }
        assert taken(key, featured=True, block=(64, 64)) == taken(key, featured=True)


def test_launches_for_splits_replace_only_themselves() -> None:
    for key, launches in SPLIT.items():
        for featured in (False, True):
            whole, split = (taken(key, featured=featured, split=split)._asdict() for split in (False, True))
            assert split == whole | launches
        assert any(launch != getattr(TABLE[key], kernel) for kernel, launch in launches.items())


def test_the_file_is_as_the_tuner_writes_it() -> None:
    text = FILE.read_text("utf-8")
    assert written(COMMITTED) == text
    assert parsed(text) == COMMITTED


ROWS = """[sm_90.half.64]
forward = {step = [128, 64], warps = 4, stages = 3}
keys = {step = [64, 64], warps = 4, stages = 3}
queries = {step = [64, 128], warps = 4, stages = 3, tma = true}
"""


@pytest.mark.parametrize(
    ("was", "instead", "words"),
    [
        (
            "sm_90.half",
            "sm_91.half",
            r"\[sm_91.half\] must name one of sm_80, sm_90, sm_100, gfx942 and half or",
        ),
        ("sm_90.half", "sm_90.bf16", r"\[sm_90.bf16\] must name one of"),
        ("half.64", "half.96", r"\[sm_90.half.96\] must name head dim 32, 64, 128 or 256"),
        ("keys =", "key =", r"\[sm_90.half.64\] has 'key', which is no kernel and no situation"),
        ("keys =", "# keys =", r"\[sm_90.half.64\] has no launch for keys"),
        ("[128, 64]", "[128, 96]", r"sm_90.half.64.forward.step must be two powers of two .*; got \[128, 96\]"),
        ("[128, 64]", "128", r"sm_90.half.64.forward.step must be two powers of two .*; got 128"),
        ("warps = 4", "warps = 3", r"sm_90.half.64.forward must have 1 to 16 warps"),
        ("stages = 3", "stages = 3.0", r"sm_90.half.64.forward must have .* 1 to 8 stages"),
        ("tma = true", "tma = 1", r"sm_90.half.64.queries must have .* a boolean tma"),
        ("tma = true", "ahead = true", r"sm_90.half.64.queries must have step, warps and stages, and may have tma"),
        ("warps = 4, ", "", r"sm_90.half.64.forward must have step, warps and stages"),
    ],
)
def test_what_is_no_launch_is_refused(was: str, instead: str, words: str) -> None:
    assert parsed(ROWS).usual["sm_90", 64, "half"].queries == Launch(64, 128, 4, 3, tma=True)
    with pytest.raises(ValueError, match=words):
        parsed(ROWS.replace(was, instead, 1))
    with pytest.raises(ValueError, match=r"sm_90.half.64.spills.keys must be a number of bytes; got -1"):
        parsed(ROWS + "[sm_90.half.64.spills]\nkeys = -1\n")
    with pytest.raises(ValueError, match=r"sm_90.half.64.split.once must name one of forward, keys, queries"):
        parsed(ROWS + "[sm_90.half.64.split]\nonce = {step = [16, 16], warps = 4, stages = 1}\n")


EVERY = {
    launch
    for row in (*TABLE.values(), *(row.values() for table in (FEATURED, SPLIT, TMA, NARROW) for row in table.values()))
    for launch in row
}


@pytest.mark.parametrize("launch", sorted(EVERY), ids=str)
def test_steps_divide_every_block(launch: Launch) -> None:
    for BQ in (16, 32, 64, 128, 256):
        for BK in (16, 32, 64, 128, 256):
            step = launch.within((BQ, BK))
            assert BQ % step.BM == 0
            assert BK % step.BN == 0
            assert min(step.BM, step.BN) >= 16


def test_a_launch_of_too_many_programs_is_refused() -> None:
    from sparseflash.kernels.triton.common import programs

    assert programs(1 << 10, 2, (1 << 20) - 1) == ((1 << 31) - (1 << 11),)
    with pytest.raises(ValueError, match="2,147,483,648 programs, and one launch takes 2,147,483,647: attend to fewer"):
        programs(1 << 10, 2, 1 << 20)


def test_the_table_is_read_without_triton() -> None:
    code = "import sys, sparseflash.kernels.launch, sparseflash.kernels.layout; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
