"""What ``torch.compile`` is told about functions of this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_result(function: Function) -> Function:
    """Marks a function of plain values that compiled code may run once, while it is traced.

    Sizes that may be dynamic go into it through ``operator.index``, which makes them plain.

    The mark of ``torch.compiler.assume_constant_result``, which itself would import the compiler,
    and Triton with it, into every program that imports this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
