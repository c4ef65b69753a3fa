"""Tensors whose elements lie further apart than 32 bits can say."""

from __future__ import annotations

import torch
from torch import Tensor


def far_view(size: tuple[int, ...], far: int, dtype: torch.dtype) -> Tensor:
    """A view whose dimension ``far`` has its last entry past 2^31 elements; random values.

    The memory between is never touched, so the system never provides it.
    """
    strides = [0, 0, 0, 1]
    step = size[3]
    for dim in (2, 1, 0):
        strides[dim] = step
        if dim == far:
            strides[dim] = -(-(2**31) // (size[dim] - 1))
        step = max(step, strides[dim] * size[dim])
    count = 1 + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
    view = torch.empty(count, dtype=dtype).as_strided(size, strides)
    assert view[tuple(n - 1 for n in size)].data_ptr() - view.data_ptr() >= 2**31 * dtype.itemsize
    generator = torch.Generator().manual_seed(far)
    return view.copy_(torch.randn(size, generator=generator))
