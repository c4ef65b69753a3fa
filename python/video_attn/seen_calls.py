"""Calls like an earlier one: what was checked and chosen for that need not be again.

The checks of :func:`video_attn.attention` and the choice of a backend look at sizes, strides,
dtypes, devices and options, never at values, addresses or the identity of a tensor. All of these
are the *signature* of a call. A call whose signature was seen goes to its backend at once; one that
is new, and one that somebody watches (a mode, ``torch.func``, a tracer, a subclass of tensors), is
checked as ever.

Only calls that succeeded are kept, and nothing of them but plain values: no call can see a tensor
of another one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from .block_mask import BlockMask
from .calls import ForwardCall
from .checks import forward_mode_is_on, is_plain
from .quantize import QuantizationOptions
from .registry import BACKEND_VARIABLE, context_backend, select, when_choices_change

_MOST = 1024
Signature = tuple[Hashable, ...]


class Seen(NamedTuple):
    """What a signature stands for.

    Args:
        forward: that of the backend that serves such calls.
        scale, quantization: as in :class:`ForwardCall`, where a call may have None.
    """

    forward: Callable[[ForwardCall], tuple[Tensor, Tensor]]
    scale: float
    quantization: QuantizationOptions | None


_seen: dict[Signature, Seen] = {}
when_choices_change(_seen.clear)


def signature_of(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None, options: tuple[Any, ...]
) -> Signature | None:
    """The signature of a call, before anything is checked; None if somebody watches it.

    ``options``: all other arguments that are checked or that a backend is chosen by. Their types
    count as well: a flag of 1 is an error, though it equals True.
    """
    if not is_plain(q, k, v) or forward_mode_is_on():
        return None
    blocks: Signature | None = None
    if mask is not None:
        if type(mask) is not BlockMask:
            return None
        counts, q_lens, kv_lens = mask.kv_num_blocks, mask.q_block_lens, mask.kv_block_lens
        blocks = (
            mask.q_len, mask.kv_len, mask.q_block_size, mask.kv_block_size,
            counts.shape, counts.device,
            None if q_lens is None else q_lens.shape, None if kv_lens is None else kv_lens.shape,
        )  # fmt: skip
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, blocks, options, *map(type, options),
        context_backend(), os.environ.get(BACKEND_VARIABLE),
    )  # fmt: skip


def recall(signature: Signature | None) -> Seen | None:
    """What is known of calls with this signature."""
    try:
        return None if signature is None else _seen.get(signature)
    except TypeError:  # no hash: an option of a wrong type
        return None


def remember(signature: Signature | None, call: ForwardCall, backend: str | None) -> None:
    """Keeps what was found out about a call that succeeded."""
    if signature is None or 0 in (*call.q.shape, *call.k.shape):  # no backend runs without tokens
        return
    if len(_seen) >= _MOST:
        _seen.clear()
    _seen[signature] = Seen(select(call.problem, backend).forward, call.scale, call.quantization)
