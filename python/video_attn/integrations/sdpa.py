"""Sends the scaled_dot_product_attention of a block of code somewhere else, in this thread alone.

An attention module of diffusers projects, normalises and rotates in its own way and then calls
``torch.nn.functional.scaled_dot_product_attention``. Catching that one call repeats nothing of the
module and patches nothing: the mode below is a context of the thread, and ``torch.compile`` traces
through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# (query, key, value [B, H, S, D], scale or None) -> [B, Hq, Sq, Dv]
Attend = Callable[[Tensor, Tensor, Tensor, "float | None"], Tensor]
Result = TypeVar("Result")


def call_with_attention(attend: Attend, function: Callable[..., Result], *arguments: Any) -> Result:
    """``function(*arguments)``, whose ``scaled_dot_product_attention`` is ``attend``.

    Raises:
        ValueError: it asks for more than attention over all keys (attn_mask, dropout, is_causal):
            that is refused, not ignored. RuntimeError: it never calls it.
    """
    reached = []

    def noted(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        reached.append(True)
        return attend(query, key, value, scale)

    with _ReplacedSdpa(noted):
        result = function(*arguments)
    if not reached:
        raise RuntimeError(
            f"{getattr(function, '__name__', type(function).__name__)} did not call "
            "scaled_dot_product_attention, so its attention was not replaced; it needs a processor "
            "that does"
        )
    return result


class _ReplacedSdpa(TorchFunctionMode):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._call(*args, **kwargs)

    def _call(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        for name, asked in (
            ("attn_mask", attn_mask is not None),
            ("dropout_p", dropout_p != 0.0),
            ("is_causal", is_causal),
            (
                "heads that differ without enable_gqa",
                not enable_gqa and query.shape[1] != key.shape[1],
            ),
        ):
            if asked:
                raise ValueError(f"block-sparse attention cannot serve a call with {name}")
        return self.attend(query, key, value, scale)
