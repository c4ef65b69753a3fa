"""What this machine is: one cached probe per device."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class DeviceInfo:
    """Facts that decide which kernels run on a device.

    Args:
        type: torch's device type, "cpu" or "cuda" (ROCm devices are "cuda" in torch).
        vendor: "cpu", "nvidia" or "amd".
        arch: "cpu", "sm_90", "gfx942", ...: the name used by launch tables and messages.
        name: what the driver, or the CPU itself, calls it.
        multiprocessors: SMs or CUs; CPU threads on a CPU.
    """

    type: str
    vendor: str
    arch: str
    name: str
    multiprocessors: int


def device_info(device: torch.device | str) -> DeviceInfo:
    """The facts of ``device``, probed once per process.

    Raises:
        ValueError: a device type that no kernel here knows.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _probe(device)


def is_here(device: torch.device) -> bool:
    """Whether this machine has the device; of a meta tensor, or a fake one, one may only ask for
    shapes.
    """
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


@cache
def _probe(device: torch.device) -> DeviceInfo:
    if device.type == "cpu":
        return DeviceInfo("cpu", "cpu", "cpu", _cpu_name(), torch.get_num_threads())
    if device.type != "cuda":
        raise ValueError(f"device must be cpu or cuda (NVIDIA or AMD), got {device}")
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        vendor, arch = "amd", properties.gcnArchName.split(":")[0]
    else:
        vendor, arch = "nvidia", f"sm_{properties.major}{properties.minor}"
    return DeviceInfo("cuda", vendor, arch, properties.name, properties.multi_processor_count)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
