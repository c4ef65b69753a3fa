"""Compiles launches for a chip that need not be here."""

from __future__ import annotations

from typing import Any

from .launch import Launch


class _Driver:
    """Stands for the driver of a machine with the chip, as far as a compile asks."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch[3:]), 32)
        else:
            self.target = GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_launch(launch: Launch, arch: str) -> Any:
    """Triton's compiled kernel of a launch, which is also kept in Triton's cache on disk.

    From here on this process compiles for ``arch`` only: it cannot run kernels any more.
    """
    from triton.runtime import driver

    driver.set_active(_Driver(arch))
    return launch.kernel.warmup(**launch.keywords(), grid=(1,))
