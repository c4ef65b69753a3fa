"""Tensors that follow from plain numbers: built once, kept within bounds, constant when compiled.

The index tables of a layout and the block lists of a static pattern depend on grid, tile, window
and device, never on data. Sorting them again in every layer would cost more than small attentions.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")

MAX_BYTES = 512 * 2**20


def static_cache(
    max_entries: int = 64, max_bytes: int = MAX_BYTES
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Keeps what a function of plain hashable arguments returned: one tensor or several.

    The function is called outside of inference mode (autograd may save the result) and outside of
    fake-tensor and other dispatch modes (no fake tensor is kept). Under ``torch.compile`` the
    result is a constant of the graph; the arguments must then be constants too, which
    :func:`operator.index` makes of sizes. The least recently used results go when there are more
    than ``max_entries``, or more than ``max_bytes`` of them; the newest always stays.
    """

    def decorate(build: Callable[..., Result]) -> Callable[..., Result]:
        kept: OrderedDict[tuple[Any, ...], tuple[Tensor, ...]] = OrderedDict()
        lock = threading.Lock()

        @constant_when_compiled
        def lookup(*key: Any) -> tuple[Tensor, ...]:
            with lock:
                tensors = kept.get(key)
                if tensors is not None:
                    kept.move_to_end(key)
                    return tensors
            with _disable_current_modes(), torch.inference_mode(False):
                result = build(*key)
            tensors = (result,) if isinstance(result, Tensor) else result
            with lock:
                kept[key] = tensors
                while len(kept) > max_entries or (
                    len(kept) > 1 and sum(map(_bytes, kept.values())) > max_bytes
                ):
                    kept.popitem(last=False)
            return tensors

        @functools.wraps(build)
        def cached(*key: Any) -> Any:
            # Always a tuple inside: of a lone constant tensor, torch.compile knows no shape.
            tensors = lookup(*key)
            return tensors[0] if len(tensors) == 1 else tensors

        return cached

    return decorate


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(x.nbytes for x in tensors)


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.assume_constant_result``, without importing the compiler.

    That function sets this mark, but imports all of torch._dynamo first, which takes longer than
    the rest of ``import video_attn``.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def canonical_device(device: torch.device | str) -> torch.device:
    """``device`` with its index, so that "cuda" and "cuda:0" are one key."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
