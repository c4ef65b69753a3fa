"""Tensors that follow from plain numbers: built once, kept within bounds, constant when compiled.

The index tables of a layout and the block lists of a static pattern depend on grid, tile, window
and device, never on data. Sorting them again in every layer would cost more than small attentions.

Everybody is given the same tensors. Whoever writes into them in place changes what they hold
already, but not what later calls get: a tensor that was written to is built again. Writes that are
replayed by a CUDA graph cannot be seen; :meth:`BlockMask.clone` gives lists for that.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .compiler import constant_result
from .open_sizes import Shapes, is_open, open_table, register_table

Result = TypeVar("Result", bound="Tensor | tuple[Tensor, ...]")
Object = TypeVar("Object", bound="HasTensors")

MAX_BYTES = 256 * 2**20  # of all results together
MAX_ENTRIES = 1024


class HasTensors(Protocol):
    """An object made of tensors, which a cache may keep."""

    @property
    def kept_tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        ...


class _Kept(NamedTuple):
    result: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]  # a write in place raises the version of a tensor


_kept: OrderedDict[tuple[Any, ...], _Kept] = OrderedDict()
_lock = threading.Lock()


def static_cache(
    dtype: torch.dtype, shapes: Shapes
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Keeps what a function of plain hashable arguments, the last of them a device, returned: one
    tensor or several.

    The function is called outside of inference mode (autograd may save the result), outside of
    fake-tensor and other dispatch modes (no fake tensor is kept), and with the CPU as default
    device, whatever the caller's is. Under ``torch.compile`` the result is a constant of the graph;
    where sizes among the arguments are left open, it is that of an operator (open_sizes.py). The
    least recently used results of all functions go when there are more than ``MAX_BYTES`` of them;
    the newest always stays.

    Args:
        dtype: of the tensors.
        shapes: of the same arguments, the shape of each tensor; see :func:`register_table`.
    """

    def decorate(build: Callable[..., Result]) -> Callable[..., Result]:
        name = f"{build.__module__.rpartition('.')[2]}.{build.__name__.lstrip('_')}"

        @constant_result
        def lookup(*key: Any) -> tuple[Tensor, ...]:
            mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
            if mode is None or torch.compiler.is_compiling():
                return _look_up(build, key).tensors
            # Somebody asks for shapes. The device may not even be here: it is made on the CPU.
            device, on_cpu = key[-1], (*key[:-1], torch.device("cpu"))
            return tuple(mode.from_tensor(x).to(device) for x in _look_up(build, on_cpu).tensors)

        register_table(name, lookup, shapes)

        @functools.wraps(build)
        def cached(*key: Any) -> Any:
            compiling = torch.compiler.is_compiling()
            if (compiling or torch._C._len_torch_dispatch_stack() > 0) and is_open(key):
                tensors = open_table(name, key, dtype)
            else:
                tensors = lookup(*key)
                if compiling:  # which knows no shape of a constant, but of its alias
                    tensors = tuple([x.detach() for x in tensors])
            return tensors[0] if len(tensors) == 1 else tensors

        return cached

    return decorate


def static_object(build: Callable[..., Object]) -> Callable[..., Object]:
    """:func:`static_cache` for objects of tensors, block masks say.

    Where somebody traces or asks for shapes only, the object is built again, of what the caches of
    its tensors say there.
    """

    @functools.wraps(build)
    def cached(*key: Any) -> Object:
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
            return build(*key)
        return _look_up(build, key).result

    return cached


def _look_up(build: Callable[..., Any], key: tuple[Any, ...]) -> _Kept:
    key = (build, *key)
    with _lock:
        kept = _kept.get(key)
        if kept is not None and kept.versions == _versions(kept.tensors):
            _kept.move_to_end(key)
            return kept
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        result = build(*key[1:])
    tensors = (result,) if isinstance(result, Tensor) else result
    if not isinstance(tensors, tuple):
        tensors = result.kept_tensors
    with _lock:
        _kept[key] = kept = _Kept(result, tensors, _versions(tensors))
        _kept.move_to_end(key)
        while len(_kept) > MAX_ENTRIES or (len(_kept) > 1 and kept_bytes() > MAX_BYTES):
            _kept.popitem(last=False)
    return kept


def _versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple([x._version for x in tensors])


def kept_bytes() -> int:
    """Bytes of all tensors that are kept now; those that several results share count once."""
    return sum({id(x): x.nbytes for kept in _kept.values() for x in kept.tensors}.values())


def clear_caches() -> None:
    """Releases the index tables and block lists that are kept for later calls.

    They are built again when they are needed. Masks that exist keep theirs.
    """
    with _lock:
        _kept.clear()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock does not exist there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def canonical_device(device: torch.device | str) -> torch.device:
    """``device`` with its index, so that "cuda" and "cuda:0" are one key."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device
