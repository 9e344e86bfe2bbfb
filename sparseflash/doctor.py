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
    wide = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(wide[0], wide[1], wide[2], torch.from_numpy(mask.to_dense()))
    assert isinstance(exact, torch.Tensor)
    exact.sum().backward()
    worst = _difference(out, exact)
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        worst = max(worst, _difference(ours.grad, theirs.grad))
    name = str(dtype).removeprefix("torch.")
    return {
        "works": worst < (1e-4 if dtype == torch.float32 else 2e-2),
        "tried": f"forward and backward in {name} on {device}",
        "largest_error": worst,
    }


def _difference(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.detach().cpu().double() - exact.detach()).abs().max())
