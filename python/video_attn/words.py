"""Copies of rows of channels in the widest elements they can be seen as.

A strided copy and a gather move one element per load: 16 bytes at a time instead of the 2 of bf16
come near the bandwidth of the memory. Nothing here is differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = (torch.complex128, torch.int64, torch.int32)


def as_words(*xs: Tensor) -> list[Tensor]:
    """The same memory, of one dtype in and out, in the widest elements that all of ``xs`` allow."""
    for word in _WORDS:
        ratio = word.itemsize // xs[0].element_size()
        if ratio > 1 and all(_fits(x, ratio, word.itemsize) for x in xs):
            return [x.view(word) for x in xs]
    return list(xs)


def _fits(x: Tensor, ratio: int, size: int) -> bool:
    return (
        x.shape[-1] % ratio == 0
        and not (x.is_conj() or x.is_neg())  # whose memory holds other values
        and x.stride(-1) == 1
        and all(s % ratio == 0 for s in x.stride()[:-1])
        and x.storage_offset() % ratio == 0
        and x.data_ptr() % size == 0
    )


def _part(x: Tensor, part: slice, dim: int) -> Tensor:
    return x.narrow(dim, part.start, part.stop - part.start)


def copy(target: Tensor, source: Tensor) -> None:
    """``target[...] = source``."""
    if target.numel():
        target, source = as_words(target, source)
        target.copy_(source)


def gather(target: Tensor, source: Tensor, index: Tensor | slice, dim: int) -> None:
    """``target[...] = source[..., index, ...]``, the index on ``dim``."""
    if isinstance(index, slice):
        copy(target, _part(source, index, dim))
    elif target.numel():
        target, source = as_words(target, source)
        torch.index_select(source, dim, index, out=target)


def scatter(target: Tensor, source: Tensor, index: Tensor | slice, dim: int) -> None:
    """``target[..., index, ...] = source``, the index on ``dim``."""
    if isinstance(index, slice):
        copy(_part(target, index, dim), source)
    elif source.numel():
        target, source = as_words(target, source)
        target.index_copy_(dim, index, source)
