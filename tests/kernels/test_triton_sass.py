"""What is read from machine code, on listings short enough to count by eye."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("reads what was compiled; not for the interpreter", allow_module_level=True)

from sparseflash.kernels.triton.sass import Loop, loops


def listing(*instructions: str) -> str:
    """As cuobjdump writes it: an address, an instruction, its encoding in two lines."""
    return "\n".join(
        f"        /*{16 * i:04x}*/  {text:60} ;   /* 0x00000a00ff017b82 */\n{'':80}/* 0x000e700000000800 */"
        for i, text in enumerate(instructions)
    )


WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
OPEN, CLOSE = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
EXP = "MUFU.EX2 R4, R4"


def test_a_plain_loop_overlaps_nothing() -> None:
    assert loops(listing("NOP", OPEN, CLOSE, WAIT, EXP, "FADD R1, R1, R2", "@P0 BRA 0x10", "EXIT")) == [
        Loop(instructions=6, products=2, waits=1, exponentials=1, overlapped=0)
    ]


def test_what_runs_between_a_product_and_its_wait_overlaps() -> None:
    assert loops(listing(OPEN, EXP, CLOSE, EXP, WAIT, EXP, "BRA 0x0"))[0].overlapped == 2


def test_a_product_left_in_flight_overlaps_the_next_iteration() -> None:
    assert loops(listing(EXP, WAIT, EXP, OPEN, CLOSE, "@!P1 BRA 0x0"))[0].overlapped == 1


def test_a_wait_may_leave_later_groups_in_flight() -> None:
    first = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    loop = loops(listing(OPEN, CLOSE, OPEN, CLOSE, first, EXP, WAIT, EXP, "@P0 BRA 0x0"))[0]
    assert (loop.products, loop.waits, loop.overlapped) == (4, 2, 1)
    assert not loop.serialised


def test_a_wait_after_every_product_is_serialised() -> None:
    assert loops(listing(CLOSE, WAIT, CLOSE, WAIT, "@P0 BRA 0x0"))[0].serialised
    assert loops(listing(*(OPEN, OPEN, OPEN, CLOSE, WAIT) * 4, "@P0 BRA 0x0"))[0].serialised


def test_only_innermost_loops_with_products_count() -> None:
    first, second = (OPEN, CLOSE, WAIT, "@P0 BRA 0x10"), (OPEN, CLOSE, "@P2 BRA 0x60")
    found = loops(listing(EXP, *first, EXP, *second, "BRA 0x0"))
    assert [(loop.instructions, loop.products) for loop in found] == [(4, 2), (3, 2)]
    assert loops(listing("NOP", "EXIT", "BRA 0x20")) == [], "code ends in a branch to itself"
