"""Norms and rotary positions of q and k, and tile order, in one pass over memory.

The processor of a video self-attention is run with a module whose norms do nothing, and without
rotary positions; what it then asks of attention comes with a :class:`Deferred`, which says what is
still to be done. :func:`finish` does it while it writes the tokens to where attention wants them.
Projections, LoRAs, offloading and all else of the processor run as they are.

Everything that could differ from what the model does is asked first (:meth:`FusedNorms.defer`): the
norm is a plain ``torch.nn.RMSNorm`` that nobody has hooked, no gradient is wanted, no autocast is
on. Otherwise the processor runs as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import device_info
from ..functional.patterns import SlidingTile
from ..functional.video_tokens import VideoTokens
from ..kernels.launch import run_launches
from ..kernels.launch_tables import unsupported_arch
from ..layout import VideoLayout

if TYPE_CHECKING:
    from .attention_call import AttentionCall

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Deferred(NamedTuple):
    """What is still to be done to q and k of an attention call: an RMS norm over all heads, and
    rotary positions.

    ``cos`` and ``sin`` are [B|1, S, H|1, D] where the channels that turn together are neighbours,
    (2i, 2i + 1), and [B|1, S, H|1, D/2] where they are (i, i + D/2), with ``split``.
    """

    q_weight: Tensor | None
    k_weight: Tensor | None
    q_eps: float
    k_eps: float
    cos: Tensor
    sin: Tensor
    split: bool = False


class FusedNorms:
    """Of one attention module: what its processor is given instead, and whether it may be.

    Args:
        module: the attention module. rotary: the parameter of its processor that holds the rotary
            positions. wanted: whether the attention of layer ``index`` asks for it in this call.
    """

    def __init__(self, module: Any, rotary: str, wanted: Callable[[int], bool], index: int) -> None:
        self.module, self.rotary, self.wanted, self.index = module, rotary, wanted, index
        parameters = list(inspect.signature(type(module.processor).__call__).parameters)
        self.position = parameters.index(rotary) - 2  # after the processor and the module
        self.without_norms = _WithoutNorms(module)

    def defer(
        self, arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], Deferred] | None:
        """(arguments, keywords, what is left to do) of a call; None where it must run as it is."""
        hidden_states = arguments[0] if arguments else keywords["hidden_states"]
        if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
            return None
        if not (_serves(hidden_states.device, hidden_states.dtype) and self.wanted(self.index)):
            return None
        norm_q, norm_k = self.module.norm_q, self.module.norm_k
        if not (_is_plain(norm_q, hidden_states) and _is_plain(norm_k, hidden_states)):
            return None
        by_place = len(arguments) > self.position
        rotary = arguments[self.position] if by_place else keywords.get(self.rotary)
        split = getattr(self.module, "rope_type", "interleaved") == "split"
        tables = None if rotary is None else _tables(rotary, self.module.heads, split)
        if tables is None or any(table.dtype not in _DTYPES for table in tables):
            return None
        if by_place:
            arguments = (*arguments[: self.position], None, *arguments[self.position + 1 :])
        else:
            keywords = {**keywords, self.rotary: None}
        deferred = Deferred(
            norm_q.weight, norm_k.weight, norm_q.eps, norm_k.eps, *tables, split=split
        )
        return arguments, keywords, deferred


class _WithoutNorms:
    """An attention module whose norms of q and k do nothing."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def norm_q(self, query: Tensor) -> Tensor:
        return query

    def norm_k(self, key: Tensor) -> Tensor:
        return key


def _is_plain(norm: Any, hidden_states: Tensor) -> bool:
    """Whether calling ``norm`` is the RMS norm by its weight and eps, and nothing else."""
    if type(norm) is not torch.nn.RMSNorm or norm.eps is None or "forward" in norm.__dict__:
        return False
    if norm._forward_pre_hooks or norm._forward_hooks:
        return False
    weight = norm.weight
    return weight is None or (
        weight.dtype == hidden_states.dtype and weight.device == hidden_states.device
    )


def _tables(rotary: Any, heads: int, split: bool) -> tuple[Tensor, Tensor] | None:
    """cos and sin [B, S, H|1, D or D/2] of the three shapes that models have them in; else None."""
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        return None
    cos, sin = rotary
    if split:
        if cos.dim() != 4:
            return None
        return cos.transpose(1, 2), sin.transpose(1, 2)  # [B, H, S, D/2]
    if cos.dim() == 3:  # [B, S, H * D]
        return cos.unflatten(2, (heads, -1)), sin.unflatten(2, (heads, -1))
    return (cos, sin) if cos.dim() == 4 else None  # [B, S, 1, D]


_chips: list[bool] = []  # of each GPU of this machine, whether there are launch options for it


def look_at_chips() -> None:
    """Fills ``_chips``, once. Every call of a model does so first, for what torch.compile
    traces afterwards may look at a list, but is not to ask drivers.
    """
    if not _chips and torch.cuda.is_initialized() and find_spec("triton") is not None:
        devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
        _chips.extend(unsupported_arch(device_info(device).arch) is None for device in devices)


def _serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel runs here."""
    if device.type != "cuda" or dtype not in _DTYPES:
        return False
    return device.index < len(_chips) and _chips[device.index]


def finish(
    query: Tensor, key: Tensor, value: Tensor, deferred: Deferred, video: VideoLayout | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention is to be given: q and k normalised and rotated.

    Args:
        query, key, value: [B, S, H, D], heads and channels contiguous.
        video: the layout whose padded tile order the results have; None: the order of ``query``.

    Returns:
        q, k, v [B, S or padded_length, H, D]. Padding is zero in q and not written in k and v.
    """
    look_at_chips()
    if not _fits(query, key, value, deferred):  # a projection of another dtype, say
        return _finish_in_torch(query, key, value, deferred, video)
    from ..kernels.norm_rotate import norm_rotate

    batch, tokens, heads, head_dim = query.shape
    size = tokens if video is None else video.padded_length
    slots = None if video is None else video.raster_slots(query.device)
    out = [query.new_empty(batch, size, heads, head_dim) for _ in range(3)]
    tensors = {
        "q": query, "k": key, "v": value, "q_out": out[0], "k_out": out[1], "v_out": out[2],
        "q_weight": deferred.q_weight, "k_weight": deferred.k_weight, "cos": deferred.cos,
        "sin": deferred.sin, "slots": slots,
    }  # fmt: skip
    launch = norm_rotate(tensors, split=deferred.split, q_eps=deferred.q_eps, k_eps=deferred.k_eps)
    run_launches([launch], query.device)
    if video is not None:
        video.clear_padding(out[0], 1)
    return out[0], out[1], out[2]


def _fits(query: Tensor, key: Tensor, value: Tensor, deferred: Deferred) -> bool:
    batch, tokens, heads, head_dim = query.shape
    rows = all(x.stride(3) == 1 and x.stride(2) == head_dim for x in (query, key, value))
    shape = (tokens, head_dim // 2 if deferred.split else head_dim)
    tables = all(
        x.device == query.device and x.stride(3) == 1 and (x.shape[1], x.shape[3]) == shape
        and x.shape[0] in (1, batch) and x.shape[2] in (1, heads)
        for x in (deferred.cos, deferred.sin)
    )  # fmt: skip
    same = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    return rows and tables and same and head_dim % 2 == 0 and _serves(query.device, query.dtype)


def _finish_in_torch(
    query: Tensor, key: Tensor, value: Tensor, deferred: Deferred, video: VideoLayout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition."""

    def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        flat = x.flatten(2)
        normal = F.rms_norm(flat.float(), flat.shape[2:], eps=eps)
        normal = normal if weight is None else normal * weight.float()
        first, second = _pairs(normal.unflatten(2, x.shape[2:]), deferred.split)
        cos, sin = deferred.cos.float(), deferred.sin.float()
        cos_0, cos_1 = (cos, cos) if deferred.split else _pairs(cos, False)
        sin_0, sin_1 = (sin, sin) if deferred.split else _pairs(sin, False)
        turned = first * cos_0 - second * sin_0, second * cos_1 + first * sin_1
        if deferred.split:
            return torch.cat(turned, -1).to(x.dtype)
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)

    query = normalised(query, deferred.q_weight, deferred.q_eps)
    key = normalised(key, deferred.k_weight, deferred.k_eps)
    if video is None:
        return query, key, value
    return video.to_tiles(query, 1), video.to_tiles(key, 1), video.to_tiles(value, 1)


def _pairs(x: Tensor, split: bool) -> tuple[Tensor, Tensor]:
    if split:
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., 0::2], x[..., 1::2]


def finish_call(asked: AttentionCall) -> None:
    """Does what was put off in ``asked``, whose query and key are then as attention wants them."""
    if asked.deferred is not None:
        q, k, _ = finish(*_tokens_first(asked), asked.deferred)
        asked.query, asked.key, asked.deferred = q.transpose(1, 2), k.transpose(1, 2), None


def attend_tiles(
    asked: AttentionCall, pattern: SlidingTile, tokens: VideoTokens, options: dict[str, Any]
) -> Tensor:
    """``pattern.attend`` [B, H, S, D] of a call with norms put off: tokens are moved to tile order
    while they are normalised.
    """
    assert asked.deferred is not None
    video = tokens.layout(pattern.tile)
    q, k, v = finish(*_tokens_first(asked), asked.deferred, video)
    out = pattern.attend_tiles(q, k, v, tokens, scale=asked.scale, **options)
    return from_tiles(out, video).transpose(1, 2)


def _tokens_first(asked: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value [B, S, H, D] of a call."""
    q, k, v = (x.transpose(1, 2) for x in (asked.query, asked.key, asked.value))
    return q, k, v


def from_tiles(x: Tensor, video: VideoLayout) -> Tensor:
    """``video.from_tiles`` of [B, N, H, D] with heads and channels contiguous, by one kernel."""
    look_at_chips()
    if x.stride(3) != 1 or x.stride(2) != x.shape[3] or not _serves(x.device, x.dtype):
        return video.from_tiles(x, 1)
    from ..kernels.norm_rotate import take_tokens

    out = x.new_empty(x.shape[0], video.sequence_length, *x.shape[2:])
    run_launches([take_tokens(x, out, video.raster_slots(x.device))], x.device)
    return out
