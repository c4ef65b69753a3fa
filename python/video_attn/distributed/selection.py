"""Video sparse attention over many ranks: on whole sequences, and in a ring.

In the ring every rank pools its own tiles. The means of all ranks are gathered (a 64th of the keys
for tiles of 64 tokens), each rank selects for its own tiles exactly as one process would, tells the
others which of their tiles it listed, per batch item and head, and only their tokens travel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask, unchecked_mask
from ..block_ops import block_mean
from ..functional.vsa import Gate, add_coarse, compress_and_select
from ..patterns.video_sparse import selected_tiles_mask
from .differentiable import attend
from .gather import Chunk, GatherCall
from .job import Selection, heads_of_mask
from .listed import Listing, columns_of, make_listing
from .piece import Options
from .placement import Placement
from .ring_attention import block_owners, query_route
from .ring_plan import WIDE_PARTS, BlockOwners, RingWork, WideRows, in_parts
from .route import to_blocks, to_tokens
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
    """The blocks of one rank among those of all: tiles first, then text."""

    rank: int
    owners: BlockOwners
    rows: int
    tiles: int  # of the rows
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
    rows = columns_of(owners, q.device).own[team.rank]
    lens = None if selection.lens is None else selection.lens.index_select(1, rows)
    tiles = int((owners.rows(team.rank) < layout.num_tiles).sum())
    own = _Own(team.rank, owners, rows.numel(), tiles, lens)
    q, k, v = (to_blocks(x, route, team, traffic) for x in (q, k, v))
    if isinstance(gate, Tensor):
        gate = to_blocks(gate, route, team, traffic)
    selected, coarse = _select(selection, own, q, k, v, gate, team, options, traffic)
    wanted = _wanted(selection, own, selected, k.shape[1])
    listing = make_listing(wanted, selection.lens, owners, size, team, traffic)
    if chunks is None:  # as if all were listed: the ranks must cut alike
        others = selection.layout.padded_length * (team.size - 1) // team.size
        row = q.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3]) * k.element_size()
        chunks = number_of_chunks(others * row)
    parts = _chunks(selection, own, selected, listing, k.shape[1], chunks)
    call = GatherCall(team, parts, size, options, traffic)
    out, _ = attend(call, q, k, v)
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


@lru_cache(maxsize=64)
def _tiles_of_ranks(
    owners: BlockOwners, tiles: int, device: torch.device
) -> tuple[tuple[int, ...], Tensor]:
    """(tiles of each rank, for each tile its place among those of all ranks); kept, like owners."""
    owner = owners.kv_owner[:tiles]
    places = owner.argsort(stable=True).argsort()
    return tuple(owner.bincount(minlength=owners.ranks).tolist()), places.to(device)


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
        pooled = (q, k, v) if needs_coarse else (q, k)
        q_mean, k_mean, *v_mean = (
            block_mean(x[:, :, :length], lens, size) if length else x[:, :, :0] for x in pooled
        )
        counts, in_order = _tiles_of_ranks(own.owners, tiles, q.device)
        means = torch.cat([k_mean, *v_mean], -1)
        means = _AllMeans.apply(means, counts, team, traffic).index_select(2, in_order)
        if not needs_coarse:
            means = torch.cat([means, means.new_zeros(*means.shape[:3], v.shape[3])], -1)
        all_k, all_v = means.split([k.shape[3], v.shape[3]], -1)
        if own.tiles == 0:  # nothing to select for, but part of the backward pass
            none = q.new_zeros(q.shape[0], q.shape[1], 0, selection.top_k, dtype=torch.int32)
            return none, all_v[:, :1, :0] if needs_coarse else None
        all_lens = None if selection.lens is None else selection.lens[:, :tiles].clamp(max=1)
        own_lens = None if lens is None else lens.clamp(max=1)
        selected, _, coarse = compress_and_select(  # of blocks of one token: the means themselves
            q_mean, all_k, all_v, own_lens, all_lens,
            block_size=1, top_k=selection.top_k, scale=options.scale, gate=gate,
        )  # fmt: skip
        return selected, coarse


def _wanted(selection: Selection, own: _Own, selected: Tensor, kv_heads: int) -> Tensor:
    """bool [B, Hkv, all blocks]: what own tiles list. Rows of text are wide: they want nothing."""
    layout = selection.layout
    batch, heads = selected.shape[:2]
    wanted = selected.new_zeros(batch, heads, layout.num_blocks, dtype=torch.bool)
    if own.tiles:
        wanted.scatter_(-1, selected.flatten(2).long(), True)
        wanted[..., layout.num_tiles : layout.num_tiles + selection.text_blocks] = True
    return wanted.unflatten(1, (kv_heads, -1)).any(2)


# -- what is gathered ------------------------------------------------------------------------------


def _chunks(
    selection: Selection, own: _Own, selected: Tensor, listing: Listing, kv_heads: int, chunks: int
) -> list[Chunk]:
    """The work of this rank by heads: its rows over the blocks of the whole sequence."""
    group = selected.shape[1] // kv_heads
    mask = _mask(selection, own, selected)
    wide = _text_rows(selection, own, selected.device)
    result = []
    for kv in cut_heads(kv_heads, chunks):
        heads = kv[0] * group, kv[1] * group
        part = None if mask is None else heads_of_mask(mask, *heads)
        result.append(Chunk(heads, kv, RingWork(listing, part, wide)))
    return result


def _mask(selection: Selection, own: _Own, selected: Tensor) -> BlockMask | None:
    """Own tiles over the selected tiles and the text; rows of text are empty here."""
    if own.rows == 0:
        return None
    layout, size, device = selection.layout, selection.layout.tile_volume, selected.device
    (batch, heads), texts = selected.shape[:2], own.rows - own.tiles
    counts = torch.zeros(batch, heads, own.rows, dtype=torch.int32, device=device)
    counts[..., : own.tiles] = selection.top_k + selection.text_blocks
    last = layout.num_tiles + selection.text_blocks
    text = torch.arange(layout.num_tiles, last, dtype=torch.int32, device=device)
    beside = text.expand(batch, heads, own.tiles, -1)
    lists = torch.cat([selected, beside], -1) if text.numel() else selected
    if texts:
        lists = torch.cat([lists, lists.new_zeros(batch, heads, texts, lists.shape[3])], 2)
    return unchecked_mask(
        kv_num_blocks=counts, kv_indices=lists,
        q_block_size=size, kv_block_size=size, q_len=own.rows * size,
        kv_len=layout.num_blocks * size, q_block_lens=own.lens, kv_block_lens=selection.lens,
    )  # fmt: skip


def _text_rows(selection: Selection, own: _Own, device: torch.device) -> WideRows | None:
    """Text queries see everything: they travel to the keys of every rank."""
    layout, owners = selection.layout, own.owners
    tiles, size = layout.num_tiles, layout.tile_volume
    if layout.num_text_blocks == 0:
        return None
    owner = owners.q_owner[tiles:]
    counts = tuple(int((owner == r).sum()) for r in range(owners.ranks))
    mine = torch.arange(own.tiles, own.rows, device=device)
    if own.rows == 0:
        return WideRows(counts, mine, None)
    owner_here = columns_of(owners, device).owner
    blocks = torch.arange(layout.num_blocks, device=device)
    keep = (owner_here == own.rank) & (blocks < tiles + selection.text_blocks)
    q_lens = None
    if selection.lens is not None:
        in_rank_order = tiles + torch.argsort(owner_here[tiles:], stable=True)
        q_lens = selection.lens.index_select(1, in_rank_order).repeat(1, WIDE_PARTS)
    keep = in_parts(keep.expand(1, 1, layout.num_text_blocks, -1))
    mask = BlockMask.from_dense(keep, size, size, q_lens, selection.lens)
    return WideRows(counts, mine, mask)
