"""Ulysses: every rank trades its part of the tokens for all tokens of its part of the heads.

After S. A. Jacobs et al., "DeepSpeed Ulysses", 2023. One exchange brings q, k and v together, one
takes the output back. Messages are [tokens, batch, channels of the receiver's heads], so what has
arrived is the whole sequence of a rank's heads and is attended to in place, through its strides.
What a rank has of its own heads does not travel: it is copied to where it is read.

Heads and tokens need not be divisible by the number of ranks: a rank may have fewer heads than
another, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..words import as_words, gather, scatter
from .placement import Placement
from .team import Pending, Team, Traffic, current_traffic, start_messages

Heads = tuple[int, int]  # first, past the last
MAX_CHUNKS = 4
CHUNK_BYTES = 96 * 2**20  # what takes 0.2 ms on NVLink: a chunk costs the host as much


def number_of_chunks(received: int) -> int:
    """Into how many chunks of heads a rank cuts its work when others send it so many bytes."""
    return max(1, min(MAX_CHUNKS, received // CHUNK_BYTES))


def cut_heads(heads: int, chunks: int) -> list[Heads]:
    """Even runs of heads, none empty but where there is no head."""
    chunks = max(1, min(chunks, heads))
    return [(heads * c // chunks, heads * (c + 1) // chunks) for c in range(chunks)]


@dataclass(frozen=True)
class HeadShare:
    """The query heads of one rank, and the key heads that they read."""

    q: Heads
    kv: Heads

    def key_head_of_query_heads(self, group: int) -> list[int] | None:
        """For each query head its key head among ``kv``; None where plain GQA says the same."""
        wanted = [h // group - self.kv[0] for h in range(*self.q)]
        q_heads, kv_heads = self.q[1] - self.q[0], self.kv[1] - self.kv[0]
        if q_heads % max(kv_heads, 1) == 0:
            plain = [h // (q_heads // kv_heads) for h in range(q_heads)] if q_heads else []
            if wanted == plain:
                return None
        return wanted


def share_heads(q_heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Even shares: whole key heads where there are enough, otherwise query heads."""
    group = q_heads // kv_heads
    shares = []
    for r in range(ranks):
        if kv_heads >= ranks:
            kv = kv_heads * r // ranks, kv_heads * (r + 1) // ranks
            shares.append(HeadShare((kv[0] * group, kv[1] * group), kv))
        else:
            q = q_heads * r // ranks, q_heads * (r + 1) // ranks
            kv = (q[0] // group, -(-q[1] // group)) if q[0] < q[1] else (0, 0)
            shares.append(HeadShare(q, kv))
    return shares


def chunk_shares(shares: Sequence[HeadShare], chunks: int, group: int) -> list[list[HeadShare]]:
    """The shares of all ranks cut into ``chunks`` parts along whole key heads: [chunk][rank]."""
    parts = []
    for c in range(chunks):
        part = []
        for share in shares:
            first, heads = share.kv[0], share.kv[1] - share.kv[0]
            kv = first + heads * c // chunks, first + heads * (c + 1) // chunks
            part.append(HeadShare((kv[0] * group, kv[1] * group), kv))
        parts.append(part)
    return parts


@dataclass
class Travelling:
    """A started swap: its messages to and from each rank, those of this rank for itself among them.

    Args:
        arrived: [tokens of all ranks, B, channels of this rank's heads], one rank after another, or
            flat where it holds heads of all ranks.
        channels: of each tensor.
    """

    channels: list[int]
    pending: Pending
    sends: list[Tensor]
    parts: list[Tensor]
    arrived: Tensor

    def wait(self, me: int) -> None:
        self.pending.wait()
        self.parts[me].copy_(self.sends[me])
        self.sends = []


@dataclass(frozen=True)
class Run:
    """Ranks one after another that get equally many heads, at equal distances: one copy for all."""

    ranks: slice
    first: int
    heads: int
    step: int

    def of(self, x: Tensor) -> Tensor:
        """Their heads of ``x`` [B, H, S, D], seen as [S, ranks, B, heads, D]."""
        last = self.first + (self.ranks.stop - self.ranks.start - 1) * self.step + self.heads
        windows = x[:, self.first : last].unfold(1, self.heads, self.step)
        return windows.permute(2, 1, 0, 4, 3)


@lru_cache(maxsize=256)
def runs_of(heads: tuple[Heads, ...]) -> tuple[Run, ...]:
    """The ranks in as few runs as there are; ranks without heads are in none."""
    runs: list[Run] = []
    for rank, (first, last) in enumerate(heads):
        if first == last:
            continue
        if runs and runs[-1].ranks.stop == rank and runs[-1].heads == last - first:
            run = runs[-1]
            distance = first - heads[rank - 1][0]
            is_second = run.ranks.stop - run.ranks.start == 1
            if distance > 0 and (is_second or distance == run.step):
                runs[-1] = Run(slice(run.ranks.start, rank + 1), run.first, run.heads, distance)
                continue
        runs.append(Run(slice(rank, rank + 1), first, last - first, 1))
    return tuple(runs)


@dataclass(frozen=True)
class Swap:
    """One trade of tokens for heads among the ranks of a team.

    Args:
        heads: for each tensor that travels together, the heads that each rank gets.
        copies: True where every holder of a token takes part (outputs go to all copies, and the
            gradients of all copies are summed), False where only its first holder does.
    """

    team: Team
    placement: Placement
    heads: tuple[tuple[Heads, ...], ...]
    copies: bool
    label: str
    traffic: Traffic | None

    @property
    def gradient(self) -> Swap:
        """Of the way back of gradients."""
        label = f"{self.label}, gradient"
        return Swap(self.team, self.placement, self.heads, self.copies, label, self.traffic)

    @property
    def is_one_to_one(self) -> bool:
        """Every token and head that a rank holds is sent, and to one rank only."""
        pairs = [pair for heads in self.heads for pair in pairwise(heads)]
        return not self.placement.has_copies and all(a[1] <= b[0] for a, b in pairs)

    @property
    def spans(self) -> tuple[tuple[int, int], ...] | None:
        """Slots of each rank's message, where what arrives lies as the slots do."""
        return self.placement.spans(self.copies)

    def _sources(self, device: torch.device) -> Tensor | slice:
        """The tokens of this rank that take part."""
        if self.copies:
            return slice(0, self.placement.lengths[self.team.rank])
        return self.placement.on_device(self.team.rank, "sources", device)

    def _counts(self, rank: int) -> list[int]:
        """Heads of ``rank``, tensor by tensor."""
        return [heads[rank][1] - heads[rank][0] for heads in self.heads]

    def _messages(
        self, like: Sequence[Tensor], lengths: Sequence[int], mine: bool, more: int = 0
    ) -> tuple[Tensor, list[Tensor]]:
        """(memory, in it a message for each rank [tokens, B, channels of its heads], or, with
        ``mine``, of this rank's). ``more``: rows that the memory has at its end beside them.
        """
        me, x = self.team.rank, like[0]
        widths = [
            sum(n * y.shape[3] for n, y in zip(self._counts(me if mine else p), like, strict=True))
            for p in range(self.team.size)
        ]
        sizes = [n * x.shape[0] * w for n, w in zip(lengths, widths, strict=True)]
        sizes.append(more * x.shape[0] * widths[me])
        flat = torch.empty(sum(sizes), dtype=x.dtype, device=x.device)
        return flat, [
            part.view(n, x.shape[0], w)
            for part, n, w in zip(flat.split(sizes), lengths, widths, strict=False)
        ]

    def _blocks(
        self, flat: Tensor, like: Sequence[Tensor], tokens: int
    ) -> Iterator[tuple[int, Run, Tensor]]:
        """(tensor, run, its places [tokens, ranks, B, heads, D]) in messages of ``tokens`` rows to
        or from all ranks: ``flat`` as :meth:`_messages` makes it.
        """
        batch, channels = like[0].shape[0], [x.shape[3] for x in like]
        if tokens == 0:
            return
        widths = [
            sum(n * d for n, d in zip(self._counts(p), channels, strict=True))
            for p in range(self.team.size)
        ]
        starts = list(accumulate((tokens * batch * width for width in widths), initial=0))
        for i, heads in enumerate(self.heads):
            for run in (part for whole in runs_of(heads) for part in self._alike(whole)):
                start, stop = run.ranks.start, run.ranks.stop
                counts = self._counts(start)[:i]
                before = sum(n * d for n, d in zip(counts, channels[:i], strict=True))
                rows = flat[starts[start] : starts[stop]].view(stop - start, tokens, batch, -1)
                rows = rows.narrow(3, before, run.heads * channels[i])
                yield i, run, rows.unflatten(3, (run.heads, -1)).transpose(0, 1)

    def _alike(self, run: Run) -> Iterator[Run]:
        """The run in parts whose ranks have equally many heads of every tensor."""
        start = run.ranks.start
        for p in range(run.ranks.start + 1, run.ranks.stop + 1):
            if p == run.ranks.stop or self._counts(p) != self._counts(start):
                first = run.first + (start - run.ranks.start) * run.step
                yield Run(slice(start, p), first, run.heads, run.step)
                start = p

    # -- tokens -> heads ---------------------------------------------------------------------------

    def start_to_heads(self, xs: Sequence[Tensor]) -> Travelling:
        """Sends the parts [B, H, held, D] of this rank; all have one dtype."""
        me, spans, size = self.team.rank, self.spans, self.team.size
        lengths = self.placement.message_lengths(self.copies)
        flat, sends = self._messages(xs, [lengths[me]] * size, mine=False)
        sources = self._sources(xs[0].device)
        if spans is not None:
            sources = self.placement.on_device(me, "span_tokens", xs[0].device)
        for i, run, target in self._blocks(flat, xs, lengths[me]):
            gather(target, run.of(xs[i]), sources, 0)
        # One row more, of zeros, is what goes to the slots that are nobody's.
        more = int(spans is None)
        arrived, parts = self._messages(xs, lengths, mine=True, more=more)
        arrived = arrived.view(sum(lengths) + more, *parts[me].shape[1:])
        if spans is not None:
            parts = [arrived[start:stop] for start, stop in spans]
        pending = start_messages(sends, parts, self.team, self.label, self.traffic)
        return Travelling([x.shape[3] for x in xs], pending, sends, parts, arrived)

    def finish_to_heads(self, travelling: Travelling) -> list[Tensor]:
        """[B, heads of this rank, slots, D] of each tensor; slots that are nobody's are 0."""
        me, placement = self.team.rank, self.placement
        travelling.wait(me)
        whole, device = travelling.arrived, travelling.arrived.device
        if self.spans is not None:
            if placement.has_holes:
                as_words(whole)[0].index_fill_(0, placement.holes(device), 0)
        elif self.copies and placement.has_copies:
            whole = whole.new_zeros(placement.length, *whole.shape[1:])
            for p, part in enumerate(travelling.parts):
                whole[placement.on_device(p, "slots", device)] += part
        else:
            if placement.has_holes:
                whole[-1].zero_()
            rows, target = whole, whole.new_empty(placement.length, *whole.shape[1:])
            gather(target, rows, placement.arrivals(device), 0)
            whole = target
        parts = _columns(whole, self._counts(me), travelling.channels)
        return [part.permute(1, 2, 0, 3) for part in parts]

    # -- heads -> tokens ---------------------------------------------------------------------------

    def _as_they_lie(self) -> bool:
        """Outputs leave from where attention wrote them, padding among them. The gradients of q, k
        and v are written side by side first, and without it.
        """
        return self.copies and self.spans is not None

    def _lengths_home(self) -> list[int]:
        if self._as_they_lie():
            return self.placement.message_lengths(True)
        return self.placement.lengths if self.copies else self.placement.source_lengths

    def start_to_tokens(self, ys: Sequence[Tensor]) -> Travelling:
        """Sends [B, heads of this rank, slots, D] of each tensor back to who holds the tokens."""
        me, device, channels = self.team.rank, ys[0].device, [y.shape[3] for y in ys]
        lengths = self._lengths_home()
        if self._as_they_lie():
            assert self.spans is not None
            rows = ys[0].permute(2, 0, 1, 3).flatten(2).contiguous()
            sends = [rows[start:stop] for start, stop in self.spans]
        else:
            flat, sends = self._messages(ys, lengths, mine=True)
            rows = flat.view(sum(lengths), *sends[me].shape[1:])
            slots = self.placement.all_slots("slots" if self.copies else "source_slots", device)
            for target, y in zip(_columns(rows, self._counts(me), channels), ys, strict=True):
                gather(target, y.permute(2, 0, 1, 3), slots, 0)
        arrived, parts = self._messages(ys, [lengths[me]] * self.team.size, mine=False)
        pending = start_messages(sends, parts, self.team, self.label, self.traffic)
        return Travelling(channels, pending, sends, parts, arrived)

    def finish_to_tokens(self, travelling: Travelling, into: Sequence[Tensor], adds: bool) -> None:
        """Writes what arrived into tensors [B, H, held, D]; ``adds`` where heads come twice."""
        me, device = self.team.rank, into[0].device
        travelling.wait(me)
        sources = self._sources(device)
        for i, run, rows in self._blocks(travelling.arrived, into, self._lengths_home()[me]):
            if self._as_they_lie():
                places = self.placement.on_device(me, "span_places", device)
                gather(run.of(into[i]), rows, places, 0)
                continue
            if not adds:
                scatter(run.of(into[i]), rows, sources, 0)
                continue
            for r in range(rows.shape[1]):  # windows of heads may overlap
                first = run.first + r * run.step
                target = into[i][:, first : first + run.heads].permute(2, 0, 1, 3)
                target[sources] += rows[:, r]


def _columns(rows: Tensor, counts: Sequence[int], channels: Sequence[int]) -> list[Tensor]:
    """Views [tokens, B, heads, D] of tensors whose channels lie side by side in rows."""
    widths = [n * d for n, d in zip(counts, channels, strict=True)]
    return [
        part.unflatten(-1, (n, d))
        for part, n, d in zip(rows.split(widths, -1), counts, channels, strict=True)
    ]


def swap_of(
    team: Team, placement: Placement, heads: Sequence[Sequence[Heads]], copies: bool, label: str
) -> Swap:
    return Swap(team, placement, tuple(tuple(h) for h in heads), copies, label, current_traffic())
