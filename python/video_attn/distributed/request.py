"""A call of one rank: its arguments, checked, and what the ranks must have in common."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..attention import check_scale, check_shapes
from ..block_mask import BlockMask
from ..functional.patterns import Pattern, VideoSparse
from ..functional.video_tokens import VideoTokens
from ..functional.vsa import Gate, check_gate
from ..quantize import QuantizationOptions
from ..registry import PRECISIONS, check_backend_name, context_backend
from .agreement import Agreed, Announcement, PeerError
from .job import Job, fingerprint, make_job
from .piece import Options
from .shards import Shards
from .team import Team, give_up

KINDS = ("ulysses", "ring", "usp")
Group = dist.ProcessGroup | DeviceMesh | None


@dataclass(frozen=True)
class Teams:
    """The ranks that trade heads, those that pass keys on, and all of them in order."""

    ulysses: Team | None
    ring: Team | None
    rank: int
    size: int

    @property
    def all(self) -> list[Team]:
        return [team for team in (self.ulysses, self.ring) if team is not None]


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of :func:`sequence_parallel_attention` beside tensors, group and layout."""

    mask: BlockMask | Pattern | None
    tokens: VideoTokens | None
    tile_order: bool
    gate: Gate
    shards: Shards | None
    kv_shards: Shards | None
    scale: float | None
    precision: str
    is_causal: bool
    return_lse: bool
    backend: str | None
    deterministic: bool
    quantization: QuantizationOptions | None
    head_chunks: int | None


@dataclass(frozen=True, eq=False)
class Call:
    """A checked call; of dense parts only the own length is known yet.

    Args:
        tensors: q, k, v [B, H, held, D], and the gate [B, Hq, held, Dv|1] if it is a tensor.
        gate: of the coarse branch: None, a number, or a tensor, the last of ``tensors``.
    """

    teams: Teams
    tensors: tuple[Tensor, ...]
    gate: Gate
    job: Job
    shards: Shards | None
    kv_shards: Shards | None
    options: Options
    return_lse: bool
    head_chunks: int | None

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks, by the names that an error should mention."""
        (q, k, v, *_), o = self.tensors, self.options
        shards = [None if s is None else _digest(s.ranges) for s in (self.shards, self.kv_shards)]
        mask = self.job.mask if self.teams.ring is not None else None
        return {
            "kind": [team is not None for team in (self.teams.ulysses, self.teams.ring)],
            "q (batch, heads, head_dim)": [q.shape[0], q.shape[1], q.shape[3]],
            "k (heads)": k.shape[1],
            "v (head_dim)": v.shape[3],
            "dtype of q": str(q.dtype),
            "device type of q": q.device.type,
            "which of q, k, v, gate require grad": [
                torch.is_grad_enabled() and x.requires_grad for x in self.tensors
            ],
            "mask": self.job.name[:500],
            "blocks of mask": None if mask is None else fingerprint(mask),
            "gate": self.gate if not isinstance(self.gate, Tensor) else self.gate.shape[3],
            "shards": shards[0],
            "kv_shards": shards[1],
            "scale": o.scale,
            "precision": o.precision,
            "quantization": repr(o.quantization),
            "deterministic": o.deterministic,
            "return_lse": self.return_lse,
            "head_chunks": self.head_chunks,
            "tokens": [q.shape[2], k.shape[2]],
        }


def prepare(teams: Teams, request: Request, q: Tensor, k: Tensor, v: Tensor) -> Call:
    """All that one rank can check by itself, of q, k, v [B, H, held, D].

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.
    """
    check_shapes(q, k, v)
    _check_options(request)
    _check_precision(request, q, k, v)
    job = make_job(request.mask, request.tokens, request.tile_order, request.is_causal, q)
    shards, kv_shards = _check_shards(teams, job, request)
    if request.is_causal and teams.ring is not None:
        for name, given in (("shards", shards), ("kv_shards", kv_shards)):
            if given is not None and not given.is_contiguous:
                raise ValueError(f"{name} must be contiguous for a causal ring, got {given}")
    for name, x, given in (("q", q, shards), ("k", k, kv_shards)):
        if given is not None and x.shape[2] != given.lengths[teams.rank]:
            raise ValueError(
                f"{name} must have the {given.lengths[teams.rank]} tokens that rank {teams.rank} "
                f"of {teams.size} holds, got {x.shape[2]}; pass shards= where parts are cut "
                "otherwise"
            )
    gate = _check_gate(request, job, q, v)
    options = Options(
        check_scale(request.scale, q.shape[3]), request.precision,
        request.backend or context_backend(),
        request.deterministic or torch.are_deterministic_algorithms_enabled(),
        request.quantization,
    )  # fmt: skip
    tensors = (q, k, v, gate) if isinstance(gate, Tensor) else (q, k, v)
    return Call(
        teams, tensors, gate, job, shards, kv_shards, options, request.return_lse,
        request.head_chunks,
    )  # fmt: skip


def _check_gate(request: Request, job: Job, q: Tensor, v: Tensor) -> Gate:
    """The weight of the coarse branch; a tensor as [B, Hq, held, Dv|1]."""
    pattern = request.mask
    if not isinstance(pattern, VideoSparse):
        if request.gate is not None:
            raise ValueError("gate is for VideoSparse: it must be None with other masks")
        return None
    if request.return_lse:
        raise ValueError(
            "return_lse must be False with VideoSparse: its output is no single softmax"
        )
    if pattern.gate != "auto":
        if request.gate is not None:
            raise ValueError(f"gate must be None where the pattern has one, {pattern.gate!r}")
        return pattern.gate if pattern.gate is None else float(pattern.gate)
    shape = (*q.shape[:3], v.shape[3])
    gate = check_gate(0.0 if request.gate is None else request.gate, shape, q)
    return gate.expand(*q.shape[:3], -1) if isinstance(gate, Tensor) else gate


def _check_shards(teams: Teams, job: Job, request: Request) -> tuple[Shards | None, Shards | None]:
    """Shards of queries and keys, or None where only the ranks together know the lengths."""
    shards, kv_shards = request.shards, request.kv_shards
    for name, given in (("shards", shards), ("kv_shards", kv_shards)):
        if given is not None and not isinstance(given, Shards):
            raise TypeError(f"{name} must be a Shards or None, got {type(given).__name__}")
        if given is not None and given.num_ranks != teams.size:
            raise ValueError(f"{name} has {given.num_ranks} ranks, but the group {teams.size}")
    if job.order is not None and kv_shards not in (None, shards):
        raise ValueError("kv_shards must be shards for a pattern over tiles of one sequence")
    q_tokens, kv_tokens = job.q_tokens, job.kv_tokens
    if shards is None and q_tokens is not None:
        shards = Shards.even(q_tokens, teams.size)
    if kv_shards is None:
        alike = kv_tokens is None or (shards is not None and shards.length == kv_tokens)
        kv_shards = shards if alike or kv_tokens is None else Shards.even(kv_tokens, teams.size)
    for name, given, tokens in (
        ("shards", shards, q_tokens), ("kv_shards", kv_shards, kv_tokens),
    ):  # fmt: skip
        if given is not None and tokens is not None and given.length != tokens:
            raise ValueError(f"{name} has {given.length} tokens, but mask has {tokens}")
    return shards, kv_shards


_agreed = Agreed()


class Agreement:
    """The comparison of a call with those of all ranks: made before it, or beside it.

    Args:
        held: (q, k) tokens that each rank holds, where the call could not say them by itself.
    """

    def __init__(
        self, teams: Teams, call: Call | None, error: Exception | None, timeout: float
    ) -> None:
        self.held: list[list[int]] | None = None
        self._beside: Announcement | None = None
        self._device = None if call is None else call.tensors[0].device
        key = None
        if call is not None and _can_run_ahead(teams, call):
            team, said = teams.all[0], call.describe()
            key = team.group, json.dumps(said)
            if key in _agreed:
                self._beside = Announcement(team, said, None, timeout)
                return
        self.held = agree_on(teams, call, error, timeout)
        if key is not None:
            _agreed.add(key)

    def finish(self) -> None:
        """Hears what the others said, if the call has not waited for it.

        Raises:
            ValueError, PeerError: as before a call. The exchanges of this one are given up.
        """
        if self._beside is None or self._device is None:
            return
        try:
            self._beside.answers()
        except (ValueError, PeerError):
            give_up(self._beside.team.group, self._device)
            raise


def _can_run_ahead(teams: Teams, call: Call) -> bool:
    """A GPU only queues its exchanges: a host finds out that the others differ, and is not stuck
    in one; but a ring of VSA reads what it was sent. All must be in one team, for errors to reach
    them, and know the lengths of all parts.
    """
    reads = teams.ring is not None and call.job.selection is not None
    return (
        call.tensors[0].device.type == "cuda"
        and len(teams.all) == 1
        and not reads
        and call.shards is not None
        and call.kv_shards is not None
    )


def agree_on(
    teams: Teams, call: Call | None, error: Exception | None, timeout: float
) -> list[list[int]]:
    """Compares the call with those of all ranks; (q, k) tokens that each of them holds."""
    said = {} if call is None else call.describe()
    for team in teams.all:  # an error in one row must reach the others too
        try:
            answers = Announcement(team, said, error, timeout).answers()
            said["tokens"] = [c["tokens"] for c in answers]
        except Exception as failure:
            error = failure
    if error is not None:
        raise error
    held = said["tokens"]
    return [one for row in held for one in row] if len(teams.all) == 2 else held


def known_shards(call: Call, held: list[list[int]] | None) -> tuple[Shards, Shards]:
    """The shards of queries and keys, checked against what the ranks hold."""
    if call.shards is not None and call.kv_shards is not None:
        return call.shards, call.kv_shards
    if held is None:
        raise ValueError(
            "shards must be given for dense attention with check=False: nobody says how many "
            "tokens the others hold"
        )
    found = []
    for name, given, lengths in (
        ("q", call.shards, [n for n, _ in held]), ("k", call.kv_shards, [n for _, n in held]),
    ):  # fmt: skip
        even = Shards.even(sum(lengths), len(lengths))
        if given is None and even.lengths != tuple(lengths):
            raise ValueError(
                f"{name} must be cut as {', '.join(map(str, even.lengths))} tokens, got "
                f"{', '.join(map(str, lengths))}; pass shards= where parts are cut otherwise"
            )
        found.append(given or even)
    return found[0], found[1]


def teams_of(group: Group, kind: str) -> Teams:
    """The teams of a group for a kind.

    Raises:
        RuntimeError: torch.distributed is not initialized. TypeError, ValueError: a group that
            does not fit the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialized: call torch.distributed.init_process_group first"
        )
    if kind == "usp":
        if not isinstance(group, DeviceMesh) or group.ndim != 2:
            raise ValueError(
                "group must be a two-dimensional DeviceMesh (ring, Ulysses) for kind 'usp', got "
                f"{group!r}"
            )
        ring, ulysses = Team.of(group.get_group(0)), Team.of(group.get_group(1))
        return Teams(ulysses, ring, ring.rank * ulysses.size + ulysses.rank, group.size())
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a one-dimensional DeviceMesh for kind {kind!r}, got {group.ndim} "
                "dimensions; name one, as in mesh['sequence']"
            )
        group = group.get_group()
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup of this rank, a DeviceMesh or None, got {group!r}"
        )
    team = Team.of(group)
    if kind == "ulysses":
        return Teams(team, None, team.rank, team.size)
    return Teams(None, team, team.rank, team.size)


def _check_options(request: Request) -> None:
    if request.precision not in PRECISIONS:
        raise ValueError(
            f"precision must be one of {', '.join(PRECISIONS)}; got {request.precision!r}"
        )
    for name in ("tile_order", "is_causal", "return_lse", "deterministic"):
        if not isinstance(getattr(request, name), bool):
            raise TypeError(f"{name} must be True or False, got {getattr(request, name)!r}")
    if request.backend is not None:
        check_backend_name(request.backend)
    chunks = request.head_chunks
    if chunks is None:
        return
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"head_chunks must be an int >= 1 or None, got {chunks!r}")


def _check_precision(request: Request, *tensors: Tensor) -> None:
    precision = request.precision
    if precision == "native":
        if request.quantization is not None:
            raise ValueError(
                "quantization is for quantized precisions: it must be None with 'native'"
            )
    elif torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            f"precision {precision!r} has no backward pass here (straight_through is for attention "
            "on one device), but q, k or v requires grad. Use precision='native' for training, or "
            "call under torch.no_grad()"
        )


def _digest(ranges: Any) -> str:
    return hashlib.sha256(repr(ranges).encode()).hexdigest()[:16]
