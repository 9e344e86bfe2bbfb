"""Compile the decoding kernels ahead of time, for GPUs that need not be here. Gates: no spills, shared memory fits."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
from triton.compiler import ASTSource

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles; not for the interpreter", allow_module_level=True)

from sparseflash.kernels.launch import SHARED_MEMORY
from sparseflash.kernels.triton.common import padded
from sparseflash.kernels.triton.decode import FEATURED, LAUNCHES, MOST_PARTS, committed, decode_kernel, merge_kernel
from sparseflash.kernels.triton.report import DTYPES, GROUPS, TARGETS, Constants, Resources, built, resources

pytestmark = pytest.mark.tier2

KERNELS = {"decode": decode_kernel, "merge": merge_kernel}


def compiled(kernel: Any, architecture: str, types: dict[str, str], constants: Constants, **options: int) -> Any:
    """A kernel as some call would compile it; arguments without a type are int32."""
    signature = {name: types.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
    return built(ASTSource, kernel, signature, constants, architecture, options)


def decoding(
    key: tuple[str, int, str],
    *,
    dims: tuple[int, int] | None = None,
    bk: int = 128,
    lengths: str = "i32",
    parts: bool = True,
    featured: bool = False,
) -> Any:
    """The decoding kernel for a row of the table."""
    architecture, head_dim, dtype_class = key
    at = committed(key, featured).within((256, bk))
    dtype = DTYPES[dtype_class][0]
    D, DV = dims or (head_dim, head_dim)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}")
    types |= {"out_ptr": "*fp32" if parts else f"*{dtype}", "lse_ptr": "*fp32", "scale": "fp32"}
    types["lengths_ptr"] = f"*{lengths}"
    types |= {"cap": "fp32", "slopes_ptr": "*fp32"}
    constants: Constants = {"UNIT": 8, "D": D, "DP": padded(D), "DV": DV, "DVP": padded(DV)}
    if not featured:
        constants |= dict.fromkeys(("cap", "slopes_ptr", "slopes_b"))
    constants |= {"BK": bk, "BM": at.BM, "BN": at.BN, ("lists", "order"): None, ("lists", "work_items"): None}
    return compiled(decode_kernel, architecture, types, constants, num_warps=at.warps, num_stages=at.stages)


def needed(kernel: Any) -> Resources:
    """What one program needs. On AMD what counts as spilled is memory.

    Scalar registers that spill there move into lanes of vector registers, of which these kernels leave many free.
    """
    need = resources(kernel)
    if "amdgcn" not in kernel.asm:
        return need
    found = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", kernel.asm["amdgcn"], re.MULTILINE))
    return need._replace(spilled=int(found["vgpr_spill_count"]) + int(found["private_segment_fixed_size"]))


def test_every_architecture_head_dim_and_dtype_has_a_launch() -> None:
    assert set(LAUNCHES) == {(a, d, t) for a in SHARED_MEMORY for d in (32, 64, 128, 256) for t in DTYPES}
    assert set(FEATURED) <= set(LAUNCHES)
    for at in (*LAUNCHES.values(), *FEATURED.values()):
        for bk in (16, 32, 64, 128, 256):
            assert bk % at.within((256, bk)).BN == 0


@pytest.mark.parametrize("featured", [False, True], ids=["plain", "featured"])
@pytest.mark.parametrize("architecture", TARGETS)
def test_committed_launches_fit(architecture: str, featured: bool) -> None:
    used = {key: needed(decoding(key, featured=featured)) for key in LAUNCHES if key[0] == architecture}
    assert len(used) == 8
    table = "\n".join(f"{key}: {need}" for key, need in used.items())
    print(table)
    assert all(need.fits(architecture) for need in used.values()), table


@pytest.mark.parametrize(
    "odd",
    [
        {"key": ("sm_90", 128, "half"), "dims": (96, 72), "bk": 64, "lengths": "i64"},
        {"key": ("sm_90", 256, "half"), "dims": (80, 160), "bk": 256},
        {"key": ("sm_80", 32, "half"), "dims": (16, 24), "bk": 16, "parts": False},
        {"key": ("sm_90", 64, "single"), "dims": (40, 64), "bk": 16, "parts": False},
    ],
    ids=str,
)
def test_odd_head_dims_and_small_blocks_fit(odd: dict[str, Any]) -> None:
    need = needed(decoding(**odd))
    assert need.fits(odd["key"][0]), need


@pytest.mark.parametrize("DV", [64, 72, 256])
@pytest.mark.parametrize("architecture", TARGETS)
def test_the_merge_fits(architecture: str, DV: int) -> None:
    types = {"parts_ptr": "*fp32", "lses_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": "*bf16"}
    constants: Constants = {"DV": DV, "DVP": padded(DV), "MOST": MOST_PARTS}
    need = needed(compiled(merge_kernel, architecture, types, constants, num_warps=8 if DV > 128 else 4))
    assert need.fits(architecture), need


def test_loads_stay_in_flight() -> None:
    waits = []
    depth = 0
    for line in decoding(("sm_90", 128, "half")).asm["ttgir"].splitlines():
        depth += "scf.for" in line or "scf.while" in line
        depth -= "scf.yield" in line
        if depth > 0 and (found := re.search(r"async_wait .*num = (\d+)", line)):
            waits.append(int(found[1]))
    assert sum(wait > 0 for wait in waits) >= 2, f"prefetch drains: {waits}"


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_no_run_time_argument_is_specialised_by_value(kernel: Any) -> None:
    for parameter in kernel.params:
        if not parameter.is_constexpr and not parameter.name.endswith("_ptr") and parameter.name not in GROUPS:
            assert parameter.do_not_specialize, f"{parameter.name} would compile a kernel per value"
