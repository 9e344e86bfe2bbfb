"""The launch table, and what keeps one binary per configuration."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from sparseflash.kernels.launch import (
    FEATURED,
    INTERPRETER,
    NARROW,
    ONCE,
    PIECES,
    SHARED_MEMORY,
    TABLE,
    TMA,
    Configuration,
    Launch,
    committed,
    configuration,
    family,
)

HEAD_DIMS = (32, 64, 128, 256)


def test_every_architecture_head_dim_and_dtype_has_a_row() -> None:
    assert set(TABLE) == {(a, d, t) for a in SHARED_MEMORY for d in HEAD_DIMS for t in ("half", "single")}


def test_a_cpu_gets_the_interpreter() -> None:
    cpu = torch.device("cpu")
    assert family(cpu) == "interpreter"
    assert configuration(cpu, 64, torch.float16, featured=False, cut=False, block=(64, 64), tma=True) == INTERPRETER


def test_replacements_for_features_replace_something() -> None:
    for key, launches in FEATURED.items():
        for kernel, launch in launches.items():
            assert launch != getattr(TABLE[key], kernel)


def taken(key: tuple[str, int, str], **more: Any) -> Configuration:
    """What is committed for plain attention through whole lines of square blocks of 128, but for what is said."""
    usual: dict[str, Any] = {"featured": False, "cut": False, "block": (128, 128), "tma": False}
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
            assert not any(launch.tma for launch in through_pointers if launch), (
                "no descriptors, no launch that asks for them"
            )
            assert through_pointers._asdict() == TABLE[key]._asdict() | {
                kernel: launch._replace(tma=False) for kernel, launch in wanted.items()
            }
        assert taken(key, featured=True, block=(64, 64)) == taken(key, featured=True)


def test_launches_for_pieces_replace_only_themselves() -> None:
    for key, launches in PIECES.items():
        for featured in (False, True):
            whole, cut = (taken(key, featured=featured, cut=cut)._asdict() for cut in (False, True))
            assert cut == whole | launches
        assert any(launch != getattr(TABLE[key], kernel) for kernel, launch in launches.items())


def test_one_pass_is_taken_for_whole_lines_without_features_and_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    key, tiled = ("sm_90", 64, "half"), Launch(64, 64, 4, 3, tma=True)
    assert taken(key, tma=True).once is None, "it waits for a measurement"
    monkeypatch.setitem(ONCE, key, tiled)
    assert taken(key, tma=True).once == tiled
    for other in ({}, {"tma": True, "cut": True}, {"tma": True, "featured": True}):
        assert taken(key, **other).once is None
    monkeypatch.setitem(ONCE, key, plain := tiled._replace(tma=False))
    assert taken(key).once == taken(key, tma=True).once == plain
    assert taken(("sm_90", 128, "half"), tma=True).once is None


COMMITTED = {
    launch
    for row in (*TABLE.values(), *(row.values() for table in (FEATURED, PIECES, TMA, NARROW) for row in table.values()))
    for launch in row
    if launch is not None
}


@pytest.mark.parametrize("launch", sorted(COMMITTED), ids=str)
def test_steps_divide_every_block(launch: Launch) -> None:
    for BQ in (16, 32, 64, 128, 256):
        for BK in (16, 32, 64, 128, 256):
            step = launch.within((BQ, BK))
            assert BQ % step.BM == 0
            assert BK % step.BN == 0
            assert min(step.BM, step.BN) >= 16


def test_a_launch_of_too_many_programs_is_refused() -> None:
    from sparseflash.kernels.triton_common import programs

    assert programs(1 << 10, 2, (1 << 20) - 1) == ((1 << 31) - (1 << 11),)
    with pytest.raises(ValueError, match="2,147,483,648 programs, and one launch takes 2,147,483,647: attend to fewer"):
        programs(1 << 10, 2, 1 << 20)


def test_the_table_is_read_without_triton() -> None:
    code = "import sys, sparseflash.kernels.launch, sparseflash.kernels.layout; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
