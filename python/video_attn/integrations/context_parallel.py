"""Attention under diffusers' context parallelism: each rank holds a part of the tokens."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..functional.head_groups import HeadGroups, LayerPattern
from ..functional.patterns import Pattern, VideoSparse
from ..functional.video_tokens import VideoTokens
from .attention_call import AttentionCall

if TYPE_CHECKING:
    from ..distributed.request import Group
    from ..distributed.shards import Shards


def attend_in_parallel(
    call: AttentionCall, pattern: LayerPattern | None, tokens: VideoTokens | None, **options: Any
) -> Tensor:
    """Attention of this rank's tokens to those of all, [B, H, S of this rank, Dv].

    The degrees of ``ContextParallelConfig`` say how: Ulysses, a ring, or both. Heads and tokens
    need not be divisible by them. Differentiable.

    Args:
        pattern: None for dense attention.
        tokens: of the whole sequence, for a pattern.
        options: precision, backend and quantization.

    Raises:
        ValueError: this rank holds another part of the tokens than diffusers cuts for it.
    """
    from ..distributed import sequence_parallel_attention  # DTensor takes long to import

    if isinstance(pattern, HeadGroups):
        return _attend_groups(call, pattern, tokens, **options)
    config = call.parallel_config.context_parallel_config
    kind, group, ranks = _way(config)
    shards = None if tokens is None else _shards_of_diffusers(tokens.sequence_length, ranks)
    q, k, v = call.query, call.key, call.value
    learned = isinstance(pattern, VideoSparse) and pattern.gate == "auto"
    known = cast(Pattern | None, pattern)  # any other is refused there, by its name
    return sequence_parallel_attention(
        q, k, v, known, tokens=tokens, gate=call.gate if learned else None, kind=kind,
        group=group, shards=shards, scale=call.scale, **options,
    )  # fmt: skip


def _attend_groups(
    call: AttentionCall, groups: HeadGroups, tokens: VideoTokens | None, **options: Any
) -> Tensor:
    """The groups one after another, each with its heads of the call."""
    groups.check_heads(call.query.shape[1])
    if call.key.shape[1] != call.query.shape[1]:
        raise ValueError("head groups under context parallelism need a key head per query head")
    parts: list[Tensor] = []
    order: list[int] = []
    for group in groups.groups:
        heads = torch.tensor(group.heads, device=call.query.device)
        gate = call.gate
        if isinstance(gate, Tensor) and gate.dim() >= 3 and gate.shape[-3] > 1:
            gate = gate.index_select(-3, heads)
        part = copy(call)
        part.query, part.key, part.value = (
            x.index_select(1, heads) for x in (call.query, call.key, call.value)
        )
        part.gate = gate
        chosen = dict(options)
        if group.precision is not None:
            chosen |= {"precision": group.precision, "quantization": None}
        parts.append(attend_in_parallel(part, group.pattern, tokens, **chosen))
        order += group.heads
    places = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(parts, 1).index_select(1, torch.tensor(places, device=call.query.device))


def _way(config: Any) -> tuple[str, Group, int]:
    """(kind, group, ranks) of a ContextParallelConfig that has been set up."""
    if config.ring_degree == 1:
        return "ulysses", config._ulysses_mesh.get_group(), config.ulysses_degree
    if config.ulysses_degree == 1:
        return "ring", config._ring_mesh.get_group(), config.ring_degree
    mesh = config._mesh["ring", "ulysses"]
    return "usp", mesh, config.ring_degree * config.ulysses_degree


def _shards_of_diffusers(tokens: int, ranks: int) -> Shards:
    """As ``torch.tensor_split`` cuts, which its hooks use: the first parts are a token longer."""
    from ..distributed.shards import Shards

    return Shards.of_lengths([tokens // ranks + (r < tokens % ranks) for r in range(ranks)])
