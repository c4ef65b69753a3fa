"""A driver for Triton that stands for an H100's: it writes down which compiled kernels are started.

Only for processes of their own, in which Triton does not interpret: ``install()`` changes Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from video_attn.backends import triton as backend
from video_attn.device import DeviceInfo

started: list[tuple[Any, ...]] = []
_addresses: dict[int, int] = {}
_LEAST_ADDRESS = 2**32  # no length or stride of the tests is as large


def forget() -> None:
    """Forgets what was started; tensors are numbered by their address from now on."""
    started.clear()
    _addresses.clear()


def tensor(*shape: int, offset: int = 0) -> torch.Tensor:
    """bf16 zeros at an address that is ``offset`` numbers past one that 16 divides."""
    size = torch.Size(shape).numel()
    whole = torch.zeros(size + 16, dtype=torch.bfloat16)
    start = -whole.data_ptr() // 2 % 8 + offset
    return whole[start : start + size].view(shape)


class _Launcher:
    """What Triton calls to start a kernel: grid, stream, function, metadata, hooks, arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: str, *arguments: Any) -> None:
        started.append((function, (x, y, z), [_said(a) for a in arguments[4:]]))


def _said(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    if isinstance(argument, int) and argument > _LEAST_ADDRESS:
        return "address", _addresses.setdefault(argument, len(_addresses))
    return argument


class _Utils:
    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple:
        return name, f"{name} {hash(kernel)}", 0, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}


class _Driver:
    launcher_cls, utils = _Launcher, _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7


def install() -> None:
    """From here on this process has an H100, as far as Triton can see; tensors stay on the CPU."""
    driver.set_active(_Driver())
    info = DeviceInfo("cuda", "nvidia", "sm_90", "an H100", 132)
    backend.device_info = lambda device: info
