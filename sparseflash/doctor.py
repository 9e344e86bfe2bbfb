"""What is installed, what this machine has, and which backend really works here."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from sparseflash import __version__, parse, reference
from sparseflash.functional import attention

PACKAGES = (
    *("torch", "triton", "numpy", "scipy", "einops", "safetensors", "tensorboard"),
    *("typer", "rich", "pillow", "matplotlib"),
)


def examine() -> dict[str, Any]:
    """Versions, devices, and the outcome of a small forward and backward on every backend, as plain data.

    Example:
        >>> examine()["backends"]["cpu"]["works"]
        True
    """
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": {
            "sparseflash": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": gpus,
        },
        "backends": {"cpu": _tried("cpu", "cpu", torch.float32), "triton": _triton(bool(gpus))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _triton(gpu: bool) -> dict[str, Any]:
    if _version("triton") is None:
        return {"works": False, "why": "triton is not installed"}
    if gpu:
        return _tried("triton", "cuda", torch.float16)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return _tried("triton", "cpu", torch.float32) | {"why": "in Triton's interpreter: for tests, slow"}
    return {"works": False, "why": "torch sees no GPU; tensors on the CPU go to backend 'cpu'"}


def _tried(backend: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Forward and backward of a small ragged causal window, against the reference in float64."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 200, 32, generator=generator) for _ in range(3)]
    q, k, v = (x.to(device, dtype).requires_grad_() for x in drawn)
    mask = parse("causal() & local(70)").compile(200, block=64)
    try:
        out = attention(q, k, v, mask, backend=backend)
        out.sum().backward()
    except Exception as error:  # whatever a broken driver or compiler throws is the finding
        return {"works": False, "why": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    allowed = torch.from_numpy(mask.to_dense())
    exact = _dense([x.detach().cpu().double() for x in (q, k, v)], allowed)
    eager = _dense([x.detach() for x in (q, k, v)], allowed.to(device))
    worst, good = 0.0, True
    for ours, dense, truth in zip((out, q.grad, k.grad, v.grad), eager, exact, strict=True):
        assert ours is not None
        # Mean errors, for the largest of dense attention's is a matter of luck and of the processor.
        (off, most), (usual, _), size = _error(ours, truth), _error(dense, truth), _mean(truth)
        worst, good = max(worst, most), good and off <= 2 * usual + torch.finfo(dtype).eps * size
    return {
        "works": good,
        "tried": f"forward and backward in {str(dtype).removeprefix('torch.')} on {device}",
        "largest_error": worst,
    }


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
