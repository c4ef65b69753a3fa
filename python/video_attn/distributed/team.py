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
    """Messages on their way; ``wait`` orders the current stream after their arrival."""

    received: Tensor  # uint8, the messages of all ranks one after another
    work: Any
    keep: Any  # what is being sent must live until it is gone
    scatter: Sequence[Tensor] = ()  # where to ``received`` belongs, if it has not arrived in place

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work, self.keep = None, None
            for target, part in zip(
                self.scatter, self.received.split([x.numel() for x in self.scatter]), strict=True
            ) if self.scatter else ():  # fmt: skip
                target.copy_(part)
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
    _count(send_bytes, team, label, traffic)
    if team.size == 1:
        return Pending(sent, None, sent)
    received = torch.empty(sum(receive_bytes), dtype=torch.uint8, device=sent.device)
    work = dist.all_to_all_single(
        received, sent, list(receive_bytes), list(send_bytes),
        group=_carrier(team.group, sent.device), async_op=True,
    )  # fmt: skip
    return Pending(received, work, sent)


def start_messages(
    sends: Sequence[Tensor],
    receives: Sequence[Tensor],
    team: Team,
    label: str,
    traffic: Traffic | None,
) -> Pending:
    """Sends the contiguous tensor ``sends[p]`` to each other rank p, and receives in place.

    What a rank has for itself does not travel: its own entries are not looked at. A collective.
    """
    me = team.rank
    out = [as_bytes(x) if p != me else _nothing(x) for p, x in enumerate(sends)]
    into = [as_bytes(x) if p != me else _nothing(x) for p, x in enumerate(receives)]
    _count([x.numel() for x in out], team, label, traffic)
    none = _nothing(sends[0])
    if team.size == 1:
        return Pending(none, None, None)
    group = _carrier(team.group, none.device)
    if _backend_of(group, none.device).name() == "nccl":
        return Pending(none, dist.all_to_all(into, out, group=group, async_op=True), (out, into))
    flat, sizes = torch.cat(out), [x.numel() for x in into]  # gloo knows no list of messages
    arrived = torch.empty(sum(sizes), dtype=torch.uint8, device=none.device)
    work = dist.all_to_all_single(
        arrived, flat, sizes, [x.numel() for x in out], group=group, async_op=True
    )
    return Pending(arrived, work, flat, into)


def as_bytes(x: Tensor) -> Tensor:
    """The memory of a contiguous tensor as flat uint8."""
    return x.view(-1).view(torch.uint8) if x.numel() else _nothing(x)


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _count(sizes: Sequence[int], team: Team, label: str, traffic: Traffic | None) -> None:
    if traffic is not None:
        others = tuple(0 if p == team.rank else n for p, n in enumerate(sizes))
        traffic.messages.append((label, others))


_carriers: dict[dist.ProcessGroup, dist.ProcessGroup] = {}
_given_up: set[dist.ProcessGroup] = set()


def _carrier(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """The group whose stream carries the tensors of ``group``.

    An attention kernel takes all multiprocessors of a GPU, and a transfer that is queued behind it
    would start when it ends. With NCCL the transfers therefore have a stream of high priority: that
    of ``group`` if it was made so, otherwise a communicator of the same ranks, made once. A part of
    a world that is bound to devices (``init_process_group(device_id=)``) keeps its own: NCCL would
    split the world's communicator, and for that all ranks of the world must come.
    """
    if device.type != "cuda":
        return group
    if group in _given_up:
        raise RuntimeError(
            "an earlier call of this group differed between ranks and its exchanges were given "
            "up: make a new group, or start the processes again"
        )
    if group not in _carriers:
        backend = _backend_of(group, device)
        _carriers[group] = group
        world = dist.distributed_c10d._get_default_group()
        splits = world.bound_device_id is not None and group.size() < world.size()
        if backend.name() == "nccl" and not splits and not backend.options.is_high_priority_stream:
            options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
            options._timeout = backend.options._timeout
            _carriers[group] = dist.new_group(
                dist.get_process_group_ranks(group), timeout=backend.options._timeout,
                backend="nccl", pg_options=options, use_local_synchronization=True,
            )  # fmt: skip
            # Its first exchange is one of all ranks, whatever they then have to send.
            dist.barrier(_carriers[group], device_ids=[_index(device)])
    return _carriers[group]


def give_up(group: dist.ProcessGroup, device: torch.device) -> None:
    """Ends the exchanges that other ranks will not join, where the communicator is our own."""
    carrier = _carriers.get(group, group)
    if carrier is not group:
        _given_up.add(group)
        _backend_of(carrier, device).abort()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    return group._get_backend(device)
