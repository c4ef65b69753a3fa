"""Ring attention of one rank: from the tokens it holds to their outputs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .job import Job, MaskCache, heads_of_mask
from .placement import Placement, take
from .ring import Options, Ring, RingCall
from .ring_plan import (
    BlockOwners,
    Parcel,
    RingPlan,
    RingWork,
    Step,
    make_ring_plan,
    owners_of_blocks,
)
from .route import Route, to_blocks, to_tokens
from .team import Team, current_traffic
from .ulysses import Heads

_plans = MaskCache()


@lru_cache(maxsize=64)
def block_owners(q: Placement, kv: Placement, q_block: int, kv_block: int) -> BlockOwners:
    """Owners of the query and key blocks; kept, like the placements."""
    return BlockOwners(owners_of_blocks(q, q_block), owners_of_blocks(kv, kv_block), len(q.slots))


@lru_cache(maxsize=64)
def block_routes(
    q: Placement, kv: Placement, q_block: int, kv_block: int, rank: int, device: torch.device
) -> tuple[Route, Route]:
    """The ways of queries and keys to their blocks; kept."""
    owners = block_owners(q, kv, q_block, kv_block)
    q_route = Route(q, owners.q_owner, q_block, rank, device)
    if q is kv and q_block == kv_block:
        return q_route, q_route
    return q_route, Route(kv, owners.kv_owner, kv_block, rank, device)


def plan_of(
    job: Job, q_place: Placement, kv_place: Placement, batch: int, heads: Heads, kv_heads: int
) -> RingPlan:
    """The plan of a job with a mask, for the query heads ``heads``; kept with the mask's lists."""
    mask = job.mask
    assert mask is not None

    def make() -> RingPlan:
        owners = block_owners(q_place, kv_place, mask.q_block_size, mask.kv_block_size)
        part = heads_of_mask(mask, *heads)
        return make_ring_plan(part, owners, batch, heads[1] - heads[0], kv_heads)

    per_head = heads if mask.kv_num_blocks.shape[1] > 1 else heads[1] - heads[0]
    return _plans.get(mask, (q_place, kv_place, batch, per_head, kv_heads), make)


def ring_attention(
    job: Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    team: Team,
    placements: tuple[Placement, Placement],
    heads: Heads,
    options: Options,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse if asked for) of the tokens of this rank; q, k, v [B, H, held, D] with the query
    heads ``heads`` of the mask.
    """
    if job.mask is None:
        return _dense(job, q, k, v, team, placements, options)
    mask, traffic = job.mask, current_traffic()
    plan = plan_of(job, *placements, q.shape[0], heads, k.shape[1])
    q_route, kv_route = block_routes(
        *placements, mask.q_block_size, mask.kv_block_size, team.rank, q.device
    )
    call = RingCall(
        team, plan.work_of(team.rank, q.device), mask.q_block_size,
        (mask.kv_block_size,) * team.size, False, False, options, traffic,
    )  # fmt: skip
    q, k, v = (
        to_blocks(x, r, team, traffic) for x, r in ((q, q_route), (k, kv_route), (v, kv_route))
    )
    out, lse = Ring.apply(call, q, k, v)
    out = to_tokens(out, q_route, team, traffic)
    if not return_lse:
        return out, None
    return out, to_tokens(lse[..., None], q_route, team, traffic)[..., 0]


def _dense(
    job: Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    team: Team,
    placements: tuple[Placement, Placement],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Every rank's keys are one block. Queries that several ranks hold are attended to on each."""
    kv_place = placements[1]
    if kv_place.has_copies:
        sources = kv_place.on_device(team.rank, "sources", k.device)
        k, v = take(k, sources, 2), take(v, sources, 2)
    lengths = kv_place.source_lengths
    work = _dense_work(team, lengths, job.is_causal, q.device)
    call = RingCall(
        team, work, q.shape[2], tuple(lengths), True, job.is_causal, options, current_traffic()
    )
    return Ring.apply(call, q, k, v)


def _dense_work(team: Team, lengths: list[int], is_causal: bool, device: torch.device) -> RingWork:
    me, ranks = team.rank, team.size
    whole = Parcel(torch.zeros(1, dtype=torch.int64, device=device), None)

    def sees(receiver: int, sender: int) -> bool:
        return lengths[sender] > 0 and not (is_causal and sender > receiver)

    steps = []
    for shift in range(1, ranks):
        source, target = (me + shift) % ranks, (me - shift) % ranks
        receives = whole if sees(me, source) else None
        sends = whole if sees(target, me) else None
        steps.append(Step(shift, sends, receives, (0, 1) if receives else (0, 0)))
    return RingWork(None, tuple(steps))
