"""What a call will send and compute on each rank, before anything moves."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from ..block_mask import BlockMask
from ..functional.patterns import Pattern
from ..functional.video_tokens import VideoTokens
from .job import Job, heads_of_mask, make_job
from .placement import Placement
from .request import KINDS
from .ring_attention import plan_of, query_route
from .ring_plan import RingPlan
from .run import Placements, placements, rows_of
from .shards import Shards
from .ulysses import HeadShare, share_heads

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SequencePlan:
    """Bytes and work of every rank, for one call.

    ``str()`` is a table for people.

    Args:
        kind: "ulysses", "ring" or "usp".
        tokens: that each rank holds.
        forward, backward: for each rank the bytes that it sends to others, by kind of message.
        pairs: query-key pairs that each rank attends to, all batch items and heads.
    """

    kind: str
    tokens: tuple[int, ...]
    forward: tuple[Counter[str], ...]
    backward: tuple[Counter[str], ...]
    pairs: tuple[float, ...]

    @property
    def forward_bytes(self) -> tuple[int, ...]:
        """Bytes that each rank sends in a forward pass."""
        return tuple(sum(sent.values()) for sent in self.forward)

    @property
    def backward_bytes(self) -> tuple[int, ...]:
        """Bytes that each rank sends in a backward pass."""
        return tuple(sum(sent.values()) for sent in self.backward)

    @property
    def imbalance(self) -> float:
        """The largest work of a rank over the mean: 1 is perfect, 2 wastes half of the ranks."""
        mean = sum(self.pairs) / len(self.pairs)
        return max(self.pairs) / mean if mean else 1.0

    def __str__(self) -> str:
        labels = list(dict.fromkeys(label for sent in self.forward for label in sent))
        rows = [f"{self.kind} over {len(self.tokens)} ranks, imbalance {self.imbalance:.3f}"]
        rows.append(f"{'rank':>4} {'tokens':>9} {'share of work':>14} {'forward MB':>11} "
                    f"{'backward MB':>12}")  # fmt: skip
        total = sum(self.pairs) or 1.0
        for rank, (tokens, pairs) in enumerate(zip(self.tokens, self.pairs, strict=True)):
            rows.append(
                f"{rank:>4} {tokens:>9} {pairs / total:>13.2%} "
                f"{self.forward_bytes[rank] / 1e6:>11.2f} {self.backward_bytes[rank] / 1e6:>12.2f}"
            )
        rows.append("forward, all ranks: " + ", ".join(
            f"{label} {sum(sent[label] for sent in self.forward) / 1e6:.2f} MB" for label in labels
        ))  # fmt: skip
        return "\n".join(rows)


@dataclass(frozen=True)
class _Shape:
    """Sizes of a call: batch, heads, channels, bytes of an element and of an lse."""

    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    unit: int
    lse_unit: int


def sequence_parallel_plan(
    mask: BlockMask | Pattern | None,
    ranks: int | tuple[int, int],
    *,
    kind: str = "ulysses",
    q_heads: int,
    kv_heads: int | None = None,
    head_dim: int = 128,
    head_dim_v: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    tokens: VideoTokens | None = None,
    tile_order: bool = False,
    shards: Shards | None = None,
    kv_shards: Shards | None = None,
) -> SequencePlan:
    """The bytes that :func:`sequence_parallel_attention` will send with these arguments, and the
    work of each rank. Needs no process group.

    Args:
        mask: as there; for dense attention give ``shards``. ``VideoSparse`` in a ring is known only
            once it has selected: see :func:`record_traffic`.
        ranks: how many; for "usp" (rows of the ring, ranks of a row).
        q_heads, kv_heads, head_dim, head_dim_v, batch, dtype: of q, k and v; ``kv_heads`` defaults
            to ``q_heads``, ``head_dim_v`` to ``head_dim``.
        kind, tokens, tile_order, shards, kv_shards: as there.

    Raises:
        TypeError, ValueError: arguments that do not fit each other.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    if (kind == "usp") != isinstance(ranks, tuple):
        raise ValueError(f"ranks must be (ring, Ulysses) for 'usp', else a number; got {ranks!r}")
    shape = _Shape(
        batch, q_heads, q_heads if kv_heads is None else kv_heads, head_dim,
        head_dim if head_dim_v is None else head_dim_v, dtype.itemsize,
        8 if dtype == torch.float64 else 4,
    )  # fmt: skip
    job = make_job(mask, tokens, tile_order, False, torch.empty(batch, q_heads, 0, head_dim))
    if job.selection is not None and kind != "ulysses":
        raise ValueError(
            "VideoSparse selects by data: what a ring sends is known only afterwards, from "
            "record_traffic()"
        )
    count = ranks[0] * ranks[1] if isinstance(ranks, tuple) else ranks
    if job.q_tokens is None and shards is None:
        raise ValueError("shards must be given for dense attention: they say how many tokens")
    shards = shards or Shards.even(job.q_tokens or 0, count)
    kv_shards = kv_shards or _default_kv(job, shards, count)
    places = placements(job, shards, kv_shards)
    forward, backward, pairs = [], [], []
    for rank in range(count):
        width = count if kind == "ulysses" else 1
        if isinstance(ranks, tuple):
            width = ranks[1]
        sent = _sent_by(kind, job, places, width, rank, shape)
        forward.append(sent[0])
        backward.append(sent[1])
        pairs.append(_pairs_of(job, places, width, rank, shape))
    return SequencePlan(kind, shards.lengths, tuple(forward), tuple(backward), tuple(pairs))


def _default_kv(job: Job, shards: Shards, ranks: int) -> Shards:
    if job.kv_tokens in (None, shards.length):
        return shards
    return Shards.even(job.kv_tokens or 0, ranks)


def _sent_by(
    kind: str, job: Job, places: Placements, width: int, rank: int, shape: _Shape
) -> tuple[Counter[str], Counter[str]]:
    """(forward, backward) bytes of a rank of rows of ``width`` ranks."""
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()
    row, member = divmod(rank, width)
    (q_in, q_between), (kv_in, kv_between) = (rows_of(p, width, row) for p in places)
    shares = share_heads(shape.q_heads, shape.kv_heads, width)
    if width > 1 or len(places[0].slots) == 1:
        inside = places if kind == "ulysses" else (q_in, kv_in)
        _add_ulysses(forward, backward, inside, member, shape)
    if width < len(places[0].slots):
        share = shares[member]
        heads = _heads_of(share, shape)
        if width == 1:
            q_between, kv_between = places
        _add_ring(forward, backward, job, (q_between, kv_between), row, share.q, heads, shape)
    return +forward, +backward


def _heads_of(share: HeadShare, shape: _Shape) -> tuple[int, int]:
    """Query and key heads of a rank's call; torn groups get a key head per query head."""
    q_heads, kv_heads = (b - a for a, b in (share.q, share.kv))
    torn = share.key_head_of_query_heads(shape.q_heads // shape.kv_heads) is not None
    return q_heads, q_heads if q_heads and torn else kv_heads


def _add_ulysses(
    forward: Counter[str], backward: Counter[str], places: Placements, me: int, shape: _Shape
) -> None:
    shares = share_heads(shape.q_heads, shape.kv_heads, len(places[0].slots))
    q_place, kv_place = places
    unit = shape.batch * shape.unit

    def rows(rank: int) -> tuple[int, int, int]:
        """Bytes per token of q, of k and v, and of the output, for the heads of a rank."""
        q_heads, kv_heads = (b - a for a, b in (shares[rank].q, shares[rank].kv))
        return (
            q_heads * shape.head_dim * unit,
            kv_heads * (shape.head_dim + shape.head_dim_v) * unit,
            q_heads * shape.head_dim_v * unit,
        )

    q_mine, kv_mine, out_mine = rows(me)
    for peer in range(len(shares)):
        if peer == me:
            continue
        q, kv, out = rows(peer)
        arrives = "ulysses: q, k, v"
        forward[arrives] += q_place.message_lengths(False)[me] * q
        forward[arrives] += kv_place.message_lengths(False)[me] * kv
        forward["ulysses: out"] += q_place.message_lengths(True)[peer] * out_mine
        backward["ulysses: out, gradient"] += q_place.message_lengths(True)[me] * out
        backward[f"{arrives}, gradient"] += (
            q_place.source_lengths[peer] * q_mine + kv_place.source_lengths[peer] * kv_mine
        )


def _add_ring(
    forward: Counter[str],
    backward: Counter[str],
    job: Job,
    places: Placements,
    me: int,
    q_heads: tuple[int, int],
    heads: tuple[int, int],
    shape: _Shape,
) -> None:
    """The ring of rank ``me`` with some query heads, ``heads`` = how many (query, key)."""
    if heads[0] == 0:
        return
    channels = (shape.head_dim + shape.head_dim_v) * shape.unit
    if job.mask is None:
        lengths = places[1].source_lengths
        own = lengths[me]
        for shift in range(1, len(lengths)):
            sent = own * shape.batch * heads[1] * channels
            forward[f"ring step {shift}: keys"] += sent
            backward[f"ring step {shift}: keys"] += sent
            owner = lengths[(me + shift) % len(lengths)]
            home = owner * shape.batch * heads[1] * channels
            backward[f"ring step {shift}: gradients"] += home
        return
    plan = plan_of(job, *places, q_heads, heads[0] // heads[1])
    rows = plan.rows_sent(shape.batch, heads[1])
    forward["ring: keys"] += int(rows[me].sum()) * channels
    backward["ring: keys"] += int(rows[me].sum()) * channels
    backward["ring: gradients"] += int(rows[:, me].sum()) * channels
    _add_wide_rows(forward, backward, plan, me, heads[0] * job.mask.q_block_size, shape)
    _add_routes(forward, backward, job.mask, places, me, heads, shape)


def _add_wide_rows(
    forward: Counter[str],
    backward: Counter[str],
    plan: RingPlan,
    me: int,
    rows_of_block: int,
    shape: _Shape,
) -> None:
    own = int((plan.owners.q_owner[plan.wide] == me).sum())
    here = own * rows_of_block * shape.batch * (plan.owners.ranks - 1)  # to all others
    there = (plan.wide.numel() - own) * rows_of_block * shape.batch  # to their owners
    d, dv, unit = shape.head_dim, shape.head_dim_v, shape.unit
    forward["wide rows: queries"] += here * d * unit
    forward["wide rows: outputs"] += there * dv * unit
    forward["wide rows: lse"] += there * shape.lse_unit
    backward["wide rows: queries and gradients"] += here * (d + 2 * dv) * unit
    backward["wide rows: lse and gradients"] += here * 2 * shape.lse_unit
    backward["wide rows: gradients of queries"] += there * d * unit


def _add_routes(
    forward: Counter[str],
    backward: Counter[str],
    mask: BlockMask,
    places: Placements,
    me: int,
    heads: tuple[int, int],
    shape: _Shape,
) -> None:
    route = query_route(*places, mask.q_block_size, mask.kv_block_size, me, _CPU)
    unit, label = shape.batch * shape.unit, "tokens <-> blocks"
    q_row, out_row = heads[0] * shape.head_dim * unit, heads[0] * shape.head_dim_v * unit
    forward[label] += route.bytes_to_blocks(q_row) + route.bytes_to_tokens(out_row)
    backward[label] += route.bytes_to_blocks(out_row, copies=True)
    backward[label] += route.bytes_to_tokens(q_row, copies=False)


def _pairs_of(job: Job, places: Placements, width: int, rank: int, shape: _Shape) -> float:
    """Attended pairs of a rank; a selection counts as its tiles were full."""
    row, member = divmod(rank, width)
    share = share_heads(shape.q_heads, shape.kv_heads, width)[member]
    heads = share.q[1] - share.q[0]
    if job.selection is not None:
        return float(heads * shape.batch)
    if job.mask is None:
        q_tokens = _between(places[0], width).lengths[row]
        kv_tokens = sum(places[1].source_lengths)
        return float(q_tokens) * kv_tokens * heads * shape.batch
    if heads == 0:
        return 0.0
    of_heads = 1 if job.mask.kv_num_blocks.shape[1] > 1 else heads
    of_batch = shape.batch if job.mask.batch == 1 else 1
    if width == len(places[0].slots):
        part = heads_of_mask(job.mask, *share.q)
        return float(part.attended_pairs()) * of_heads * of_batch
    between = _between(places[0], width), _between(places[1], width)
    q_heads, kv_heads = _heads_of(share, shape)
    plan = plan_of(job, *between, share.q, q_heads // kv_heads)
    return float(plan.pairs()[row]) * of_heads * of_batch


def _between(place: Placement, width: int) -> Placement:
    return place if width == 1 else rows_of(place, width, 0)[1]
