"""Ranks tell each other what they are about to do, so that a difference is an error, not a hang.

One all-gather of a small message on the CPU before anything large moves. It also finds ranks that
died, failed in their own checks, or do not come.
"""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .team import Team

MESSAGE_BYTES = 4096
DEFAULT_TIMEOUT = 300.0

_talk_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class PeerError(RuntimeError):
    """Another rank failed, died or did not come."""


def agree(
    team: Team, call: dict[str, Any], error: Exception | None, timeout: float
) -> list[dict[str, Any]]:
    """What every rank said of its call, in rank order, if all entries but "tokens" are the same.

    Args:
        call: JSON values by the names under which an error should mention them.
        error: what this rank's own checks raised, told to the others and raised again here.

    Raises:
        ValueError: the calls differ; the same message on all ranks.
        PeerError: another rank failed, or did not answer within ``timeout`` seconds.
    """
    said: dict[str, Any] = {
        "error": None if error is None else f"{type(error).__name__}: {error}"[:800]
    }
    said |= {"call": call} if error is None else {}
    try:
        table = _all_gather(team, json.dumps(said), timeout)
    except RuntimeError as failure:
        if error is not None:
            raise error from None
        raise PeerError(
            f"rank {team.rank} of {team.size} waited {timeout:g} s for the others, and at least "
            f"one did not come or is gone: {str(failure).splitlines()[0]}"
        ) from failure
    if error is not None:
        raise error
    for rank, other in enumerate(table):
        if other["error"] is not None:
            raise PeerError(f"rank {rank} of {team.size} failed: {other['error']}")
    calls = [other["call"] for other in table]
    for name in calls[0]:
        values = [c.get(name) for c in calls]
        if name != "tokens" and any(v != values[0] for v in values):
            shown = ", ".join(f"rank {r}: {v!r}" for r, v in enumerate(values))
            raise ValueError(f"{name} must be the same on all ranks of the group; got {shown}")
    return calls


def _all_gather(team: Team, text: str, timeout: float) -> list[dict[str, Any]]:
    raw = text.encode()
    if len(raw) > MESSAGE_BYTES - 8:
        raise ValueError(f"the description of a call is too long: {len(raw)} bytes")
    mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    everything = [torch.zeros_like(mine) for _ in range(team.size)]
    options = dist.distributed_c10d.AllgatherOptions()
    options.timeout = timedelta(seconds=timeout)
    group = _talk_group(team, timeout)
    group.allgather([everything], [mine], options).wait()
    return [json.loads(x.numpy().tobytes().rstrip(b"\0")) for x in everything]


def _talk_group(team: Team, timeout: float) -> dist.ProcessGroup:
    """A group of the same ranks that carries CPU tensors: itself, or a gloo group beside it."""
    if _speaks_gloo(team.group):
        return team.group
    if team.group not in _talk_groups:
        _talk_groups[team.group] = dist.new_group(
            dist.get_process_group_ranks(team.group), backend="gloo",
            timeout=timedelta(seconds=timeout), use_local_synchronization=True,
        )  # fmt: skip
    return _talk_groups[team.group]


def _speaks_gloo(group: dist.ProcessGroup) -> bool:
    try:
        return group._get_backend(torch.device("cpu")).name() == "gloo"
    except RuntimeError:  # no backend for the CPU
        return False
