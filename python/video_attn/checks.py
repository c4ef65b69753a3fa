"""Checks of plain arguments, the same everywhere: sizes, numbers and flags.

Whatever can be an index is a size, and whatever can be a float is a number: Python's own, numpy's.
A tensor of one whole number is a size too, but no tensor is a number: kernels are given numbers by
the host. A bool is neither.
"""

from __future__ import annotations

import math
import operator
from typing import Any, SupportsFloat

import torch
from torch import Tensor
from torch.autograd import forward_ad


def check_int(
    name: str, value: object, minimum: int | None = None, maximum: int | None = None
) -> int:
    """``value`` as a plain int within the limits. A symbolic int of ``torch.compile`` stays one.

    Raises:
        TypeError: it is no whole number. ValueError: it is outside the limits.
    """
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an int, got {value!r}")
    if minimum is not None and number < minimum:
        allowed = f">= {minimum}" if maximum is None else f"{minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    if maximum is not None and number > maximum:
        allowed = f"<= {maximum}" if minimum is None else f"{minimum} to {maximum}"
        raise ValueError(f"{name} must be {allowed}, got {number}")
    return number


def as_int(value: Any) -> int | None:
    """``value`` as an int if it is a whole number of any kind but bool, else None."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if _is_bool(value) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array or a tensor of several elements, or of floats
        return None


def broadcasts(size: int, full: int | None) -> bool:
    """Whether a dimension of ``size`` serves one of ``full``: it is as large, or 1.

    One by one: ``size in (1, full)`` compares no sizes that torch.compile leaves open.
    """
    return size == 1 or size == full


def check_number(name: str, value: object, wanted: str = "a number") -> float:
    """``value`` as a float, which may be infinite or NaN.

    Raises:
        TypeError: it is no number.
    """
    if type(value) in (float, int) or isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value  # type: ignore[return-value]
    if _is_bool(value) or isinstance(value, (str, Tensor)) or not isinstance(value, SupportsFloat):
        raise TypeError(f"{name} must be {wanted}, got {value!r}")
    try:
        return float(value)
    except (TypeError, ValueError):  # an array
        raise TypeError(f"{name} must be {wanted}, got {value!r}") from None


def check_positive_number(
    name: str, value: object, largest: float = math.inf, wanted: str = "a number"
) -> float:
    """``value`` as a finite float in (0, ``largest``].

    Raises:
        TypeError: it is no number. ValueError: it is outside that range.
    """
    number = check_number(name, value, wanted)
    if not (0 < number <= largest and number < math.inf):
        limit = "a finite number > 0" if largest == math.inf else f"in (0, {largest:g}]"
        raise ValueError(f"{name} must be {limit}, got {value}")
    return number


def check_bool(name: str, value: object) -> None:
    """
    Raises:
        TypeError: ``value`` is not True or False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _is_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    dtype = getattr(value, "dtype", None)  # numpy's or torch's
    return dtype is not None and str(dtype) in ("bool", "torch.bool")


def forward_mode_is_on() -> bool:
    """Whether tensors may have tangents here."""
    return forward_ad._current_level >= 0


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def is_plain(*tensors: Tensor) -> bool:
    """Whether nobody but autograd looks at what is done with these tensors.

    No mode, no transform of ``torch.func``, no tracer, no subclass, no tensor without values: the
    operators could do nothing but call the code that is then called directly, which is quicker.
    """
    for x in tensors:
        if type(x) not in _PLAIN_TYPES or not (x.is_cuda or x.is_cpu):
            return False
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
    )


def may_be_overwritten(x: Tensor) -> bool:
    """Whether a result of ours may be changed in place: no derivative and no transform needs it."""
    if torch.compiler.is_compiling():
        return not x.requires_grad
    transformed = forward_mode_is_on() or torch._C._are_functorch_transforms_active()
    return not (x.requires_grad or transformed)


def wants_gradient(*tensors: Any) -> bool:
    """Whether a backward pass may follow: gradients are recorded, and a tensor asks for its own."""
    if torch.is_grad_enabled():
        for x in tensors:
            if isinstance(x, Tensor) and x.requires_grad:
                return True
    return False
