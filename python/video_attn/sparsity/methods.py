"""From the attributes of a module to the pattern that computes, and to its real density."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..block_mask import BlockMask
from ..functional.patterns import Dense, Radial, SlidingTile, VideoSparse
from ..functional.video_tokens import VideoTokens
from ..functional.vsa import video_sparse
from ..integrations.attention_call import AttentionCall
from ..quantize import parse_recipe
from .attributes import (
    AttentionAttributes,
    RadialAttributeConfig,
    SlidingTileAttributeConfig,
    VSAAttributeConfig,
)


def pattern_of(attributes: AttentionAttributes) -> Any:
    """The pattern object that attributes describe."""
    if isinstance(attributes, VSAAttributeConfig):
        return VideoSparse(
            top_k_ratio=attributes.top_k_ratio,
            top_k=attributes.top_k,
            tile=attributes.block_size_3d,
        )
    if isinstance(attributes, SlidingTileAttributeConfig):
        return SlidingTile(attributes.window, attributes.block_size_3d)
    if isinstance(attributes, RadialAttributeConfig):
        return Radial(attributes.rule, attributes.block_size)
    return Dense()


def options_of(attributes: AttentionAttributes) -> dict[str, Any]:
    """The keyword arguments of ``attend`` that attributes give."""
    precision, quantization = parse_recipe(attributes.precision)
    options: dict[str, Any] = {
        "precision": precision, "quantization": quantization, "backend": attributes.backend,
    }  # fmt: skip
    if isinstance(attributes, VSAAttributeConfig) and attributes.score_dtype is not None:
        options["score_dtype"] = getattr(torch, attributes.score_dtype)
    return options


def measured(
    pattern: Any, call: AttentionCall, tokens: VideoTokens, gate: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """(output, density of the mask that made it); the density is a scalar on the device."""
    query, key, value = call.query, call.key, call.value
    if not isinstance(pattern, VideoSparse):
        out = pattern.attend(query, key, value, tokens, gate=gate, **options)
        density = pattern.density(tokens, query.shape[1])
        return out, torch.full((), density, dtype=torch.float64, device=query.device)
    tiles = tokens.layout(pattern.tile).num_tiles
    out, mask = video_sparse(
        query, key, value, tokens.grid,
        top_k=None if pattern.top_k is None else min(pattern.top_k, tiles),
        top_k_ratio=pattern.top_k_ratio,
        gate=_whole_gate(gate, tokens) if isinstance(gate, Tensor) else (gate or 0.0),
        tile=pattern.tile, text_length=tokens.valid_text, text_first=tokens.text_first,
        return_mask=True, **options,
    )  # fmt: skip
    return out, _density(mask)


def _whole_gate(gate: Tensor, tokens: VideoTokens) -> Tensor:
    """A gate of the video alone, padded to all tokens: the others have no coarse branch."""
    if gate.shape[2] != tokens.video_length or tokens.text_length == 0:
        return gate
    sides = (tokens.text_length, 0) if tokens.text_first else (0, tokens.text_length)
    return F.pad(gate, (0, 0, *sides))


def _density(mask: BlockMask) -> Tensor:
    """Attended pairs over pairs of valid tokens, the mean of batch and heads."""
    pairs = mask.pairs_per_head().double().mean(1)
    queries, keys = mask.q_lens().sum(-1), mask.kv_lens().sum(-1)
    return (pairs / (queries.double() * keys)).mean()
