"""A call carried out: which tensors move, and who attends to what."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..attention import attention
from ..functional.vsa import Gate
from .job import Job, heads_of_mask
from .piece import Options
from .placement import Placement, placement_of
from .request import Call
from .ring_attention import ring_attention
from .selection import attend_selected, ring_of_selected
from .shards import Shards
from .team import Team
from .ulysses import Heads
from .ulysses_attention import Core, ulysses_attention

Placements = tuple[Placement, Placement]


def run(call: Call, shards: Shards, kv_shards: Shards) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None) of this rank, [B, H, held, Dv]."""
    job, teams, heads = call.job, call.teams, call.tensors[0].shape[1]
    places = placements(job, shards, kv_shards)
    if teams.ulysses is None:
        assert teams.ring is not None
        out, lse = _ring(call, teams.ring, places)(call.tensors, (0, heads))
        return out, lse if call.return_lse else None
    if teams.ring is None:
        inside, core = places, _whole_sequence(job, call.options, call.gate)
    else:
        (q_in, q_between), (kv_in, kv_between) = (
            rows_of(p, teams.ulysses.size, teams.ring.rank) for p in places
        )
        inside = q_in, kv_in
        core = _ring(call, teams.ring, (q_between, kv_between))
    return ulysses_attention(
        call.tensors, teams.ulysses, inside, core, head_dim_v=call.tensors[2].shape[3],
        return_lse=call.return_lse, chunks=1 if teams.ring else call.head_chunks,
    )  # fmt: skip


def placements(job: Job, shards: Shards, kv_shards: Shards) -> Placements:
    lengths = (job.q_length or shards.length, job.kv_length or kv_shards.length)
    q_place = placement_of(shards, job.order, lengths[0])
    if shards == kv_shards and lengths[0] == lengths[1]:
        return q_place, q_place
    return q_place, placement_of(kv_shards, job.order, lengths[1])


def _whole_sequence(job: Job, options: Options, gate: Gate) -> Core:
    """Attention over all tokens of some heads, on one rank."""

    def core(tensors: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor | None]:
        q, k, v, *gates = tensors
        if job.selection is not None:
            weight = gates[0] if gates else gate
            return attend_selected(job.selection, q, k, v, weight, options), None
        mask = None if job.mask is None else heads_of_mask(job.mask, *heads)
        return attention(
            q, k, v, mask, scale=options.scale, precision=options.precision,
            is_causal=job.is_causal, return_lse=True, backend=options.backend,
            deterministic=options.deterministic, quantization=options.quantization,
        )  # fmt: skip

    return core


def _ring(call: Call, team: Team, places: Placements) -> Core:
    """Attention of some heads in a ring of ranks, each with some of the tokens."""
    job, options = call.job, call.options

    def core(tensors: Sequence[Tensor], heads: Heads) -> tuple[Tensor, Tensor | None]:
        q, k, v, *gates = tensors
        if job.selection is not None:
            weight = gates[0] if gates else call.gate
            out = ring_of_selected(
                job.selection, q, k, v, weight, team, places[0], options, call.head_chunks
            )
            return out, None
        return ring_attention(
            job, q, k, v, team, places, heads, options, call.return_lse, call.head_chunks
        )

    return core


@lru_cache(maxsize=64)
def rows_of(place: Placement, width: int, own_row: int) -> Placements:
    """Of a two-dimensional mesh with rows of ``width`` ranks: one row, whose slots are the tokens
    of the row one after another; and all rows, whose slots are those of ``place``.
    """
    rows = []
    for first in range(0, len(place.slots), width):
        row = Placement(place.slots[first : first + width], place.length)
        rows.append(torch.cat([row.source_slots(member) for member in range(width)]))
    own = rows[own_row]
    index = torch.zeros(place.length, dtype=torch.int64)
    index[own] = torch.arange(own.numel())
    first = own_row * width
    inside = tuple(index[slots] for slots in place.slots[first : first + width])
    return Placement(inside, own.numel()), Placement(tuple(rows), place.length)
