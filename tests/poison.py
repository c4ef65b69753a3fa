"""Memory that the package allocates without filling it is NaN: what stays unwritten is seen."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

PACKAGES = ("video_attn", "st_attn", "vsa", "radial_attn")
_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poison_allocations(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Replaces the allocators of torch for calls from the package, by ``set_attribute``."""
    for owner, name in _ALLOCATORS:
        set_attribute(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return x
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return fill_with_poison(x) if caller.partition(".")[0] in PACKAGES else x

    return poisoned


def fill_with_poison(x: torch.Tensor) -> torch.Tensor:
    """NaN in floating-point tensors, a large number in integers, True in booleans; in place."""
    if x.dtype.itemsize == 1 and x.is_floating_point():
        x.view(torch.uint8).fill_(0x7F)  # NaN of the float8 types
    elif x.is_floating_point():
        x.fill_(torch.nan)
    elif x.dtype == torch.bool:
        x.fill_(True)
    else:
        x.fill_(torch.iinfo(x.dtype).max // 3)
    return x
