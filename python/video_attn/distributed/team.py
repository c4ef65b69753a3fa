"""The ranks that attend together, and the one way in which they exchange bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Team:
    """A process group and this process's place in it."""

    group: dist.ProcessGroup
    rank: int
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Team:
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass
class Traffic:
    """Bytes that this rank sent to others, message by message, in order.

    ``str()`` is a table; ``total`` and ``by_label`` are the sums.
    """

    messages: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(sum(sizes) for _, sizes in self.messages)

    @property
    def by_label(self) -> dict[str, int]:
        """Bytes for each kind of message."""
        sums: dict[str, int] = {}
        for label, sizes in self.messages:
            sums[label] = sums.get(label, 0) + sum(sizes)
        return sums

    def __str__(self) -> str:
        rows = [f"{label:<24} {count / 1e6:12.3f} MB" for label, count in self.by_label.items()]
        return "\n".join([*rows, f"{'sent in all':<24} {self.total / 1e6:12.3f} MB"])


_recorder: ContextVar[Traffic | None] = ContextVar("video_attn_traffic", default=None)


@contextmanager
def record_traffic() -> Iterator[Traffic]:
    """Counts what :func:`sequence_parallel_attention` sends from this rank inside the block, and
    in the backward passes of calls made inside it::

        with record_traffic() as traffic:
            out = sequence_parallel_attention(q, k, v, mask, kind="ring")
        print(traffic)
    """
    traffic = Traffic()
    token = _recorder.set(traffic)
    try:
        yield traffic
    finally:
        _recorder.reset(token)


def current_traffic() -> Traffic | None:
    """The counter of the enclosing ``record_traffic``: calls keep it for their backward pass."""
    return _recorder.get()


@dataclass
class Pending:
    """Bytes on their way; ``wait`` orders the current stream after their arrival."""

    received: Tensor  # uint8, the messages of all ranks one after another
    work: Any
    keep: Tensor  # what is being sent must live until it is gone

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.received


def start_exchange(
    sent: Tensor,
    send_bytes: Sequence[int],
    receive_bytes: Sequence[int],
    team: Team,
    label: str,
    traffic: Traffic | None,
) -> Pending:
    """Sends ``send_bytes[p]`` bytes of ``sent`` (flat uint8, in the order of ranks) to each rank p.

    A collective: every rank of the team must call it, also one that has nothing to send.
    """
    if traffic is not None:
        others = [0 if p == team.rank else count for p, count in enumerate(send_bytes)]
        traffic.messages.append((label, tuple(others)))
    if team.size == 1:
        return Pending(sent, None, sent)
    received = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=sent.device)
    work = dist.all_to_all_single(
        received, sent, list(receive_bytes), list(send_bytes), group=team.group, async_op=True
    )
    return Pending(received, work, sent)


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as flat uint8."""
    return x.view(-1).view(torch.uint8) if x.numel() else x.new_empty(0, dtype=torch.uint8)
