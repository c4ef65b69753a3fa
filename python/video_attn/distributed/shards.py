"""Shards: which tokens of a sequence each rank holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..block_mask import BlockMask
from ..functional.patterns import SlidingTile
from ..functional.video_tokens import VideoTokens

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Shards:
    """The tokens of every rank, as ranges of positions in the sequence, in the order it holds them.

    A token may stand on several ranks (text that everybody holds): its first holder's copy is the
    one that is attended to, and every holder gets its output.

    Args:
        ranges: for each rank its ranges (start, stop), as in ``(((0, 8),), ((8, 16), (20, 24)))``.

    Raises:
        TypeError, ValueError: a range that is none, overlaps on one rank, or tokens that no rank
            holds.
    """

    ranges: tuple[Ranges, ...]

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("ranges must have an entry for each rank, got none")
        covered: list[tuple[int, int]] = []
        for rank, own in enumerate(self.ranges):
            for start, stop in own:
                if not 0 <= start <= stop:
                    raise ValueError(
                        f"ranges must be (start, stop) with 0 <= start <= stop; rank {rank} has "
                        f"{(start, stop)}"
                    )
            filled = sorted(r for r in own if r[0] < r[1])
            for (_, stop), (start, _) in pairwise(filled):
                if start < stop:
                    raise ValueError(f"ranges of rank {rank} overlap at token {start}")
            covered += filled
        end = 0
        for start, stop in sorted(covered):
            if start > end:
                raise ValueError(f"ranges leave tokens {end} to {start - 1} to no rank")
            end = max(end, stop)

    @classmethod
    def even(cls, length: int, ranks: int) -> Shards:
        """Rank r of n holds [length * r // n, length * (r + 1) // n): the default everywhere."""
        _check_count("length", length, 0)
        _check_count("ranks", ranks, 1)
        return cls(tuple(((length * r // ranks, length * (r + 1) // ranks),) for r in range(ranks)))

    @classmethod
    def of_lengths(cls, lengths: Iterable[int]) -> Shards:
        """Contiguous parts of these lengths, rank after rank."""
        ranges, start = [], 0
        for length in lengths:
            _check_count("lengths", length, 0)
            ranges.append(((start, start + length),))
            start += length
        return cls(tuple(ranges))

    @classmethod
    def chunked(cls, length: int, ranks: int) -> Shards:
        """Parts as ``torch.chunk`` and DTensor make them: ceil(length / ranks) tokens."""
        _check_count("length", length, 0)
        _check_count("ranks", ranks, 1)
        size = -(-length // ranks)
        ends = [min(r * size, length) for r in range(ranks + 1)]
        return cls(tuple(((a, b),) for a, b in pairwise(ends)))

    def with_text(self, text_length: int, text_first: bool = False) -> Shards:
        """The same parts of the video, and all of the text, before or after it, on every rank."""
        _check_count("text_length", text_length, 0)
        shift, text = (text_length, (0, text_length)) if text_first else (
            0, (self.length, self.length + text_length)
        )  # fmt: skip
        video = [tuple((a + shift, b + shift) for a, b in own) for own in self.ranges]
        return Shards(tuple((text, *own) if text_first else (*own, text) for own in video))

    @property
    def num_ranks(self) -> int:
        return len(self.ranges)

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        return max((stop for own in self.ranges for _, stop in own), default=0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that each rank holds."""
        return tuple(sum(stop - start for start, stop in own) for own in self.ranges)

    @property
    def is_contiguous(self) -> bool:
        """Every rank holds one range, each after that of the rank before, and no token twice."""
        ranges = [own[0] if own else (0, 0) for own in self.ranges]
        filled = [r for r in ranges if r[0] < r[1]]
        in_order = all(a[1] == b[0] for a, b in pairwise(filled))
        return in_order and all(len(own) <= 1 for own in self.ranges)

    def positions(self, rank: int) -> Tensor:
        """int64 [lengths[rank]]: where the tokens of ``rank`` stand in the sequence."""
        parts = [torch.arange(start, stop) for start, stop in self.ranges[rank]]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def take(self, x: Tensor, rank: int, dim: int = 1) -> Tensor:
        """The part of ``rank`` of a whole tensor with ``length`` tokens on ``dim``; a view where
        the part is one range.

        Raises:
            ValueError: another number of tokens.
        """
        if x.shape[dim] != self.length:
            raise ValueError(f"x has {x.shape[dim]} tokens on dim {dim}, but shards {self.length}")
        ranges = self.ranges[rank] or ((0, 0),)
        parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def join(self, parts: Sequence[Tensor], dim: int = 1) -> Tensor:
        """The whole tensor from the parts of all ranks, each token from its first holder."""
        if len(parts) != self.num_ranks:
            raise ValueError(f"parts must be one per rank, {self.num_ranks}, got {len(parts)}")
        shape = list(parts[0].shape)
        shape[dim] = self.length
        whole = parts[0].new_empty(shape)
        for rank in reversed(range(self.num_ranks)):
            whole.index_copy_(dim, self.positions(rank).to(whole.device), parts[rank])
        return whole

    def __str__(self) -> str:
        return f"Shards({self.length} tokens as {', '.join(map(str, self.lengths))})"


def balanced_shards(
    mask: BlockMask | SlidingTile, ranks: int, *, tokens: VideoTokens | None = None
) -> Shards:
    """Contiguous shards of whole blocks, cut so that the ranks' attended pairs are as equal as such
    cuts can be. Reads the mask on the host.

    Args:
        mask: over the tokens to cut; or a SlidingTile over ``tokens``: then the shards are of
            tokens in its packed tile order, for ``tile_order=True``.

    Raises:
        TypeError, ValueError: arguments that do not fit each other; query and key blocks, or
            lengths, of ``mask`` differ.
    """
    if isinstance(mask, SlidingTile):
        if not isinstance(tokens, VideoTokens):
            raise TypeError(f"tokens must be the VideoTokens of the SlidingTile, got {tokens!r}")
        layout = tokens.layout(mask.tile)
        blocks = balanced_shards(mask.mask(tokens, "cpu"), ranks).ranges
        held = [0, *layout.block_lens("cpu").cumsum(0).tolist()]
        ends = [-(-own[0][1] // layout.tile_volume) for own in blocks]
        return Shards(tuple(((held[a], held[b]),) for a, b in pairwise([0, *ends])))
    if tokens is not None:
        raise ValueError(
            f"tokens are for a SlidingTile: they must be None with {type(mask).__name__}"
        )
    work = _work_of_blocks(mask)
    limit = _smallest_largest_sum(work, ranks)
    ends, total = [], 0.0
    for block, pairs in enumerate(work):
        if total + pairs > limit and total > 0:
            ends.append(block)
            total = 0.0
        total += pairs
    ends += [len(work)] * (ranks - len(ends))
    slots = [min(end * mask.q_block_size, mask.q_len) for end in ends]
    return Shards(tuple(((a, b),) for a, b in pairwise([0, *slots])))


def striped_shards(mask: BlockMask, ranks: int, stripe: int = 1) -> Shards:
    """Stripes of ``stripe`` blocks dealt to the ranks in turn: equal work for masks whose rows grow
    or shrink along the sequence, at the price of more bytes for local windows.

    Raises:
        ValueError: query and key blocks, or lengths, of ``mask`` differ.
    """
    _check_count("ranks", ranks, 1)
    _check_count("stripe", stripe, 1)
    _check_square(mask)
    size = stripe * mask.q_block_size
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    for index, start in enumerate(range(0, mask.q_len, size)):
        dealt[index % ranks].append((start, min(start + size, mask.q_len)))
    return Shards(tuple(tuple(own) for own in dealt))


def _work_of_blocks(mask: BlockMask) -> list[float]:
    """Attended pairs of each query block, summed over batches and heads."""
    _check_square(mask)
    mask = mask.to("cpu")
    pairs = (mask.to_dense().double() * mask.kv_lens()[:, None, None].double()).sum(-1)
    return (pairs * mask.q_lens()[:, None].double()).sum((0, 1)).tolist()


def _smallest_largest_sum(work: Sequence[float], parts: int) -> float:
    """The least bound that ``parts`` contiguous runs of ``work`` can all keep."""
    _check_count("ranks", parts, 1)
    low, high = max(work), sum(work)
    for _ in range(60):
        middle = (low + high) / 2
        runs, total = 1, 0.0
        for pairs in work:
            if total + pairs > middle:
                runs, total = runs + 1, 0.0
            total += pairs
        low, high = (low, middle) if runs <= parts else (middle, high)
    return high


def _check_square(mask: object) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    if mask.q_len != mask.kv_len or mask.q_block_size != mask.kv_block_size:
        raise ValueError(
            f"mask must have the same blocks for queries and keys, got {mask.q_len} tokens in "
            f"blocks of {mask.q_block_size} and {mask.kv_len} in blocks of {mask.kv_block_size}"
        )


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")
