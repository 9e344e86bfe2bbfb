"""Devices by name."""

import torch


def resolve_device(name: str | None = None) -> torch.device:
    """The device of a name; without a name, the first GPU, or the CPU if there is none.

    Raises:
        ValueError: not a device name, or a device that this machine does not have.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} is not here: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs"
        )
    return device
