"""What ranks do when something is wrong on one of them; run by the pool."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from video_attn import BlockMask, VideoSparse, VideoTokens
from video_attn.distributed import PeerError, Shards, request, sequence_parallel_attention


def inputs(tokens: int = 8, heads: int = 2, dtype: torch.dtype = torch.float32) -> list[Any]:
    return [torch.randn(1, heads, tokens, 8, dtype=dtype) for _ in range(3)]


def message_of(group: Any, *arguments: Any, **options: Any) -> str:
    """The type and text of the error of a call."""
    try:
        sequence_parallel_attention(*arguments, group=group, timeout=5, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def different(group: Any, what: str, kind: str) -> str:
    """Rank 1 calls otherwise than the others."""
    odd = dist.get_rank(group) == 1
    options: dict[str, Any] = {"kind": kind}
    if what == "tokens":
        return message_of(group, *inputs(9 if odd else 8), **options)
    if what == "heads":
        return message_of(group, *inputs(heads=4 if odd else 2), **options)
    if what == "dtype":
        return message_of(group, *inputs(dtype=torch.float64 if odd else torch.float32), **options)
    if what == "scale":
        return message_of(group, *inputs(), scale=0.5 if odd else None, **options)
    if what == "shards":
        ranks = dist.get_world_size(group)
        lengths = [8] * ranks
        given = Shards.of_lengths(lengths) if odd else None
        return message_of(group, *inputs(), shards=given, **options)
    if what == "grad":
        q, k, v = inputs()
        return message_of(group, q.requires_grad_(odd), k, v, **options)
    assert what == "mask"
    length = 8 * dist.get_world_size(group)
    keep = torch.ones(1, 1, length // 4, length // 4, dtype=torch.bool)
    keep[..., 0] = not odd
    mask = BlockMask.from_dense(keep, 4, 4)
    return message_of(group, *inputs(), mask, **options)


def wrong_on_one(group: Any, kind: str) -> str:
    odd = dist.get_rank(group) == 1
    return message_of(group, *inputs(), scale=-1.0 if odd else None, kind=kind)


def repeated(group: Any) -> list[str]:
    """A call that runs ahead of the comparison where it was made before; rank 1 differs at last.
    Nothing moves, so that no rank is left in an exchange.
    """
    ranks, odd = dist.get_world_size(group), dist.get_rank(group) == 1
    mask = BlockMask.from_dense(torch.eye(2 * ranks, dtype=torch.bool)[None, None], 4, 4)
    heard = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "_can_run_ahead", lambda teams, call: True)
        patch.setattr(request, "give_up", lambda group, device: heard.append("given up"))
        for scale in (1.0, 1.0, 2.0 if odd else 1.0):
            heard.append(message_of(group, *inputs(), mask, kind="ring", scale=scale))
    return heard


def runs_ahead(group: Any) -> list[bool]:
    """Of a ring on a GPU: a mask; tiles that are selected by data, whose counts the host reads."""
    tokens = VideoTokens((2, 4, 4))
    mask = BlockMask.from_dense(torch.ones(1, 1, 4, 4, dtype=torch.bool), 8, 8)
    teams = request.teams_of(group, "ring")
    held = tokens.sequence_length // dist.get_world_size(group)
    found = []
    for wanted, more in ((mask, None), (VideoSparse(top_k=1, tile=(1, 2, 2), gate=0), tokens)):
        asked = request.Request(
            wanted, more, False, None, None, None, None, "native", False, False, None, False, None,
            None,
        )  # fmt: skip
        call = request.prepare(teams, asked, *inputs(held))
        on_a_gpu = replace(call, tensors=[SimpleNamespace(device=torch.device("cuda"))])
        found.append(request._can_run_ahead(teams, on_a_gpu))
    return found


def late(group: Any) -> str:
    """Rank 1 does not come."""
    if dist.get_rank(group) == 1:
        time.sleep(2)
        return ""
    try:
        sequence_parallel_attention(*inputs(), group=group, timeout=0.5)
    except PeerError as error:
        return str(error)
    return "no error"


def dies(group: Any, check: bool) -> str:
    """Rank 1 is gone; without the comparison of calls that shows in the first exchange."""
    if dist.get_rank(group) == 1:
        os._exit(1)
    shards = Shards.even(8 * dist.get_world_size(group), dist.get_world_size(group))
    return message_of(group, *inputs(), shards=shards, check=check)
