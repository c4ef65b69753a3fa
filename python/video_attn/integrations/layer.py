"""The attention of one layer: what a replaced processor calls, eager and compiled.

In compiled code it is one opaque operator, which looks the state of the call up when it runs. So
nothing of a call (its grid, its step, its lengths) is a constant of the graph: one graph serves
dense and sparse steps, all layers, all schedules. Where gradients are asked for, compiled code
breaks its graph here instead, for an opaque operator has no gradient.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .attention_call import AttentionCall
from .fused_norms import Deferred
from .intercept import ReplacedProcessor

# (number of the layer in its handle, call) -> [B, H, S, Dv]
Serve = Callable[[int, AttentionCall], Tensor]

_numbers = itertools.count()
_layers: weakref.WeakValueDictionary[int, LayerAttention] = weakref.WeakValueDictionary()


class LayerAttention:
    """Answers the attention calls of one layer with ``serve(index, call)``."""

    def __init__(self, serve: Serve, index: int) -> None:
        self.serve, self.index = serve, index
        self.processor: ReplacedProcessor | None = None
        number = next(_numbers)
        _layers[number] = self
        # A tensor, for compiled code takes tensors as inputs, where numbers would be constants.
        self.key = torch.tensor(number, device="cpu")
        self.outside_of_the_graph = torch.compiler.disable(serve)

    def __call__(self, call: AttentionCall) -> Tensor:
        if not torch.compiler.is_compiling():
            return self.serve(self.index, call)
        inputs = call.query, call.key, call.value
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return self.outside_of_the_graph(self.index, call)
        deferred = tuple(call.deferred or (None, None, 0.0, 0.0, None, None, False))
        out = _attend(
            *(x.transpose(1, 2) for x in inputs), call.attn_mask, call.gate, call.dropout_p,
            call.is_causal, call.scale, call.enable_gqa, call.dispatched, *deferred, self.key,
        )  # fmt: skip
        return out.transpose(1, 2)


# A CUDA graph would replay what one call was; older versions of torch have no word for that.
_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)


@torch.library.custom_op("video_attn::attend_in_call", mutates_args=(), tags=_TAGS)
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    gate: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    dispatched: bool,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_eps: float,
    k_eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    split: bool,
    layer: Tensor,
) -> Tensor:
    """Attention of [B, S, H, D] as the call that is running has it for this layer; with ``cos``,
    what :class:`Deferred` says is still to be done.
    """
    deferred = None
    if cos is not None and sin is not None:
        deferred = Deferred(q_weight, k_weight, q_eps, k_eps, cos, sin, split)
    attention = _layers[int(layer)]
    processor: Any = attention.processor
    call = AttentionCall(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p,
        is_causal, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip
    call.gate, call.dispatched, call.deferred = gate, dispatched, deferred
    call.backend = getattr(processor, "_attention_backend", None)
    call.parallel_config = getattr(processor, "_parallel_config", None)
    return attention.serve(attention.index, call).transpose(1, 2).contiguous()


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], value.shape[3]))
