"""What is to be attended to: a mask over the whole sequence, and how tokens stand in it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from torch import Tensor

from ..block_mask import BlockMask
from ..layout import VideoLayout
from .placement import Order

_KEPT = 64


@dataclass(frozen=True)
class Job:
    """One attention over the whole sequence, the same on all ranks.

    Args:
        mask: over the slots; None for dense attention.
        order: how the tokens, in the order of the shards, map to slots.
        q_length, kv_length: slots; None where only the ranks together know (dense).
        is_causal: dense only.
    """

    mask: BlockMask | None
    order: Order
    q_length: int | None
    kv_length: int | None
    is_causal: bool = False

    @property
    def q_tokens(self) -> int | None:
        """Tokens, without padding, of all ranks."""
        return self.q_length if self.order is None else VideoLayout(*self.order[0]).sequence_length

    @property
    def kv_tokens(self) -> int | None:
        return self.kv_length if self.order is None else self.q_tokens

    def describe(self) -> str:
        """The job in a line that is equal exactly where the jobs are."""
        if self.mask is None:
            return "dense, causal" if self.is_causal else "dense"
        return f"{self.mask.q_len} x {self.mask.kv_len} tokens, {self.order}"


def heads_of_mask(mask: BlockMask, first: int, last: int) -> BlockMask:
    """The lists of the query heads ``first`` up to ``last``."""
    if mask.kv_num_blocks.shape[1] == 1:
        return mask
    transpose = mask._transpose
    return replace(
        mask,
        kv_num_blocks=mask.kv_num_blocks[:, first:last],
        kv_indices=mask.kv_indices[:, first:last],
        _transpose=None if transpose is None else tuple(x[:, first:last] for x in transpose),
    )


class MaskCache:
    """Results that follow from a mask, kept as long as its tensors are unchanged.

    Masks are made anew in every call while their lists, which follow from sizes, are kept: so the
    tensors are the key. They are held here, so that no other tensor can have the address of one.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[tuple[Tensor | None, ...], Any]] = OrderedDict()
        self._lock = Lock()

    def get(self, mask: BlockMask, key: Any, make: Callable[[], Any]) -> Any:
        tensors = (mask.kv_num_blocks, mask.kv_indices, mask.q_block_lens, mask.kv_block_lens)
        versions = tuple(None if x is None else (id(x), x._version) for x in tensors)
        sizes = (mask.q_block_size, mask.kv_block_size, mask.q_len, mask.kv_len)
        full = (versions, sizes, key)
        with self._lock:
            if full in self._kept:
                self._kept.move_to_end(full)
                return self._kept[full][1]
        result = make()
        with self._lock:
            self._kept[full] = tensors, result
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return result


_fingerprints = MaskCache()


def fingerprint(mask: BlockMask) -> str:
    """Equal for equal masks. Reads the mask on the host, once."""
    return _fingerprints.get(mask, None, lambda: _fingerprint(mask.to("cpu")))


def _fingerprint(mask: BlockMask) -> str:
    digest = hashlib.sha256(repr((mask.q_block_size, mask.kv_block_size)).encode())
    for x in (mask.to_dense(), mask.q_lens(), mask.kv_lens()):
        digest.update(repr(tuple(x.shape)).encode())
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
