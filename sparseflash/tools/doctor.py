"""Installed versions, the devices of this machine, and a test of each backend."""

import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparseflash import __version__, parse, reference
from sparseflash.functional.attention import attention
from sparseflash.kernels.cpu import build, levels, native

PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "einops", "safetensors", "tensorboard"),
    *("typer", "rich", "pillow", "matplotlib"),
)


@dataclass(frozen=True)
class Gpu:
    """A device that torch finds."""

    name: str
    capability: str
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """Cores and GPUs of this machine."""

    system: str
    cores: int | None
    torch_threads: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Backend:
    """The outcome of a small forward and backward.

    Attributes:
        works: whether the results were right.
        why: why it does not work, or how it works.
        tried: the test; None if nothing was run.
        largest_error: error against float64; None if nothing was run.
    """

    works: bool
    why: str | None = None
    tried: str | None = None
    largest_error: float | None = None


@dataclass(frozen=True)
class CpuKernel:
    """The implementation of attention on a CPU.

    Attributes:
        name: name of the build, or ``"plain"`` for torch.
        gives: description.
        why: why it is not the fastest for this processor; None if it is.
        faster: the command that makes it faster; None if there is none.
    """

    name: str
    gives: str
    why: str | None
    faster: str | None


@dataclass(frozen=True)
class Examination:
    """Installed versions, devices, and backends that work.

    Attributes:
        versions: version of each package; None if it is not installed.
        machine: cores and GPUs.
        backends: test results by name.
        cpu_kernel: the implementation of backend ``"cpu"``.
    """

    versions: dict[str, str | None]
    machine: Machine
    backends: dict[str, Backend]
    cpu_kernel: CpuKernel

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without fields that do not apply to a backend."""
        backends = {
            name: {key: value for key, value in asdict(backend).items() if value is not None}
            for name, backend in self.backends.items()
        }
        return asdict(self) | {"backends": backends}


def examine() -> Examination:
    """Versions, devices, and the outcome of a small forward and backward on every backend.

    Example:
        >>> examine().backends["cpu"].works
        True
    """
    gpus = tuple(_gpu(index) for index in range(torch.cuda.device_count()))
    return Examination(
        versions={
            "sparseflash": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        machine=Machine(platform.platform(), os.cpu_count(), torch.get_num_threads(), gpus),
        backends={"cpu": _tried("cpu", "cpu", torch.float32), "triton": _triton(bool(gpus))},
        cpu_kernel=_cpu_kernel(),
    )


def _cpu_kernel() -> CpuKernel:
    library, why = native.library(), native.missing() or native.lesser()
    gives = {level.name: level.gives for level in levels.LEVELS}
    gives[native.PLAIN] = "torch, a block row at a time: as right, and slower"
    name = library.name if library else native.PLAIN
    return CpuKernel(name, gives[name], why, _faster() if why else None)


def _faster() -> str | None:
    if os.environ.get(native.VARIABLE):
        return f"unset {native.VARIABLE}"
    if not levels.runnable(native.capabilities()):
        return None
    python = shlex.quote(sys.executable)
    compiles = f"{python} {shlex.quote(str(Path(build.__file__).resolve()))}"
    return compiles if build.compiler() else f"{python} -m pip install ziglang && {compiles}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, f"{properties.major}.{properties.minor}", round(properties.total_memory / 2**30, 1))


def _triton(gpu: bool) -> Backend:
    if _version("triton") is None:
        return Backend(False, why="triton is not installed")
    if gpu:
        return _tried("triton", "cuda", torch.float16)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return replace(_tried("triton", "cpu", torch.float32), why="in Triton's interpreter: for tests, slow")
    return Backend(False, why="torch sees no GPU; tensors on the CPU go to backend 'cpu'")


def _tried(backend: str, device: str, dtype: torch.dtype) -> Backend:
    """Forward and backward of a small ragged causal window, against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 200, 32, generator=generator) for _ in range(3)]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
    mask = parse("causal() & local(70)").compile(200, block=64)
    try:
        out = attention(q, k, v, mask, backend=backend)
        out.sum().backward()
    except Exception as error:  # any error of a broken driver or compiler is a result
        return Backend(False, why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    allowed = torch.from_numpy(mask.to_dense())
    exact = _dense([x.detach().cpu().double() for x in (q, k, v)], allowed)
    eager = _dense([x.detach() for x in (q, k, v)], allowed.to(device))
    worst, good = 0.0, True
    for ours, dense, truth in zip((out, q.grad, k.grad, v.grad), eager, exact, strict=True):
        assert ours is not None
        # Mean errors, because the largest error of dense attention varies by chance and by processor.
        (off, most), (usual, _), size = _error(ours, truth), _error(dense, truth), _mean(truth)
        worst, good = max(worst, most), good and off <= 2 * usual + torch.finfo(dtype).eps * size
    tried = f"forward and backward in {str(dtype).removeprefix('torch.')} on {device}"
    return Backend(good, tried=tried, largest_error=worst)


def _dense(operands: list[torch.Tensor], allowed: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of masked dense attention in the operands' dtype; twice its error is allowed."""
    leaves = [x.requires_grad_() for x in operands]
    out = reference.attention(leaves[0], leaves[1], leaves[2], allowed)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def _error(ours: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean and maximum."""
    off = ours.detach().cpu().double() - exact.detach()
    return _mean(off), float(off.abs().max())


def _mean(x: torch.Tensor) -> float:
    """Root of the mean of the squares."""
    return float(x.detach().square().mean().sqrt())
