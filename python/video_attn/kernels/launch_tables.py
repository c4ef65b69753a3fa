"""Launch options of the attention kernels: which tile, step, warps and stages on which chip."""

from __future__ import annotations

from typing import NamedTuple


class LaunchRow(NamedTuple):
    """Options of one launch.

    Args:
        own: rows of the tile that a program owns. step: rows of a step over the other side.
        num_warps, num_stages: as Triton means them.
        vendor: options that only the compiler of this chip's vendor knows.
    """

    own: int
    step: int
    num_warps: int
    num_stages: int
    vendor: tuple[tuple[str, int], ...] = ()

    def options(self) -> dict[str, int]:
        """Keywords of the kernel launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **dict(self.vendor)}

    def fitted(self, own_slot: int, step_slot: int | None = None) -> LaunchRow:
        """This row for small slots: a tile does not exceed its slot, a step divides its slot.

        A step that does not divide it even when halved stays: the kernel then gathers rows.
        """
        own, step = self.own, self.step
        while own > 16 and own // 2 >= own_slot:
            own //= 2
        if step_slot is not None and step_slot % step != 0 and step_slot % (step // 2) == 0:
            step //= 2
        warps = self.num_warps if own == self.own else min(self.num_warps, max(2, own // 16))
        return self._replace(own=own, step=step, num_warps=warps)


def launch_row(
    arch: str, kernel: str, head_dim: int, itemsize: int, grain: int | None
) -> LaunchRow:
    """The options of ``kernel``: "forward", "dq" or "dkv"."""
    if itemsize == 2:
        return LaunchRow(64, 64 if head_dim <= 128 else 32, 4, 2)
    return LaunchRow(32, 32 if head_dim <= 64 else 16, 8, 2)


def unsupported_arch(arch: str) -> str | None:
    """Why there are no launch options for a chip; None when there are."""
    return None
