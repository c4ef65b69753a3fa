"""sequence_parallel_attention(q, k, v, mask): attention over a sequence that many ranks share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..attention import as_bhsd, attention, check_scale, check_shapes
from ..block_mask import BlockMask
from ..quantize import QuantizationOptions
from ..registry import PRECISIONS, check_backend_name, context_backend
from .agreement import DEFAULT_TIMEOUT, agree
from .job import Job, fingerprint, heads_of_mask
from .placement import Placement, placement_of
from .ring import Options
from .ring_attention import ring_attention
from .shards import Shards
from .team import Team
from .ulysses import Heads
from .ulysses_attention import ulysses_attention

KINDS = ("ulysses", "ring", "usp")
Group = dist.ProcessGroup | DeviceMesh | None


@overload
def sequence_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = ..., *, group: Group = ...,
    kind: str = ..., shards: Shards | None = ..., kv_shards: Shards | None = ...,
    layout: str = ..., scale: float | None = ..., precision: str = ..., is_causal: bool = ...,
    return_lse: Literal[False] = ..., backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., head_chunks: int | None = ...,
    check: bool = ..., timeout: float = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sequence_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None = ..., *, group: Group = ...,
    kind: str = ..., shards: Shards | None = ..., kv_shards: Shards | None = ...,
    layout: str = ..., scale: float | None = ..., precision: str = ..., is_causal: bool = ...,
    return_lse: Literal[True], backend: str | None = ..., deterministic: bool = ...,
    quantization: QuantizationOptions | None = ..., head_chunks: int | None = ...,
    check: bool = ..., timeout: float = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None = None,
    *,
    group: Group = None,
    kind: str = "ulysses",
    shards: Shards | None = None,
    kv_shards: Shards | None = None,
    layout: str = "bhsd",
    scale: float | None = None,
    precision: str = "native",
    is_causal: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    deterministic: bool = False,
    quantization: QuantizationOptions | None = None,
    head_chunks: int | None = None,
    check: bool = True,
    timeout: float = DEFAULT_TIMEOUT,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`video_attn.attention` over a sequence whose tokens are spread over many ranks.

    A collective: every rank of the group calls it with its part of q, k, v and the same of all
    else. Differentiable; the gradients of the copies of a token that several ranks hold add up to
    the gradient of the token. Under ``torch.compile`` it runs as it is, outside of the graph.

    Args:
        q: [B, Hq, this rank's tokens, D]. k: [B, Hkv, ..., D]. v: [B, Hkv, ..., Dv]. Heads and
            tokens need not be divisible by the number of ranks. DTensors sharded over the sequence
            or over the heads are taken too, and give one back.
        mask: of the whole sequence, the same on all ranks; None for dense attention.
        group: the ranks: a process group, a one-dimensional DeviceMesh, or None for all. For "usp"
            a two-dimensional DeviceMesh (ring, Ulysses): the ranks of a row trade heads, those of a
            column pass keys on, and parts are held in the order of the flattened mesh.
        kind: "ulysses": ranks trade tokens for heads, and each attends to whole sequences of its
            heads. "ring": queries stay, and only key blocks that another rank lists travel to it.
            "usp": Ulysses inside of rows, ring between them.
        shards: which tokens each rank holds; default: rank r of n holds those from S*r//n up to
            S*(r+1)//n. See :class:`Shards` for other lengths, stripes, and text that all hold.
        kv_shards: the same for k and v; default ``shards``, and for a mask with another number of
            keys the default rule.
        layout: "bhsd", or "bshd" for q, k, v and output [B, S, H, D].
        return_lse: also return the log-sum-exp of this rank's queries, fp32 [B, Hq, S].
        scale, precision, is_causal, backend, deterministic, quantization: as in
            :func:`video_attn.attention`. A ring takes ``is_causal`` with contiguous shards only.
        head_chunks: into how many parts Ulysses cuts the heads of a rank, to attend to one while
            the next travels; default by their size.
        check: first compare the sizes and options of all ranks (one small message over the CPU).
            False leaves it out, for CUDA graphs and the last tenth of a millisecond: then ranks
            that differ may hang.
        timeout: seconds that ranks wait for one another in that comparison.

    Returns:
        out [B, Hq, this rank's tokens, Dv] (or as ``layout`` says) in the dtype of q; with
        ``return_lse``, (out, lse).

    Raises:
        TypeError, ValueError: an argument of the wrong type or value on this rank, or one that
            differs between ranks: then on all of them.
        PeerError: another rank failed its checks, died, or did not come within ``timeout``.
        RuntimeError: torch.distributed is not initialized; no backend can serve.
    """
    if any(isinstance(x, DTensor) for x in (q, k, v)):
        from .dtensor import of_dtensors

        return of_dtensors(
            sequence_parallel_attention, q, k, v, mask, group=group, kind=kind, shards=shards,
            kv_shards=kv_shards, layout=layout, scale=scale, precision=precision,
            is_causal=is_causal, return_lse=return_lse, backend=backend,
            deterministic=deterministic, quantization=quantization, head_chunks=head_chunks,
            check=check, timeout=timeout,
        )  # fmt: skip
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    teams = _teams(group, kind)
    call, error = None, None
    try:
        call = _prepare(
            teams, kind, *as_bhsd(layout, q=q, k=k, v=v), mask, shards, kv_shards, scale,
            precision, is_causal, return_lse, backend, deterministic, quantization, head_chunks,
        )  # fmt: skip
    except (TypeError, ValueError) as wrong:
        error = wrong
    if check:
        held = _agree(teams, call, error, timeout)
    elif error is not None:
        raise error
    else:
        held = None
    assert call is not None
    out, lse = _run(call, _with_lengths(call, held))
    if layout == "bshd":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse and lse is not None else out


@dataclass(frozen=True)
class _Teams:
    """The ranks that trade heads, those that pass keys on, and all of them in order."""

    ulysses: Team | None
    ring: Team | None
    rank: int
    size: int

    @property
    def all(self) -> list[Team]:
        return [team for team in (self.ulysses, self.ring) if team is not None]


@dataclass(frozen=True)
class _Call:
    """A checked call; of the lengths of dense parts only the own one is known yet."""

    teams: _Teams
    q: Tensor
    k: Tensor
    v: Tensor
    job: Job
    shards: Shards | None
    kv_shards: Shards | None
    options: Options
    return_lse: bool
    head_chunks: int | None

    def describe(self) -> dict[str, Any]:
        """What must be equal on all ranks, by the names that an error should mention."""
        q, k, v, o = self.q, self.k, self.v, self.options
        shards = [None if s is None else _digest(s.ranges) for s in (self.shards, self.kv_shards)]
        ring = self.teams.ring is not None and self.job.mask is not None
        return {
            "kind": [team is not None for team in (self.teams.ulysses, self.teams.ring)],
            "q (batch, heads, head_dim)": [q.shape[0], q.shape[1], q.shape[3]],
            "k (heads)": k.shape[1],
            "v (head_dim)": v.shape[3],
            "dtype of q": str(q.dtype),
            "device type of q": q.device.type,
            "which of q, k, v require grad": [
                torch.is_grad_enabled() and x.requires_grad for x in (q, k, v)
            ],
            "mask": self.job.describe(),
            "blocks of mask": fingerprint(self.job.mask) if ring and self.job.mask else None,
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


def _prepare(
    teams: _Teams,
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    shards: Shards | None,
    kv_shards: Shards | None,
    scale: float | None,
    precision: str,
    is_causal: bool,
    return_lse: bool,
    backend: str | None,
    deterministic: bool,
    quantization: QuantizationOptions | None,
    head_chunks: int | None,
) -> _Call:
    """All that one rank can check by itself."""
    check_shapes(q, k, v)
    _check_options(precision, is_causal, return_lse, deterministic, backend, head_chunks)
    if precision != "native" and torch.is_grad_enabled():
        if any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                f"precision {precision!r} has no backward pass, but q, k or v requires grad. Use "
                "precision='native' for training, or call under torch.no_grad()"
            )
    elif precision == "native" and quantization is not None:
        raise ValueError("quantization is for quantized precisions: it must be None with 'native'")
    job = _job(mask, is_causal, q)
    shards, kv_shards = _check_shards(teams, job, shards, kv_shards)
    if is_causal and kind != "ulysses":
        for name, given in (("shards", shards), ("kv_shards", kv_shards)):
            if given is not None and not _is_contiguous(given):
                raise ValueError(f"{name} must be contiguous for a causal ring, got {given}")
    for name, x, given in (("q", q, shards), ("k", k, kv_shards)):
        if given is not None and x.shape[2] != given.lengths[teams.rank]:
            raise ValueError(
                f"{name} must have the {given.lengths[teams.rank]} tokens that rank {teams.rank} "
                f"of {teams.size} holds, got {x.shape[2]}; pass shards= where parts are cut "
                "otherwise"
            )
    options = Options(
        check_scale(scale, q.shape[3]), precision, backend or context_backend(),
        deterministic or torch.are_deterministic_algorithms_enabled(), quantization,
    )  # fmt: skip
    return _Call(teams, q, k, v, job, shards, kv_shards, options, return_lse, head_chunks)


def _job(mask: BlockMask | None, is_causal: bool, q: Tensor) -> Job:
    if mask is None:
        return Job(None, None, None, None, is_causal)
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a video_attn.BlockMask or None, got {type(mask).__name__}")
    if is_causal:
        raise ValueError("is_causal is for dense attention: it must be False with a mask")
    if mask.device != q.device:
        raise ValueError(f"mask is on {mask.device}, but q is on {q.device}; use mask.to(q.device)")
    if mask.batch not in (1, q.shape[0]):
        raise ValueError(f"mask has batch {mask.batch}; allowed: 1 or {q.shape[0]}")
    if mask.kv_num_blocks.shape[1] not in (1, q.shape[1]):
        raise ValueError(
            f"mask has {mask.kv_num_blocks.shape[1]} heads; allowed: 1 or {q.shape[1]}"
        )
    return Job(mask, None, mask.q_len, mask.kv_len)


def _check_shards(
    teams: _Teams, job: Job, shards: Shards | None, kv_shards: Shards | None
) -> tuple[Shards | None, Shards | None]:
    """Shards of queries and keys, or None where only the ranks together know the lengths."""
    for name, given in (("shards", shards), ("kv_shards", kv_shards)):
        if given is not None and not isinstance(given, Shards):
            raise TypeError(f"{name} must be a Shards or None, got {type(given).__name__}")
        if given is not None and given.num_ranks != teams.size:
            raise ValueError(f"{name} has {given.num_ranks} ranks, but the group {teams.size}")
    q_tokens, kv_tokens = job.q_tokens, job.kv_tokens
    if shards is None and q_tokens is not None:
        shards = Shards.even(q_tokens, teams.size)
    if kv_shards is None:
        alike = shards is not None and kv_tokens in (None, shards.length)
        kv_shards = shards if alike or kv_tokens is None else Shards.even(kv_tokens, teams.size)
    for name, given, tokens in (
        ("shards", shards, q_tokens), ("kv_shards", kv_shards, kv_tokens),
    ):  # fmt: skip
        if given is not None and tokens is not None and given.length != tokens:
            raise ValueError(f"{name} has {given.length} tokens, but mask has {tokens}")
    return shards, kv_shards


def _is_contiguous(shards: Shards) -> bool:
    end = 0
    for own in shards.ranges:
        if len(own) != 1 or (own[0][0] != end and own[0][0] < own[0][1]):
            return False
        end = max(end, own[0][1])
    return True


def _agree(
    teams: _Teams, call: _Call | None, error: Exception | None, timeout: float
) -> list[list[int]]:
    """Compares the call with those of all ranks; (q, k) tokens that each of them holds."""
    _check_timeout(timeout)
    said = {} if call is None else call.describe()
    for team in teams.all:  # an error in one row must reach the others too
        try:
            said["tokens"] = [c["tokens"] for c in agree(team, said, error, timeout)]
        except Exception as failure:
            error = failure
    if error is not None:
        raise error
    held = said["tokens"]
    return [one for row in held for one in row] if len(teams.all) == 2 else held


def _with_lengths(call: _Call, held: list[list[int]] | None) -> tuple[Shards, Shards]:
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
    shards, kv_shards = found
    if call.job.is_causal and shards.length != kv_shards.length and call.teams.ring:
        raise ValueError("is_causal in a ring needs as many keys as queries")
    return shards, shards if kv_shards == shards else kv_shards


def _run(call: _Call, shards: tuple[Shards, Shards]) -> tuple[Tensor, Tensor | None]:
    job, teams = call.job, call.teams
    lengths = (job.q_length or shards[0].length, job.kv_length or shards[1].length)
    q_place = placement_of(shards[0], job.order, lengths[0])
    kv_place = placement_of(shards[1], job.order, lengths[1])
    if shards[0] == shards[1] and lengths[0] == lengths[1]:
        kv_place = q_place
    places = (q_place, kv_place)
    tensors = (call.q, call.k, call.v)
    if teams.ulysses is None:
        assert teams.ring is not None
        return ring_attention(job, *tensors, teams.ring, places, (0, call.q.shape[1]), call.options)
    core, inside = _whole_sequence(job, call.options), places
    if teams.ring is not None:
        inside, between = (
            tuple(parts)
            for parts in zip(*(_rows_of(p, teams) for p in places), strict=True)
        )  # fmt: skip
        core = _ring_between(job, teams.ring, between, call.options)
    return ulysses_attention(
        tensors, teams.ulysses, inside, core, head_dim_v=call.v.shape[3],
        return_lse=call.return_lse, chunks=1 if teams.ring else call.head_chunks,
    )  # fmt: skip


def _whole_sequence(job: Job, options: Options) -> Any:
    """Attention over all tokens of some heads, on one rank."""

    def core(tensors: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor]:
        mask = None if job.mask is None else heads_of_mask(job.mask, *heads)
        return attention(
            *tensors, mask, scale=options.scale, precision=options.precision,
            is_causal=job.is_causal, return_lse=True, backend=options.backend,
            deterministic=options.deterministic, quantization=options.quantization,
        )  # fmt: skip

    return core


def _ring_between(job: Job, team: Team, places: Any, options: Options) -> Any:
    def core(tensors: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor]:
        q, k, v = tensors
        return ring_attention(job, q, k, v, team, places, heads, options)

    return core


@lru_cache(maxsize=64)
def _rows_of(place: Placement, teams: _Teams) -> tuple[Placement, Placement]:
    """Of a two-dimensional mesh: this rank's row, whose slots are the tokens of the row one after
    another; and all rows, whose slots are those of ``place``.
    """
    assert teams.ulysses is not None and teams.ring is not None
    width = teams.ulysses.size
    rows = []
    for first in range(0, teams.size, width):
        members = place.slots[first : first + width]
        row = Placement(tuple(members), place.length)
        rows.append(torch.cat([row.source_slots(m) for m in range(width)]))
    own = rows[teams.ring.rank]
    index = torch.zeros(place.length, dtype=torch.int64)
    index[own] = torch.arange(own.numel())
    first = teams.ring.rank * width
    inside = tuple(index[slots] for slots in place.slots[first : first + width])
    return Placement(inside, own.numel()), Placement(tuple(rows), place.length)


def _teams(group: Group, kind: str) -> _Teams:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "torch.distributed is not initialized: call torch.distributed.init_process_group first"
        )
    if kind == "usp":
        if not isinstance(group, DeviceMesh) or group.ndim != 2:
            raise ValueError(
                f"group must be a two-dimensional DeviceMesh (ring, Ulysses) for kind 'usp', got "
                f"{group!r}"
            )
        ring, ulysses = Team.of(group.get_group(0)), Team.of(group.get_group(1))
        return _Teams(ulysses, ring, ring.rank * ulysses.size + ulysses.rank, group.size())
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a one-dimensional DeviceMesh for kind {kind!r}, got {group.ndim} "
                "dimensions; name one, as in mesh['sequence']"
            )
        group = group.get_group()
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group must be a ProcessGroup of this rank, a DeviceMesh or None, got {group!r}"
        )
    team = Team.of(dist.group.WORLD if group is None else group)
    if kind == "ulysses":
        return _Teams(team, None, team.rank, team.size)
    return _Teams(None, team, team.rank, team.size)


def _check_options(
    precision: str,
    is_causal: bool,
    return_lse: bool,
    deterministic: bool,
    backend: str | None,
    head_chunks: int | None,
) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    for name, value in (
        ("is_causal", is_causal), ("return_lse", return_lse), ("deterministic", deterministic),
    ):  # fmt: skip
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if backend is not None:
        check_backend_name(backend)
    if head_chunks is None:
        return
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, int) or head_chunks < 1:
        raise ValueError(f"head_chunks must be an int >= 1 or None, got {head_chunks!r}")


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout > 0:
        raise ValueError(f"timeout must be a number of seconds > 0, got {timeout!r}")


def _digest(ranges: Any) -> str:
    return hashlib.sha256(repr(ranges).encode()).hexdigest()[:16]
