"""The device that a command line means."""

from __future__ import annotations

import torch

from . import UsageError


def chosen_device(name: str | None) -> torch.device:
    """``--device name``; None is a GPU if there is one, else the CPU.

    Raises:
        UsageError: no such device is here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r}: give cpu, cuda, or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r}: give cpu, cuda, or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {name}: torch finds {torch.cuda.device_count()} GPUs here; "
            "`video-attn info` says more"
        )
    return device
