"""Ring attention of one rank: from the tokens it holds to their outputs."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .differentiable import attend
from .gather import Chunk, GatherCall
from .job import Job, MaskCache, heads_of_mask
from .piece import Options
from .placement import Placement, take
from .ring import RingCall
from .ring_plan import BlockOwners, RingPlan, make_ring_plan, owners_of_blocks
from .route import Route, to_blocks, to_tokens
from .team import Team, current_traffic
from .ulysses import Heads, cut_heads, number_of_chunks

_plans = MaskCache()


@lru_cache(maxsize=64)
def block_owners(q: Placement, kv: Placement, q_block: int, kv_block: int) -> BlockOwners:
    """Owners of the query and key blocks; kept, like the placements."""
    return BlockOwners(owners_of_blocks(q, q_block), owners_of_blocks(kv, kv_block), len(q.slots))


@lru_cache(maxsize=64)
def query_route(
    q: Placement, kv: Placement, q_block: int, kv_block: int, rank: int, device: torch.device
) -> Route:
    """The way of queries to their blocks; kept."""
    return Route(q, block_owners(q, kv, q_block, kv_block).q_owner, q_block, rank, device)


def plan_of(
    job: Job, q_place: Placement, kv_place: Placement, heads: Heads, group: int
) -> RingPlan:
    """The plan of a job with a mask, for the query heads ``heads`` with ``group`` of them per key
    head; kept with the mask's lists.
    """
    mask = job.mask
    assert mask is not None

    def make() -> RingPlan:
        owners = block_owners(q_place, kv_place, mask.q_block_size, mask.kv_block_size)
        return make_ring_plan(heads_of_mask(mask, *heads), owners, kv_place, group)

    per_head = heads if mask.kv_num_blocks.shape[1] > 1 else None
    return _plans.get(mask, (q_place, kv_place, per_head, group), make)


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
    chunks: int | None,
) -> tuple[Tensor, Tensor | None]:
    """(out, lse if asked for) of the tokens of this rank; q, k, v [B, H, held, D] with the query
    heads ``heads`` of the mask.
    """
    if job.mask is None:
        return _dense(job, q, k, v, team, placements, options)
    mask, traffic, group = job.mask, current_traffic(), q.shape[1] // k.shape[1]
    plan = plan_of(job, *placements, heads, group)
    if chunks is None:
        rows = plan.most_rows * q.shape[0] * k.shape[1]
        chunks = number_of_chunks(rows * (k.shape[3] + v.shape[3]) * k.element_size())

    def work(kv: Heads) -> Chunk:
        of_queries = kv[0] * group, kv[1] * group
        return Chunk(of_queries, kv, plan.work_of(team.rank, q.device, q.shape[0], kv, group))

    call = GatherCall(
        team, [work(kv) for kv in cut_heads(k.shape[1], chunks)], mask.q_block_size, options,
        traffic,
    )  # fmt: skip
    route = query_route(*placements, mask.q_block_size, mask.kv_block_size, team.rank, q.device)
    out, lse = attend(call, to_blocks(q, route, team, traffic), k, v)
    out = to_tokens(out, route, team, traffic)
    if not return_lse:
        return out, None
    return out, to_tokens(lse[..., None], route, team, traffic)[..., 0]


def _dense(
    job: Job,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    team: Team,
    placements: tuple[Placement, Placement],
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Every rank's keys come by. Queries that several ranks hold are attended to on each."""
    kv_place = placements[1]
    if kv_place.has_copies:
        sources = kv_place.on_device(team.rank, "sources", k.device)
        k, v = take(k, sources, 2), take(v, sources, 2)
    call = RingCall(team, tuple(kv_place.source_lengths), job.is_causal, options, current_traffic())
    return attend(call, q, k, v)
