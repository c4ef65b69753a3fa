"""Tiny models of diffusers under sparsify: their sparse calls, and their output by definition."""

from __future__ import annotations

from typing import Any

from sparsity_cases import defined
from tiny_models import GRID, Tiny, output
from torch import Tensor, nn

import video_attn.sparsity as mtsa
from video_attn.integrations.attention_call import AttentionCall
from video_attn.integrations.intercept import replace_processor
from video_attn.integrations.models import family_of

TILE = (2, 2, 2)  # of the 3 x 4 x 5 tokens: 12 tiles, ragged in time and width


def calls(model: Any) -> dict[str, int]:
    """Sparse calls by module, of those that had any."""
    found = {n: m._sparse_attention for n, m in mtsa.get_named_sparse_attention_modules(model)}
    return {name: state.sparse_calls for name, state in found.items() if state.sparse_calls}


def attention_layers(model: Any) -> list[Any]:
    family = family_of(model)
    assert family is not None
    return [layer.module for layer in family.attention_layers(model)]


def model_output(tiny: Tiny, model: Any, inputs: dict[str, Any], top_k: int, gate: Any) -> Tensor:
    """The model with VSA by its definition in its attention layers. ``gate``: modules or 0."""
    layers = attention_layers(model)
    hidden: dict[int, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, a, k: hidden.__setitem__(id(m), a[0] if a else k["hidden_states"]),
            with_kwargs=True,
        )
        for layer in layers
    ]

    def attend(layer: Any, call: AttentionCall) -> Tensor:
        length = call.query.shape[2]
        valid = tiny.valid if tiny.valid and length == 60 + tiny.text else None
        weight: Any = 0.0
        if gate:
            weight = gate[id(layer)](hidden[id(layer)])
            weight = weight.unflatten(-1, (call.query.shape[1], -1)).transpose(1, 2)
            if weight.shape[2] < length:  # the video alone: text has no coarse branch
                side = (tiny.text, 0) if tiny.text_first else (0, tiny.text)
                weight = nn.functional.pad(weight, (0, 0, *side))
        return defined(call, GRID, TILE, top_k, weight, text_first=tiny.text_first, valid=valid)

    processors = [
        replace_processor(layer, lambda call, layer=layer: attend(layer, call)) for layer in layers
    ]
    try:
        return output(model, inputs)
    finally:
        for item in processors:
            item.undo()
        for handle in handles:
            handle.remove()
