"""``torch.func.vmap`` for functions of batches: the dimension that it maps over joins the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload


def fold_into_batch(
    function: Callable[..., Any],
    leading: int,
    size: int,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
) -> tuple[Any, Any]:
    """``torch.func.vmap`` of a function of batches: its dimension becomes a part of the batch.

    The first ``leading`` arguments hold a whole batch. The tensors after them belong to a mask, and
    may have one item for all.
    """
    batch = max(
        x.shape[1 if dim == 0 else 0]
        for x, dim in zip(arguments[:leading], in_dims, strict=False)
        if isinstance(x, Tensor)
    )
    shared = all(dim is None for dim in in_dims[leading:])  # one mask for all
    folded = [
        x
        if not isinstance(x, Tensor)
        else _folded(x, dim, size, batch, shared and index >= leading)
        for index, (x, dim) in enumerate(zip(arguments, in_dims, strict=True))
    ]
    results = function(*folded)
    if isinstance(results, Tensor):
        return results.unflatten(0, (size, batch)), 0
    return tuple(x.unflatten(0, (size, batch)) for x in results), (0,) * len(results)


def _folded(x: Tensor, dim: int | None, size: int, batch: int, may_be_one: bool) -> Tensor:
    """``x`` with ``size`` batches of ``batch`` items as its first dimension."""
    if dim is None:
        if may_be_one and x.shape[0] == 1:
            return x
        x = x.expand(size, *x.shape)
    else:
        x = x.movedim(dim, 0)
    if x.shape[1] != batch:
        x = x.expand(-1, batch, *x.shape[2:])
    return x.flatten(0, 1)


def register_vmap(operator: OpOverload[..., Any], leading: int, library: Any) -> None:
    """Gives an operator the rule of :func:`fold_into_batch`."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return fold_into_batch(operator, leading, info.batch_size, in_dims, arguments)

    torch.library.register_vmap(operator, rule, lib=library)
