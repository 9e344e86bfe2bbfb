"""What is installed, what this machine has, and which backend really works here."""

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from sparseflash import __version__, parse, reference
from sparseflash.functional import attention

PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "einops", "safetensors", "tensorboard"),
    *("typer", "rich", "pillow", "matplotlib"),
)


@dataclass(frozen=True)
class Gpu:
    """A device that torch sees."""

    name: str
    capability: str
    memory_gib: float


@dataclass(frozen=True)
class Machine:
    """What there is to compute with."""

    system: str
    cores: int | None
    torch_threads: int
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Backend:
    """The outcome of a small forward and backward.

    Attributes:
        works: whether the results were right.
        why: why it does not work, or how it does.
        tried: what was run; None where nothing was.
        largest_error: against float64; None where nothing was run.
    """

    works: bool
    why: str | None = None
    tried: str | None = None
    largest_error: float | None = None


@dataclass(frozen=True)
class Examination:
    """What is installed, what this machine has, and which backends work.

    Attributes:
        versions: of each package; None where it is not installed.
        machine: cores and GPUs.
        backends: by name.
    """

    versions: dict[str, str | None]
    machine: Machine
    backends: dict[str, Backend]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; what does not apply to a backend is left out."""
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
    )


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
    except Exception as error:  # whatever a broken driver or compiler throws is the finding
        return Backend(False, why=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    allowed = torch.from_numpy(mask.to_dense())
    exact = _dense([x.detach().cpu().double() for x in (q, k, v)], allowed)
    eager = _dense([x.detach() for x in (q, k, v)], allowed.to(device))
    worst, good = 0.0, True
    for ours, dense, truth in zip((out, q.grad, k.grad, v.grad), eager, exact, strict=True):
        assert ours is not None
        # Mean errors, for the largest of dense attention's is a matter of luck and of the processor.
        (off, most), (usual, _), size = _error(ours, truth), _error(dense, truth), _mean(truth)
        worst, good = max(worst, most), good and off <= 2 * usual + torch.finfo(dtype).eps * size
    tried = f"forward and backward in {str(dtype).removeprefix('torch.')} on {device}"
    return Backend(good, tried=tried, largest_error=worst)


def _dense(operands: list[torch.Tensor], allowed: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of masked dense attention in the operands' dtype: at most twice its error is allowed."""
    leaves = [x.requires_grad_() for x in operands]
    out = reference.attention(leaves[0], leaves[1], leaves[2], allowed)
    assert isinstance(out, torch.Tensor)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def _error(ours: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """Mean and largest."""
    off = ours.detach().cpu().double() - exact.detach()
    return _mean(off), float(off.abs().max())


def _mean(x: torch.Tensor) -> float:
    """Root of the mean of the squares."""
    return float(x.detach().square().mean().sqrt())
