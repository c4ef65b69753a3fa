"""Keeps a pipeline from losing its applied transformer without a word."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .applied_transformer import HANDLE
from .steps import TRANSFORMERS, unwrapped


def guard(pipe: Any) -> None:
    """From now on ``pipe.transformer = other`` is refused; wrappers of the same are not.

    The one pipeline gets a class of its own for that, which :func:`unguard` takes back.
    """
    if isinstance(pipe, torch.nn.Module):
        return
    kind: Any = type(pipe)
    pipe.__class__ = _guarded(kind)


def unguard(pipe: Any) -> None:
    """Takes back :func:`guard`."""
    if getattr(type(pipe), "_video_attn_guarded", None) is not None:
        pipe.__class__ = type(pipe)._video_attn_guarded


@functools.cache
def _guarded(kind: Any) -> type:
    def set_attribute(self: Any, name: str, value: Any) -> None:
        if name in TRANSFORMERS and value is not None:
            inside = list(value.modules()) if isinstance(value, torch.nn.Module) else [value]
            before = unwrapped(getattr(self, name, None))
            applied = getattr(before, HANDLE, None) is not None
            if applied and not any(module is before for module in inside):
                raise RuntimeError(
                    f"{name} has attention applied to it: call undo() on the handle before another "
                    "one takes its place, and apply again"
                )
        kind.__setattr__(self, name, value)

    names = {
        "__setattr__": set_attribute,
        "__module__": kind.__module__,
        "__doc__": kind.__doc__,
        "_video_attn_guarded": kind,
    }
    return type(kind.__name__, (kind,), names)
