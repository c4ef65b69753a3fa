"""Video sparse attention over many ranks: on whole sequences, and in a ring.

In the ring every rank pools its own tiles. The means of all ranks are gathered (a 64th of the keys
for tiles of 64 tokens), each rank selects for its own tiles exactly as one process would, tells the
others which of their tiles it listed, per batch item and head, and only their tokens travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask
from ..block_ops import block_mean
from ..functional.vsa import Gate, add_coarse, compress_and_select
from ..patterns.video_sparse import selected_tiles_mask
from .gather import Chunk, Gather, GatherCall
from .job import Selection
from .piece import Options
from .placement import Placement
from .ring_attention import block_owners, query_route
from .ring_plan import BlockOwners, RingWork, WideRows
from .route import to_blocks, to_tokens
from .rows import Gathering, Rows
from .team import Team, Traffic, as_bytes, current_traffic, start_exchange
from .ulysses import cut_heads, number_of_chunks


def attend_selected(
    selection: Selection, q: Tensor, k: Tensor, v: Tensor, gate: Gate, options: Options
) -> Tensor:
    """Video sparse attention over q, k, v (and a gate tensor) [B, H, slots, D], on one rank."""
    layout, lens = selection.layout, selection.lens
    length = layout.num_tiles * layout.tile_volume
    tile_lens = None if lens is None else lens[:, : layout.num_tiles]
    selected, counts, coarse = compress_and_select(
        q[:, :, :length], k[:, :, :length], v[:, :, :length], tile_lens, tile_lens,
        block_size=layout.tile_volume, top_k=selection.top_k, scale=options.scale, gate=gate,
    )  # fmt: skip
    mask = selected_tiles_mask(
        selected, layout, counts=counts, text_blocks=selection.text_blocks, block_lens=lens
    )
    out = attention(
        q, k, v, mask, scale=options.scale, precision=options.precision, backend=options.backend,
        deterministic=options.deterministic, quantization=options.quantization,
    )  # fmt: skip
    return out if coarse is None else add_coarse(out, coarse, gate, layout.tile_volume)


@dataclass(frozen=True)
class _Own:
    """The blocks of one rank among those of all."""

    owners: BlockOwners
    rows: Tensor  # int64, CPU: tiles first, then text
    tiles: int  # how many of them are tiles
    lens: Tensor | None  # int32 [B|1, rows]


def ring_of_selected(
    selection: Selection,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Gate,
    team: Team,
    placement: Placement,
    options: Options,
    chunks: int | None,
) -> Tensor:
    """The output of the tokens of this rank; q, k, v and a gate tensor are [B, H, held, D]."""
    layout, traffic = selection.layout, current_traffic()
    size = layout.tile_volume
    if selection.lens is None and layout.padded_length % size:  # ranks own whole blocks
        selection = replace(selection, lens=layout.block_lens(q.device)[None])
    owners = block_owners(placement, placement, size, size)
    route = query_route(placement, placement, size, size, team.rank, q.device)
    rows = owners.rows(team.rank)
    lens = None if selection.lens is None else selection.lens[:, rows.to(q.device)]
    own = _Own(owners, rows, int((rows < layout.num_tiles).sum()), lens)
    q, k, v = (to_blocks(x, route, team, traffic) for x in (q, k, v))
    if isinstance(gate, Tensor):
        gate = to_blocks(gate, route, team, traffic)
    selected, coarse = _select(selection, own, q, k, v, gate, team, options, traffic)
    keep = _listed(selection, own, selected, q.shape[:2])
    if chunks is None:  # as if all were listed: the ranks must cut alike
        others = selection.layout.padded_length * (team.size - 1) // team.size
        row = q.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        chunks = number_of_chunks(others * row)
    parts = _chunks(selection, own, keep, k.shape[1], chunks, team, traffic)
    call = GatherCall(team, parts, size, options, traffic)
    out, _ = Gather.apply(call, q, k, v)
    if coarse is not None:
        if own.tiles:
            out = add_coarse(out, coarse, gate, size)
        else:  # nothing to add, but part of the backward pass
            link = [coarse, gate[:, :, :0]] if isinstance(gate, Tensor) else [coarse]
            out = out + torch.stack([x.sum() for x in link]).sum()
    return to_tokens(out, route, team, traffic)


# -- means and selection ---------------------------------------------------------------------------


class _AllMeans(torch.autograd.Function):
    """The means of the tiles of all ranks, in rank order; the gradient is summed where they are."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, counts: Sequence[int], team: Team, traffic: Traffic | None
    ) -> Tensor:
        ctx.arguments = list(counts), team, traffic
        batch, heads, _, channels = mean.shape
        unit = batch * heads * channels * mean.element_size()
        receive = [n * unit for n in counts]
        pending = start_exchange(
            as_bytes(mean.contiguous()).repeat(team.size), [receive[team.rank]] * team.size,
            receive, team, "means", traffic,
        )  # fmt: skip
        return torch.cat(_parts(pending.wait(), mean, counts), 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counts, team, traffic = ctx.arguments
        batch, heads, _, channels = grad.shape
        unit = batch * heads * channels * grad.element_size()
        mine = counts[team.rank]
        sent = torch.cat([as_bytes(part.contiguous()) for part in grad.split(counts, 2)])
        pending = start_exchange(
            sent, [n * unit for n in counts], [mine * unit] * team.size, team, "means, gradient",
            traffic,
        )  # fmt: skip
        parts = _parts(pending.wait(), grad, [mine] * team.size)
        total = parts[0].to(torch.promote_types(grad.dtype, torch.float32))
        for part in parts[1:]:
            total = total + part
        return total.to(grad.dtype), None, None, None


def _parts(received: Tensor, like: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """What came from each rank: [B, H, counts[p], D]."""
    batch, heads, _, channels = like.shape
    flat, row = received.view(like.dtype), batch * heads * channels
    split = flat.split([n * row for n in counts])
    return [x.view(batch, heads, n, channels) for x, n in zip(split, counts, strict=True)]


def _select(
    selection: Selection,
    own: _Own,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Gate,
    team: Team,
    options: Options,
    traffic: Traffic | None,
) -> tuple[Tensor, Tensor | None]:
    """(selected int32 [B, Hq, own tiles, top_k], coarse [B, Hq, own tiles, Dv] or None)."""
    layout = selection.layout
    size, tiles = layout.tile_volume, layout.num_tiles
    length = own.tiles * size
    lens = None if own.lens is None else own.lens[:, : own.tiles]
    needs_coarse = not (isinstance(gate, float) and gate == 0)
    with torch.set_grad_enabled(torch.is_grad_enabled() and needs_coarse):
        q_mean, k_mean, v_mean = (
            block_mean(x[:, :, :length], lens, size) if length else x[:, :, :0] for x in (q, k, v)
        )
        columns = [own.owners.columns(r) for r in range(team.size)]
        order = torch.cat([c[c < tiles] for c in columns])
        counts = [int((c < tiles).sum()) for c in columns]
        in_order = order.argsort().to(q.device)
        means = torch.cat([k_mean, v_mean], -1) if needs_coarse else k_mean
        means = _AllMeans.apply(means, counts, team, traffic).index_select(2, in_order)
        if not needs_coarse:
            means = torch.cat([means, means.new_zeros(*means.shape[:3], v.shape[3])], -1)
        all_k, all_v = means.split([k.shape[3], v.shape[3]], -1)
        if own.tiles == 0:  # nothing to select for, but part of the backward pass
            none = torch.zeros(q.shape[0], q.shape[1], 0, selection.top_k, dtype=torch.int32)
            return none.to(q.device), all_v[:, :1, :0] if needs_coarse else None
        all_lens = None if selection.lens is None else selection.lens[:, :tiles].clamp(max=1)
        own_lens = None if lens is None else lens.clamp(max=1)
        selected, _, coarse = compress_and_select(  # of blocks of one token: the means themselves
            q_mean, all_k, all_v, own_lens, all_lens,
            block_size=1, top_k=selection.top_k, scale=options.scale, gate=gate,
        )  # fmt: skip
        return selected, coarse


def _listed(selection: Selection, own: _Own, selected: Tensor, lead: Sequence[int]) -> Tensor:
    """bool [B, Hq, own blocks, all blocks]: what own tiles list. Rows of text are wide: empty."""
    layout = selection.layout
    keep = torch.zeros(
        *lead, own.rows.numel(), layout.num_blocks, dtype=torch.bool, device=selected.device
    )
    tiles = keep[:, :, : own.tiles]
    tiles.scatter_(-1, selected.long(), True)
    tiles[..., layout.num_tiles : layout.num_tiles + selection.text_blocks] = True
    return keep


# -- what is gathered ------------------------------------------------------------------------------


def _chunks(
    selection: Selection,
    own: _Own,
    keep: Tensor,
    kv_heads: int,
    chunks: int,
    team: Team,
    traffic: Traffic | None,
) -> list[Chunk]:
    """The work of this rank by heads. The host waits once, to know what to send and expect."""
    columns = [own.owners.columns(r) for r in range(team.size)]
    group = keep.shape[1] // kv_heads
    wanted = keep.any(2).unflatten(1, (kv_heads, group)).any(2)
    order = torch.cat(columns).to(keep.device)
    of_ranks = wanted[..., order].split([c.numel() for c in columns], -1)
    asked = _ask(of_ranks, columns[team.rank].numel(), team, traffic)
    wanted_from, wanted_by = ([x.cpu() for x in xs] for xs in (of_ranks, asked))
    lens = None if selection.lens is None else selection.lens.cpu()
    result = []
    for kv in cut_heads(kv_heads, chunks):
        heads, of_keys = (kv[0] * group, kv[1] * group), slice(*kv)
        gathering, gathered = _gathering(
            own, columns, [x[:, of_keys] for x in wanted_from],
            [x[:, of_keys] for x in wanted_by], lens, selection.layout.tile_volume, team,
            keep.device,
        )  # fmt: skip
        mask = None
        if gathered.numel() and own.rows.numel():
            mask = _mask(selection, own, keep[:, slice(*heads)], gathered)
        wide = _text_rows(selection, own, columns[team.rank], gathered, keep.device)
        result.append(Chunk(heads, kv, RingWork(gathering, mask, wide)))
    return result


def _gathering(
    own: _Own,
    columns: Sequence[Tensor],
    wanted_from: Sequence[Tensor],
    wanted_by: Sequence[Tensor],
    lens: Tensor | None,
    size: int,
    team: Team,
    device: torch.device,
) -> tuple[Gathering, Tensor]:
    """(where keys come from, int64: the gathered blocks), of some heads; own blocks come first."""
    me = team.rank
    mine = columns[me].numel()
    sends: list[Rows | None] = []
    receives: list[Rows | None] = []
    gathered, slots = [columns[me]], mine
    for p, (theirs, ours) in enumerate(zip(wanted_from, wanted_by, strict=True)):
        if p == me:
            sends.append(None)
            receives.append(None)
            continue
        listed = theirs.flatten(0, 1).any(0)
        place = listed.cumsum(0) - 1 + slots
        sends.append(_rows_of(ours, torch.arange(mine), columns[me], lens, size, device))
        receives.append(_rows_of(theirs, place, columns[p], lens, size, device))
        gathered.append(columns[p][listed])
        slots += gathered[-1].numel()
    everything = Rows(slice(0, mine * size))
    gathering = Gathering(
        slots * size, (everything, everything), tuple(sends), tuple(receives),
        _padding(torch.cat(gathered)[mine:], mine * size, lens, size, device), True,
    )  # fmt: skip
    return gathering, torch.cat(gathered)


def _rows_of(
    wanted: Tensor,
    place: Tensor,
    blocks: Tensor,
    lens: Tensor | None,
    size: int,
    device: torch.device,
) -> Rows | None:
    """The valid tokens of the blocks that are ``wanted`` [B, Hkv, blocks], where block i of an
    owner, which is ``blocks[i]`` of all, stands at ``place[i]``.
    """
    entries = wanted.nonzero()
    if entries.shape[0] == 0:
        return None
    item, head, block = entries.T
    counts = torch.full_like(block, size)
    if lens is not None:
        counts = lens.expand(wanted.shape[0], -1)[item, blocks[block]].long()
    total = int(counts.sum())
    first = place[block] * size - (counts.cumsum(0) - counts)  # less the rows before it
    rows = torch.stack([item, head, first]).to(device)
    rows = rows.repeat_interleave(counts.to(device), 1, output_size=total)
    rows[2] += torch.arange(total, device=device)
    return Rows.one_by_one(rows) if total else None


def _padding(
    blocks: Tensor, first: int, lens: Tensor | None, size: int, device: torch.device
) -> Tensor | None:
    """The slots, from ``first`` on, past the shortest length of each of ``blocks``."""
    if lens is None or blocks.numel() == 0:
        return None
    valid = lens.amin(0)[blocks]
    holes = (torch.arange(size) >= valid[:, None]).flatten().nonzero().flatten() + first
    return holes.to(device) if holes.numel() else None


def _ask(
    wanted: Sequence[Tensor], blocks: int, team: Team, traffic: Traffic | None
) -> list[Tensor]:
    """Tells every rank which of its blocks are wanted here; bool [B, Hkv, own blocks] from each."""
    batch, heads = wanted[0].shape[:2]
    sent = torch.cat([x.reshape(-1) for x in wanted]).view(torch.uint8)
    mine = batch * heads * blocks
    received = start_exchange(
        sent, [x.numel() for x in wanted], [mine] * team.size, team, "listed blocks", traffic
    ).wait()
    return [x.view(torch.bool).view(batch, heads, blocks) for x in received.split(mine)] if (
        mine
    ) else [wanted[0].new_zeros(batch, heads, 0)] * team.size  # fmt: skip


def _mask(selection: Selection, own: _Own, keep: Tensor, columns: Tensor) -> BlockMask:
    """Own rows over the blocks ``columns`` of one rank."""
    size = selection.layout.tile_volume
    chosen = columns.to(keep.device)
    kv_lens = None if selection.lens is None else selection.lens[:, chosen].contiguous()
    mask = BlockMask.from_dense(keep[..., chosen], size, size, own.lens, kv_lens)
    longest = min(chosen.numel(), selection.top_k + selection.text_blocks)
    return BlockMask(
        mask.kv_num_blocks, mask.kv_indices[..., :longest].contiguous(), size, size,
        mask.q_len, mask.kv_len, mask.q_block_lens, mask.kv_block_lens,
    )  # fmt: skip


def _text_rows(
    selection: Selection, own: _Own, columns: Tensor, gathered: Tensor, device: torch.device
) -> WideRows | None:
    """Text queries see everything: they travel to the keys of every rank, its own ``columns``."""
    layout, owners = selection.layout, own.owners
    tiles, size = layout.num_tiles, layout.tile_volume
    if layout.num_text_blocks == 0:
        return None
    owner = owners.q_owner[tiles:]
    counts = tuple(int((owner == r).sum()) for r in range(owners.ranks))
    mine = torch.arange(own.tiles, own.rows.numel(), device=device)
    if columns.numel() == 0:
        return WideRows(counts, mine, None)
    in_rank_order = tiles + torch.argsort(owner, stable=True)
    keep = gathered < tiles + selection.text_blocks
    keep[columns.numel() :] = False
    keep = keep.expand(1, 1, layout.num_text_blocks, -1)
    q_lens, kv_lens = None, None
    if selection.lens is not None:
        q_lens = selection.lens[:, in_rank_order.to(device)].contiguous()
        kv_lens = selection.lens[:, gathered.to(device)].contiguous()
    mask = BlockMask.from_dense(keep.to(device), size, size, q_lens, kv_lens)
    return WideRows(counts, mine, mask)
