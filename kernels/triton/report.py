"""Registers, spills and shared memory of every committed launch, compiled ahead of time. Needs no GPU.

    python -m sparseflash.kernels.triton.report [ARCHITECTURE ...] [BLOCK ...] [features] [split] [tma]

prints one line a launch: plain or with all features on, for whole lines or for split lines, with operands read
through pointers or by descriptors. On sm_90 it also shows the loops of the machine code over FULL / over PARTIAL
entries, see `sass`. It says nothing about speed or numerics. docs/kernels.md is generated from it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from sparseflash.kernels.candidates import GluonLaunch
from sparseflash.kernels.candidates.gluon_forward import gluon_kernel
from sparseflash.kernels.candidates.one_pass import one_pass_kernel
from sparseflash.kernels.launch import COMMITTED, SHARED_MEMORY, Launch, committed
from sparseflash.kernels.triton.backward import prepare_kernel
from sparseflash.kernels.triton.backward_bias import bias_kernel
from sparseflash.kernels.triton.backward_keys import keys_kernel
from sparseflash.kernels.triton.backward_queries import queries_kernel
from sparseflash.kernels.triton.common import padded
from sparseflash.kernels.triton.forward import forward_kernel
from sparseflash.kernels.triton.merge import STEP, outputs_kernel, sums_kernel
from sparseflash.kernels.triton.sass import Loop, disassemble, loops
from sparseflash.kernels.triton.tiles import fragmented
from sparseflash.kernels.triton.types import Bits, ListPointers

KERNELS = {"forward": forward_kernel, "keys": keys_kernel, "queries": queries_kernel}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"half": ("bf16", "fp16"), "single": ("fp32",)}
_MATRICES = {f"{name}_ptr" for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv", "to", "bias")}
_FLOATS = {"scale", "cap"} | {
    f"{name}_ptr"
    for name in ("lse", "dlse", "norm", "delta", "sinks", "slopes", "parts", "lses", "dk_parts", "dv_parts", "sums")
}
# The arguments of a feature, None where it is off.
FEATURES = {
    "softcap": ("cap",),
    "alibi": ("slopes_ptr", "slopes_b", "q_offset"),
    "sinks": ("sinks_ptr",),
    "dropout": ("seed_ptr", "threshold"),
}
# The same for the forms of a bias; a call has one at most.
BIASES = {
    "bias of pairs": ("bias_ptr", "bias_b", "bias_h", "bias_keys", "bias_n", "bias_m"),
    "bias of keys": ("bias_ptr", "bias_b", "bias_h", "bias_keys", "bias_m"),
    "bias of distances": ("bias_ptr", "bias_b", "bias_h", "bias_keys", "reach", "q_offset"),
}
# Those of splits of lines, None where no line is split.
SPLITS = ("items", "parts_ptr", "lses_ptr", "dk_parts_ptr", "dv_parts_ptr")
# Arguments that are NamedTuples of pointers to int32.
GROUPS: dict[str, Any] = {"lists": ListPointers, "bits": Bits}
Constants = dict[str | tuple[str, str], Any]  # by the name of an argument, or by that of a group and a field of it


class Case(NamedTuple):
    """One kernel as some call would compile it."""

    architecture: str
    kernel: str  # of KERNELS, or a candidate: "gluon" or "one_pass"
    D: int
    DV: int
    dtype: str  # as Triton spells it
    block: tuple[int, int]
    launch: Launch | GluonLaunch
    features: tuple[str, ...] = ()  # of FEATURES, those that are on
    split: bool = False  # whether lines are split

    @property
    def at(self) -> Launch | GluonLaunch:
        """The launch with steps no larger than a block; Gluon's are never cut down."""
        return self.launch if isinstance(self.launch, GluonLaunch) else self.launch.within(self.block)


class Resources(NamedTuple):
    """What one program needs."""

    registers: int  # a thread
    spilled: int  # bytes of stack and local memory a thread (NVIDIA), or registers (AMD)
    shared: int  # bytes

    def fits(self, architecture: str, spills: int = 0) -> bool:
        """No more spills than that, and shared memory suffices."""
        return self.spilled <= spills and self.shared <= SHARED_MEMORY[architecture]


def cases(
    architectures: tuple[str, ...] = tuple(TARGETS),
    blocks: tuple[int, ...] = (128,),
    features: tuple[str, ...] = (),
    split: bool = False,
    tma: bool = False,
) -> Iterator[Case]:
    """Every committed launch with square blocks of these sizes, each distinct program once."""
    seen = set()
    for (architecture, D, dtype_class), block in itertools.product(COMMITTED.usual, blocks):
        featured = bool(set(features) - {"sinks"})
        key = architecture, D, dtype_class
        biased = bool(set(features) & set(BIASES))
        launches = committed(key, featured=featured, split=split, block=(block, block), tma=tma, biased=biased)
        for kernel, launch in launches._asdict().items():
            if architecture in architectures:
                case = Case(architecture, kernel, D, D, DTYPES[dtype_class][0], (block, block), launch, features, split)
                if case not in seen:
                    seen.add(case)
                    yield case


def fits(case: Case, used: Resources) -> bool:
    """Whether a committed launch needs no more than it may."""
    key = case.architecture, max(32, padded(max(case.D, case.DV))), "single" if case.dtype == "fp32" else "half"
    featured = bool(set(case.features) - {"sinks"})
    return used.fits(case.architecture, 0 if featured else COMMITTED.spills.get(key, {}).get(case.kernel, 0))


def compile_case(case: Case) -> Any:
    """The compiled kernel of a case, from Triton's cache if it is there."""
    if isinstance(case.launch, GluonLaunch):
        return _compile_gluon(case, case.launch)
    at = case.launch.within(case.block)
    constants: Constants = {
        "UNIT": 8,
        **{"D": case.D, "DP": padded(case.D), "DV": case.DV, "DVP": padded(case.DV)},
        **{"BQ": case.block[0], "BK": case.block[1], "BM": at.BM, "BN": at.BN},
    }
    kernel = {**KERNELS, "one_pass": one_pass_kernel}[case.kernel]
    if case.kernel in ("forward", "queries"):
        constants["FRAGMENTS"] = fragmented(case.architecture, case.dtype == "fp32")
    if not at.tma:
        constants |= dict.fromkeys(argument for argument in kernel.arg_names if argument.endswith("_tiles"))
    off = _off(case)
    constants |= dict.fromkeys(off.intersection(kernel.arg_names))
    if not case.split:
        constants["lists", "work_items"] = None
    if case.kernel in ("keys", "one_pass"):
        constants["bits", "seen"] = None
    return _compile(kernel, constants, case, at.warps, at.stages)


def _off(case: Case) -> set[str]:
    """The arguments that are None."""
    needs = FEATURES | BIASES
    on = {argument for name in case.features for argument in needs[name]}
    return {argument for needed in needs.values() for argument in needed}.difference(on).union(
        () if case.split else SPLITS
    )


def compile_bias(case: Case) -> Any:
    """The compiled kernel of a bias's gradient, for the shapes and the launch of a case of `keys`."""
    at = case.at
    constants: Constants = {
        "UNIT": 8,
        **{"D": case.D, "DP": padded(case.D), "DV": case.DV, "DVP": padded(case.DV)},
        **{"BQ": case.block[0], "BK": case.block[1], "BM": at.BM, "BN": at.BN},
        **dict.fromkeys(_off(case).intersection(bias_kernel.arg_names)),
        ("lists", "work_items"): None,
        ("bits", "seen"): None,
    }
    return _compile(bias_kernel, constants, case, at.warps, at.stages)


def compile_prepare(case: Case) -> Any:
    """The compiled kernel that writes norm and delta, for the shapes of a case."""
    step = min(case.block[0], 64)
    constants: Constants = {"UNIT": 8, "DV": case.DV, "DVP": padded(case.DV), "BM": step}
    return _compile(prepare_kernel, constants, case, 4, 1)


def compile_merges(case: Case) -> Iterator[Any]:
    """The compiled kernels that put the splits of lines together, for the shapes of a case."""
    constants: Constants = {"D": case.DV, "DP": padded(case.DV), "BL": case.block[0], "BM": STEP}
    without_sinks: Constants = {} if "sinks" in case.features else {"sinks_ptr": None}
    yield _compile(outputs_kernel, constants | without_sinks, case, 4, 1)
    yield _compile(sums_kernel, constants, case, 4, 1)


def _compile(kernel: Any, constants: Constants, case: Case, warps: int, stages: int) -> Any:
    signature = {name: _type(name, case.dtype) for name in kernel.arg_names}
    if kernel is one_pass_kernel:
        signature["dq_ptr"] = "*fp32"  # sums of all programs
    for name in signature:
        if name.endswith("_tiles") and name not in constants:
            rows = constants["BM" if kernel in (keys_kernel, one_pass_kernel) else "BN"]
            width = constants["DVP" if name in ("v_tiles", "dout_tiles") else "DP"]
            dtype = "fp32" if name == "dq_tiles" else case.dtype
            signature[name] = f"tensordesc<{dtype}[1, 1, {rows}, {width}]>"
    options = {"num_warps": warps, "num_stages": stages}
    return built(ASTSource, kernel, signature, constants, case.architecture, options)


def _compile_gluon(case: Case, at: GluonLaunch) -> Any:
    dtype = {"bf16": gl.bfloat16, "fp16": gl.float16}[case.dtype]
    constants: Constants = {
        **{"D": case.D, "DV": case.DV, "BQ": case.block[0], "BK": case.block[1], "BM": at.BM, "BN": at.BN},
        **{"STAGES": at.stages, "QUERIES": 2 if at.persistent else 1, "WARPS": at.warps},
        **({} if "sinks" in case.features else {"sinks_ptr": None}),
        ("lists", "work_items"): None,
    }
    signature = {name: _type(name, case.dtype) for name in gluon_kernel.arg_names}
    for name, rows, width in (("q_tiles", at.BM, case.D), ("k_tiles", at.BN, case.D), ("v_tiles", at.BN, case.DV)):
        box = [1, 1, rows, width]
        signature[name] = f"tensordesc<{case.dtype}{box},{gl.NVMMASharedLayout.get_default_for(box, dtype)!r}>"
    options = {"num_warps": at.warps}
    return built(GluonASTSource, gluon_kernel, signature, constants, case.architecture, options)


def built(
    language: Any, kernel: Any, signature: dict[str, str], constants: Constants, architecture: str, options: Any
) -> Any:
    """A kernel compiled as a call would compile it whose operands start at multiples of 16 bytes.

    Args:
        language: Triton's source of an AST, or Gluon's.
        kernel: from ``triton.jit``.
        signature: the types of its arguments; groups of pointers and constants may be left out.
        constants: by name, or by group and field.
        architecture: one of TARGETS.
        options: of the launch.
    """
    types: dict[str, Any] = {}
    values: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name, group = parameter.name, GROUPS.get(parameter.name)
        fields = () if group is None else enumerate(group._fields)
        leaves: dict[tuple[int, ...], Any] = {(i, j): (name, field) for j, field in fields} or {(i,): name}
        values |= {path: constants[leaf] for path, leaf in leaves.items() if leaf in constants}
        kinds = ["constexpr" if path in values else "*i32" if group else signature[name] for path in leaves]
        types[name] = group(*kinds) if group else kinds[0]
        if not parameter.do_not_specialize:
            pointers = (path for path, kind in zip(leaves, kinds, strict=True) if kind.startswith("*"))
            aligned |= {path: [["tt.divisibility", 16]] for path in pointers}
    return triton.compile(language(kernel, types, values, aligned), target=TARGETS[architecture], options=options)


def _type(argument: str, dtype: str) -> str:
    if argument in _MATRICES:
        return f"*{dtype}"
    kind = "fp32" if argument in _FLOATS else "i64" if argument == "seed_ptr" else "i32"
    return f"*{kind}" if argument.endswith("_ptr") else kind


def resources(compiled: Any) -> Resources:
    """Read registers and spills from the binary (NVIDIA) or the assembly (AMD)."""
    if "amdgcn" in compiled.asm:
        found = dict(re.findall(r"^\s*\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE))
        spilled = int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"])
        spilled += int(found["private_segment_fixed_size"])
        return Resources(int(found["vgpr_count"]), spilled, compiled.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return Resources(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared)


def programs_per_sm(case: Case, used: Resources) -> int:
    """How many programs an sm_90 multiprocessor holds: of 65,536 registers, 228K of shared memory, 2,048 threads.

    Registers are given to a warp in units of 256, and each program's shared memory takes 1K more (Hopper tuning guide).
    """
    warps = case.launch.warps
    registers = -(-used.registers // 8) * 8 * 32 * warps
    return min(65536 // registers, (228 << 10) // (used.shared + 1024), 64 // warps)


def loops_of(compiled: Any) -> list[Loop]:
    """The loops with matrix products of tensor cores in an sm_90 kernel: over FULL entries, then over PARTIAL ones."""
    return loops(disassemble(compiled.asm["cubin"]))


def described(found: list[Loop]) -> str:
    """Loops on one line: what a `Loop` has, over FULL / over PARTIAL entries."""
    counts = ("instructions", "products", "waits")
    parts = [f"{name} " + "/".join(str(getattr(loop, name)) for loop in found) for name in counts]
    return ", ".join([*parts, "overlapped " + "/".join(f"{x.overlapped} of {x.exponentials}" for x in found)])


def form_of(launch: Launch | GluonLaunch) -> str:
    """What a launch is beside its numbers, in words."""
    if isinstance(launch, GluonLaunch):
        return " persistent" * (launch.persistent > 0)
    return " tma" * launch.tma


def line(case: Case, used: Resources) -> str:
    """One line of the report."""
    at = case.at
    form = "+".join(case.features) + " split" * case.split + form_of(at)
    return (
        f"{case.architecture:7} {case.kernel:8} D {case.D:3} {case.dtype:5} block {case.block[0]:3}x{case.block[1]:<3} "
        f"step {at.BM:3}x{at.BN:<3} warps {at.warps} stages {at.stages} {form} | "
        f"registers {used.registers:3} spilled {used.spilled:4} shared {used.shared / 1024:5.1f}K"
        f"{'' if fits(case, used) else '  DOES NOT FIT'}"
    )


def main(arguments: list[str]) -> int:
    """Print the report for some architectures and square blocks, or for all; 1 if one does not fit or is serialised."""
    features = tuple(FEATURES) if "features" in arguments else ()
    split, tma = "split" in arguments, "tma" in arguments
    architectures = tuple(a for a in arguments if not a.isdigit() and a not in ("features", "split", "tma"))
    blocks = tuple(int(a) for a in arguments if a.isdigit())
    bad = 0
    for case in cases(architectures or tuple(TARGETS), blocks or (16, 32, 64, 128), features, split, tma):
        compiled = compile_case(case)
        used = resources(compiled)
        found = loops_of(compiled) if case.architecture == "sm_90" and case.dtype != "fp32" else []
        bad += not fits(case, used) or any(loop.serialised for loop in found)
        shown = f", {programs_per_sm(case, used)} a multiprocessor | {described(found)}" if found else ""
        print(line(case, used) + shown, flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
