"""HeadGroups: heads of one layer that attend in different ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_int, forward_mode_is_on, is_plain, wants_gradient
from ..registry import PRECISIONS
from ..words import as_words
from .token_pattern import QKV, Options, TokenPattern
from .video_tokens import VideoTokens
from .vsa import Gate


@dataclass(frozen=True)
class HeadGroup:
    """Query heads of a layer that attend in one way, in one launch.

    Args:
        heads: their numbers, ascending.
        pattern: of all of them; windows or rules per head are in the order of ``heads``.
        precision: "native" or a quantized one; None: that of the call.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its range.
    """

    heads: Sequence[int]
    pattern: TokenPattern
    precision: str | None = None

    def __post_init__(self) -> None:
        heads = tuple(check_int("heads", head, minimum=0) for head in self.heads)
        if not heads or list(heads) != sorted(set(heads)):
            raise ValueError(f"heads must be ascending head numbers, at least one; got {heads}")
        object.__setattr__(self, "heads", heads)
        if not isinstance(self.pattern, TokenPattern) or isinstance(self.pattern, HeadGroups):
            raise TypeError(f"pattern must be a pattern, got {self.pattern!r}")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(
                f"precision must be None or one of {', '.join(PRECISIONS)}; got {self.precision!r}"
            )
        self.pattern.check_heads(len(heads))


@dataclass(frozen=True)
class HeadGroups(TokenPattern):
    """Heads of one layer in groups, each with a pattern and a precision of its own.

    Every group is a launch, and one that is no run of neighbouring heads copies its q, k and v: few
    groups pay, many do not.

    Args:
        groups: every query head of the layer is in exactly one of them.

    Raises:
        TypeError, ValueError: heads that are missing or in two groups.
    """

    groups: Sequence[HeadGroup]

    def __post_init__(self) -> None:
        groups = tuple(self.groups)
        if not groups or not all(isinstance(group, HeadGroup) for group in groups):
            raise TypeError(f"groups must be HeadGroup objects, at least one; got {groups!r}")
        heads = sorted(head for group in groups for head in group.heads)
        if heads != list(range(len(heads))):
            raise ValueError(f"groups must hold each of the heads 0, 1, 2 ... once; got {heads}")
        object.__setattr__(self, "groups", groups)

    @property
    def heads(self) -> int:
        """Query heads in all groups."""
        return sum(len(group.heads) for group in self.groups)

    def _attend(self, qkv: QKV, tokens: VideoTokens, gate: Gate, options: Options) -> Tensor:
        query, key, value = qkv
        shared = query.shape[1] // key.shape[1]  # query heads that read one key head (GQA)
        parts = []
        for group in self.groups:
            kv_heads = _key_heads(group.heads, shared)
            chosen = options
            if group.precision is not None:
                chosen = {**options, "precision": group.precision, "quantization": None}
            q, k, v = (_take(query, group.heads), *(_take(x, kv_heads) for x in (key, value)))
            part_gate = _gate_of(gate, group.heads)
            parts.append(group.pattern.attend(q, k, v, tokens, gate=part_gate, **chosen))
        return _together(parts, self.groups)

    def density(self, tokens: VideoTokens, heads: int = 1) -> float:
        shares = [
            len(group.heads) * group.pattern.density(tokens, len(group.heads))
            for group in self.groups
        ]
        return sum(shares) / self.heads

    def check_heads(self, heads: int) -> None:
        if heads != self.heads:
            raise ValueError(f"groups are of {self.heads} query heads, but there are {heads}")

    def of_heads(self, start: int, stop: int) -> HeadGroups:
        groups = []
        for group in self.groups:
            inside = [i for i, head in enumerate(group.heads) if start <= head < stop]
            if inside:
                pattern = group.pattern.of_heads(inside[0], inside[-1] + 1)
                heads = [group.heads[i] - start for i in inside]
                groups.append(HeadGroup(heads, pattern, group.precision))
        return HeadGroups(groups)


def _key_heads(heads: Sequence[int], shared: int) -> list[int]:
    """The key heads that ``heads`` read: each once where all their queries are there."""
    wanted = [head // shared for head in heads]
    whole = list(dict.fromkeys(wanted))
    if len(whole) * shared == len(wanted):
        return whole
    return wanted


def _take(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads of [B, H, S, D]: a view where they are neighbours, or all the same."""
    if len(set(heads)) == 1:
        return x.narrow(1, heads[0], 1)
    runs = [x.narrow(1, run.start, len(run)) for run in _runs(heads)]
    return runs[0] if len(runs) == 1 else _joined(runs)


def _together(parts: Sequence[Tensor], groups: Sequence[HeadGroup]) -> Tensor:
    """[B, H, S, D] of the parts of all groups, in the order of heads, by one copy."""
    pieces = {}
    for part, group in zip(parts, groups, strict=True):
        place = 0
        for run in _runs(group.heads):
            pieces[run.start] = part.narrow(1, place, len(run))
            place += len(run)
    return _joined([pieces[head] for head in sorted(pieces)])


def _joined(parts: list[Tensor]) -> Tensor:
    """The heads of all parts, copied in words of 16 bytes where no derivative may be asked for."""
    if (
        torch.compiler.is_compiling()
        or wants_gradient(*parts)
        or forward_mode_is_on()
        or not is_plain(*parts)
    ):
        return torch.cat(parts, 1)
    return torch.cat(as_words(*parts), 1).view(parts[0].dtype)


def _runs(heads: Sequence[int]) -> list[range]:
    """``heads`` as neighbours that follow each other: 0, 1, 4, 5, 6 are 0 to 1 and 4 to 6."""
    runs: list[range] = []
    for head in heads:
        if runs and head == runs[-1].stop:
            runs[-1] = range(runs[-1].start, head + 1)
        else:
            runs.append(range(head, head + 1))
    return runs


def _gate_of(gate: Gate, heads: Sequence[int]) -> Gate:
    if isinstance(gate, Tensor) and gate.dim() == 4 and gate.shape[1] > 1:
        return _take(gate, heads)
    return gate


LayerPattern = TokenPattern  # what a layer of a model may be given
