"""The loops of one NVIDIA kernel's machine code: size, products, waits, and what overlaps them.

On Hopper a product of tensor cores (HGMMA) is asynchronous. A group of them is closed by its last one, which names a
scoreboard (gsb0), and WARPGROUP.DEPBAR.LE gsb0, n waits until at most n closed groups are unfinished. Two things go
wrong silently here, and only the machine code tells (the compiler's own representations do not: ptxas moves the waits):

- ptxas *serialises* products, that is, waits after every single one, when it cannot prove their registers untouched;
- exponentials, the other half of attention's work, run while no product is in flight, so that the tensor cores idle.

Instructions are read in the order of their addresses, as if no branch inside a loop were taken.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?\s*([^;]+?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"^BRA\S* (?:!?U?P\w+, )?0x([0-9a-f]+)")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")


class Loop(NamedTuple):
    """One iteration of an innermost loop, in instructions that every thread issues."""

    instructions: int
    products: int  # HGMMA, each of 16 columns of the left operand
    waits: int  # for groups of products
    exponentials: int
    overlapped: int  # those of them that run while a product is in flight, once the loop has come round

    @property
    def serialised(self) -> bool:
        """Whether products wait for each other instead of running in groups: a group has two or more, and one wait."""
        return self.waits > 3 or 2 * self.waits > self.products


def disassemble(cubin: bytes) -> str:
    """The machine code of a cubin as text, by the tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[Loop]:
    """The innermost loops that hold products, by address."""
    code = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    ends: dict[int, int] = {}  # by a loop's first address, its last
    for at, text in code:
        if (branch := _BRANCH.match(text)) and (first := int(branch[1], 16)) < at:
            ends[first] = at
    inner = [
        (first, last)
        for first, last in ends.items()
        if not any(first <= other and end <= last and (first, last) != (other, end) for other, end in ends.items())
    ]
    bodies = ([text for at, text in code if first <= at <= last] for first, last in sorted(inner))
    return [found for body in bodies if (found := _loop(body)).products]


def _loop(body: list[str]) -> Loop:
    unfinished, group_open = 0, False  # closed groups in flight; whether one is being issued
    for _ in range(2):  # the first time round shows what is in flight when the second one starts
        overlapped = 0
        for text in body:
            if text.startswith("HGMMA"):
                group_open = "gsb0" not in text
                unfinished += not group_open
            elif wait := _WAIT.match(text):
                unfinished = min(unfinished, int(wait[1], 16))
            elif text.startswith("MUFU.EX2"):
                overlapped += group_open or unfinished > 0
    products, waits, exponentials = (
        sum(text.startswith(name) for text in body) for name in ("HGMMA", "WARPGROUP.DEPBAR", "MUFU.EX2")
    )
    return Loop(len(body), products, waits, exponentials, overlapped)
