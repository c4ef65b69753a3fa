"""The dense ring: queries stay, the keys and values of every rank come by, one rank after another.

After H. Liu et al., "Ring Attention with Blockwise Transformers", 2023; but keys come straight
from the rank that holds them, and the next travel while the last are attended to. Partial results
are merged by their log-sum-exps. The backward pass needs no partial results: it sends the keys
again, takes every step's gradients from the final output and log-sum-exp, and sends those of
foreign keys home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .merge import Accumulator, nothing_seen
from .piece import Options
from .team import Pending, Team, Traffic, start_messages


@dataclass(frozen=True)
class RingCall:
    """All of a call but its tensors.

    Args:
        lengths: keys of each rank.
        is_causal: over the ranks' tokens, one after another.
    """

    team: Team
    lengths: tuple[int, ...]
    is_causal: bool
    options: Options
    traffic: Traffic | None

    def sees(self, receiver: int, sender: int) -> bool:
        """Whether the queries of a rank see the keys of another, or of itself."""
        return self.lengths[sender] > 0 and not (self.is_causal and sender > receiver)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        me, ranks, rows = self.team.rank, self.team.size, q.shape[2]
        keys = _Keys(self, k, v)
        keys.start(1)
        found = Accumulator()
        if rows and self.sees(me, me):
            found.add(*self.options.attend(q, k, v, None, self.is_causal))
        for shift in range(1, ranks):
            received = keys.finish(shift)
            keys.start(shift + 1)  # the next keys travel while these are attended to
            if received is not None and rows:
                found.add(*self.options.attend(q, *received, None))
        if found.out is None or found.lse is None:
            lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            found.out, found.lse = nothing_seen(
                q.new_empty(*q.shape[:3], v.shape[3]), rows, lse_dtype
            )
        return found.out.to(q.dtype), found.lse

    def backward(
        self, grads: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, *results: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        me, ranks, rows = self.team.rank, self.team.size, q.shape[2]
        out, lse = results
        keys = _Keys(self, k, v)
        keys.start(1)
        totals = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        if rows and self.sees(me, me):
            local = self.options.gradients(grads, q, k, v, (out, lse), None, self.is_causal)
            for total, grad in zip(totals, local, strict=True):
                total.add_(grad)
        returns: list[tuple[Pending, list[Tensor]]] = []
        for shift in range(1, ranks):
            received = keys.finish(shift)
            keys.start(shift + 1)
            foreign: Sequence[Tensor] = ()
            if received is not None and rows:
                part_q, *foreign = self.options.gradients(grads, q, *received, (out, lse), None)
                totals[0].add_(part_q)
            elif received is not None:
                foreign = [torch.zeros_like(x) for x in received]
            returns.append(keys.start_return(shift, foreign))
        for pending, parts in returns:  # always in the same order
            pending.wait()
            for total, part in zip(totals[1:], parts, strict=False):
                total.add_(part)
        return totals[0].to(q.dtype), totals[1].to(k.dtype), totals[2].to(v.dtype)


class _Keys:
    """Keys and values on their way: in step s from rank + s, and gradients back to it."""

    def __init__(self, call: RingCall, k: Tensor, v: Tensor) -> None:
        self.call, self.k, self.v = call, k, v
        self._started: tuple[Pending, list[Tensor]] | None = None
        self._message: Tensor | None = None

    def start(self, shift: int) -> None:
        me, ranks = self.call.team.rank, self.call.team.size
        if shift >= ranks:
            return
        source, target = (me + shift) % ranks, (me - shift) % ranks
        sends = self.call.sees(target, me)
        if sends and self._message is None:  # the same for all
            self._message = _joined([self.k, self.v])
        sent = self._message if sends else None
        label = f"ring step {shift}: keys"
        self._started = self._exchange(label, target, sent, source, self.call.sees(me, source))

    def finish(self, shift: int) -> tuple[Tensor, Tensor] | None:
        """[k, v] of rank + shift; None: this rank sees nothing of it."""
        assert self._started is not None
        pending, parts = self._started
        pending.wait()
        return (parts[0], parts[1]) if parts else None

    def start_return(self, shift: int, foreign: Sequence[Tensor]) -> tuple[Pending, list[Tensor]]:
        me, ranks = self.call.team.rank, self.call.team.size
        owner, debtor = (me + shift) % ranks, (me - shift) % ranks
        sent = _joined(foreign) if foreign else None
        label = f"ring step {shift}: gradients"
        return self._exchange(label, owner, sent, debtor, self.call.sees(debtor, me), mine=True)

    def _exchange(
        self,
        label: str,
        target: int,
        sent: Tensor | None,
        source: int,
        receives: bool,
        mine: bool = False,
    ) -> tuple[Pending, list[Tensor]]:
        """Sends to one rank and receives keys (of its own, or ``mine``) from another."""
        call, none = self.call, self.k.new_empty(0)
        length = call.lengths[call.team.rank if mine else source]
        parts: list[Tensor] = []
        flat = none
        if receives:
            shapes = [(*x.shape[:2], length, x.shape[3]) for x in (self.k, self.v)]
            sizes = [torch.Size(shape).numel() for shape in shapes]
            flat = torch.empty(sum(sizes), dtype=none.dtype, device=none.device)
            parts = [x.view(s) for x, s in zip(flat.split(sizes), shapes, strict=True)]
        sends, into = [none] * call.team.size, [none] * call.team.size
        sends[target] = none if sent is None else sent
        into[source] = flat
        return start_messages(sends, into, call.team, label, call.traffic), parts


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The tensors one after another, flat."""
    return torch.cat([x.reshape(-1) for x in parts])
