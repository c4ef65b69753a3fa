"""Ranks tell each other what they are about to do, so that a difference is an error, not a hang.

One all-gather of a small message on the CPU. It also finds ranks that died, failed in their own
checks, or do not come. The ranks wait for it before anything large moves; but where a GPU repeats a
call that all agreed on, it goes on at once and hears the others at the end: the message takes some
milliseconds, as long as a layer of sparse attention.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from datetime import timedelta
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist

from .team import Team

MESSAGE_BYTES = 4096
DEFAULT_TIMEOUT = 300.0
_KEPT = 256

_talk_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class PeerError(RuntimeError):
    """Another rank failed, died or did not come."""


class Announcement:
    """What this rank said of its call, on its way to the others."""

    def __init__(
        self, team: Team, call: dict[str, Any], error: Exception | None, timeout: float
    ) -> None:
        self.team, self.error, self.timeout = team, error, timeout
        said: dict[str, Any] = {
            "error": None if error is None else f"{type(error).__name__}: {error}"[:800]
        }
        said |= {"call": call} if error is None else {}
        raw = json.dumps(said).encode()
        if len(raw) > MESSAGE_BYTES - 8:
            raise ValueError(f"the description of a call is too long: {len(raw)} bytes")
        self._mine = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
        self._mine[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        self._everything = [torch.zeros_like(self._mine) for _ in range(team.size)]
        options = dist.distributed_c10d.AllgatherOptions()
        options.timeout = timedelta(seconds=timeout)
        group = _talk_group(team, timeout)
        self._work = group.allgather([self._everything], [self._mine], options)

    def answers(self) -> list[dict[str, Any]]:
        """What every rank said of its call, in rank order, if all entries but "tokens" are the
        same.

        Raises:
            ValueError: the calls differ; the same message on all ranks.
            PeerError: another rank failed, or did not answer within ``timeout`` seconds.
        """
        team, error = self.team, self.error
        try:
            self._work.wait()
        except RuntimeError as failure:
            if error is not None:
                raise error from None
            raise PeerError(
                f"rank {team.rank} of {team.size} waited {self.timeout:g} s for the others, and at "
                f"least one did not come or is gone: {str(failure).splitlines()[0]}"
            ) from failure
        table = [json.loads(x.numpy().tobytes().rstrip(b"\0")) for x in self._everything]
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


class Agreed:
    """Calls that all ranks of a group agreed on, the latest of them: (group, description)."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[Any, str], None] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: tuple[Any, str]) -> bool:
        with self._lock:
            return key in self._calls

    def add(self, key: tuple[Any, str]) -> None:
        with self._lock:
            self._calls[key] = None
            self._calls.move_to_end(key)
            while len(self._calls) > _KEPT:
                self._calls.popitem(last=False)


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
