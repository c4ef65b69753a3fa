"""``nn.MultiheadAttention``: the same projections, with our attention between them.

torch hides its attention from every hook: it has fused kernels for inference, in the module and in
``TransformerEncoderLayer`` around it. So the module's definition is followed here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..integrations.attention_call import AttentionCall
from .attend import CROSS, explained, gate_of, warn_dense
from .masks import UnsupportedError
from .state import ModuleState


def run_multihead(
    module: nn.MultiheadAttention,
    state: ModuleState,
    forward: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The module's forward, sparse where query, key and value are one tensor: self-attention."""
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
    given.apply_defaults()
    inputs = given.arguments
    query = inputs["query"]
    if not (query is inputs["key"] and query is inputs["value"]):
        state.count_dense(CROSS)
        return forward(module, *args, **kwargs)
    attributes: Any = state.attributes
    try:
        _check(module, inputs)
    except UnsupportedError as error:
        if attributes.on_unsupported == "raise":
            raise explained(state, error) from None
        warn_dense(state, error)
        return forward(module, *args, **kwargs)
    token_dim = 0 if module.batch_first else 1
    hidden_states = query if query.dim() == 3 else query.unsqueeze(token_dim)
    hidden_states = hidden_states if module.batch_first else hidden_states.transpose(0, 1)
    call = _call(module, inputs, hidden_states)
    call.gate = gate_of(state, hidden_states, call)
    out = state.answer(call).transpose(1, 2).flatten(2)
    out = F.linear(out, module.out_proj.weight, module.out_proj.bias)
    out = out if module.batch_first else out.transpose(0, 1)
    return (out if query.dim() == 3 else out.squeeze(token_dim)), None


def _check(module: nn.MultiheadAttention, inputs: dict[str, Any]) -> None:
    if inputs["query"].is_nested:
        raise UnsupportedError(
            "is given a nested tensor; build nn.TransformerEncoder with enable_nested_tensor=False"
        )
    if inputs["need_weights"]:
        raise UnsupportedError("asks for the attention weights; pass need_weights=False")
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        raise UnsupportedError("adds a key of its own (add_bias_kv or add_zero_attn)")
    if inputs["attn_mask"] is not None and inputs["key_padding_mask"] is not None:
        raise UnsupportedError("has both an attn_mask and a key_padding_mask")


def _call(
    module: nn.MultiheadAttention, inputs: dict[str, Any], hidden_states: Tensor
) -> AttentionCall:
    if module._qkv_same_embed_dim:
        projected = F.linear(hidden_states, module.in_proj_weight, module.in_proj_bias)
        parts = projected.chunk(3, dim=-1)
    else:
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        weights = module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
        parts = tuple(
            F.linear(hidden_states, weight, bias)
            for weight, bias in zip(weights, biases, strict=True)
        )
    query, key, value = (
        x.unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for x in parts
    )
    mask = inputs["attn_mask"]
    padding = inputs["key_padding_mask"]
    if padding is not None:
        padding = padding if padding.dim() == 2 else padding[None]
        mask = (~padding if padding.dtype == torch.bool else padding)[:, None, None, :]
    elif mask is not None and mask.dtype == torch.bool:
        mask = ~mask  # here True hides
    return AttentionCall(
        query, key, value, mask, module.dropout if module.training else 0.0, inputs["is_causal"]
    )


def keep_from_fused_layers(module: nn.MultiheadAttention, *, keep: bool) -> None:
    """A hook that does nothing: with one inside, ``TransformerEncoderLayer`` calls the module
    instead of its fused kernel. ``keep=False`` takes it away.
    """
    hooks = module._forward_pre_hooks
    ours = [key for key, hook in hooks.items() if hook is _nothing]
    if keep and not ours:
        module.register_forward_pre_hook(_nothing)
    for key in ours if not keep else ():
        del hooks[key]


def _nothing(module: nn.Module, args: Any) -> None:
    return None
