"""The functions of the ``sageattention`` package, on the kernels of this one.

Code written for SageAttention runs after changing the import. What those functions ignore in
silence is honoured or refused here, and an unknown keyword is a TypeError.
"""

from __future__ import annotations

from itertools import pairwise
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

from ..attention import attention
from ..block_mask import BlockMask
from ..checks import as_int, broadcasts, check_number
from ..compiler import constant_result
from ..device import is_here
from ..quantize import QuantizationOptions, parse_recipe, recipe_text
from ..registry import Problem, forced_backend, serving

LAYOUTS = {"HND": "bhsd", "NHD": "bshd"}
_MASK_BLOCK = 128
_PRECISIONS = ("sage_fp8", "sage_fp16")  # in the order of preference


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    smooth_k: bool = True,
    precision: str | None = None,
    backend: str | None = None,
    straight_through: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention with INT8 scores, called as ``sageattention.sageattn``.

    Args:
        q: [B, Hq, Sq, D] for layout "HND", [B, Sq, Hq, D] for "NHD"; fp16, bf16 or fp32; D <= 256,
            any value. k, v: alike, Hq a multiple of their heads; their length may differ from
            q's. Nothing is changed in place.
        tensor_layout: "HND" or "NHD", of q, k, v and the output.
        is_causal: query i sees keys up to i + Sk - Sq (aligned at the bottom right).
        sm_scale: of the scores; default 1/sqrt(D).
        return_lse: also return the log-sum-exp of the scaled scores, fp32 [B, Hq, Sq], natural
            logarithm.
        attn_mask: None, or a mask of key padding, bool [B|1, Sk] or [B|1, 1, 1, Sk]: True for the
            first keys of each batch item, which count, False for the rest, which are never read. It
            is read on the host. Other patterns: :func:`video_attn.attention` with a block mask.
        dropout_p: only 0, as callers of SDPA pass it.
        smooth_k: subtract the mean of the keys before they become INT8.
        precision: "sage_fp16" or "sage_fp8" (values in fp16 or FP8). Default: "sage_fp8" where a
            kernel (or the backend that is forced) serves it on the device of q, else "sage_fp16".
            On a CPU that is "sage_fp8" with the C++ component, "sage_fp16" without it.
        backend, straight_through: as in :func:`video_attn.attention`.

    Returns:
        out in the layout and dtype of q; with ``return_lse`` also lse.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    check_layout(tensor_layout)
    refuse_dropout(dropout_p)
    options = QuantizationOptions(smooth_k=smooth_k, straight_through=straight_through)
    if precision is None:
        recipes = tuple(recipe_text(name, options) for name in _PRECISIONS)
        precision = _PRECISIONS[first_served(q, k, v, is_causal, recipes, backend)]
    _check_precision(precision)
    return attend(
        q, k, v, precision, options, tensor_layout, is_causal, sm_scale, return_lse, attn_mask,
        backend,
    )  # fmt: skip


def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: SupportsIndex,
    max_seqlen_k: SupportsIndex,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    *,
    attn_mask: None = None,
    dropout_p: float = 0.0,
    precision: str | None = None,
    backend: str | None = None,
    straight_through: bool = False,
) -> Tensor:
    """Attention over sequences of different lengths, packed one after the other; called as
    ``sageattention.sageattn_varlen``.

    It costs one launch per sequence, and reads ``cu_seqlens_q`` and ``cu_seqlens_k`` on the host:
    if they are on a GPU, the host waits for it. So it breaks the graph of ``torch.compile`` and
    cannot be captured in a CUDA graph. The keys of each sequence are smoothed by their own mean.

    Args:
        q: [Tq, Hq, D]. k, v: [Tk, Hkv, D]; the tokens of all sequences.
        cu_seqlens_q, cu_seqlens_k: where the sequences start, and the end: [0, ..., Tq] and
            [0, ..., Tk]; int32 or int64 [sequences + 1].
        max_seqlen_q, max_seqlen_k: at least the longest sequence, whole numbers or tensors of one;
            checked, and not used.
        is_causal: within each sequence, aligned at the bottom right.
        attn_mask: only None. sm_scale, smooth_k, dropout_p, precision, backend, straight_through:
            as in :func:`sageattn`.

    Returns:
        [Tq, Hq, D] in the dtype of q. A sequence without keys gives 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, before any kernel runs.
        RuntimeError: no backend can serve; the message says why for each.
    """
    if attn_mask is not None:
        raise ValueError("attn_mask must be None: cu_seqlens_k says where the keys end")
    refuse_dropout(dropout_p)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, D], got shape {tuple(x.shape)}")
    if v.shape[0] != k.shape[0]:
        raise ValueError(f"v must have as many tokens as k, {k.shape[0]}, got {v.shape[0]}")
    q_starts = _starts("q", cu_seqlens_q, max_seqlen_q, q.shape[0])
    k_starts = _starts("k", cu_seqlens_k, max_seqlen_k, k.shape[0])
    if len(q_starts) != len(k_starts):
        raise ValueError(
            f"cu_seqlens_k must have as many entries as cu_seqlens_q, {len(q_starts)}, "
            f"got {len(k_starts)}"
        )
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for q_range, k_range in zip(pairwise(q_starts), pairwise(k_starts), strict=True):
        queries, keys = slice(*q_range), slice(*k_range)
        out[queries] = sageattn(
            q[None, queries], k[None, keys], v[None, keys], "NHD", is_causal, sm_scale,
            smooth_k=smooth_k, precision=precision, backend=backend,
            straight_through=straight_through,
        )[0]  # fmt: skip
    return out


def _starts(side: str, cu_seqlens: Tensor, max_seqlen: SupportsIndex, tokens: int) -> list[int]:
    """The checked entries of ``cu_seqlens_q`` or ``cu_seqlens_k``, on the host."""
    name = f"cu_seqlens_{side}"
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{name} must be an int32 or int64 Tensor, got {got}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must be [sequences + 1], got shape {tuple(cu_seqlens.shape)}")
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
        raise ValueError(
            f"{name} must ascend from 0 to the {tokens} tokens of {side}, got {starts}"
        )
    number = as_int(max_seqlen)
    if number is None:
        raise TypeError(f"max_seqlen_{side} must be a whole number, got {max_seqlen!r}")
    longest = max((end - start for start, end in pairwise(starts)), default=0)
    if number < longest:
        raise ValueError(f"max_seqlen_{side} must be at least {longest}, got {number}")
    return starts


def padding_mask(
    attn_mask: object, q: Tensor, k: Tensor, tensor_layout: str, is_causal: bool
) -> BlockMask:
    """The block mask of a mask of key padding: everything, and how many keys are valid.

    Raises:
        TypeError, ValueError: it is no such mask.
    """
    if not isinstance(attn_mask, Tensor) or attn_mask.dtype != torch.bool:
        got = getattr(attn_mask, "dtype", type(attn_mask).__name__)
        raise TypeError(
            f"attn_mask must be None or a bool Tensor of key padding (True: valid), got {got}"
        )
    if is_causal:
        raise ValueError("attn_mask must be None with is_causal: block masks are not causal")
    tokens = 2 if tensor_layout == "HND" else 1
    batch, q_len, kv_len = q.shape[0], q.shape[tokens], k.shape[tokens]
    keep = attn_mask[:, 0, 0] if attn_mask.dim() == 4 else attn_mask
    one_row = attn_mask.dim() == 2 or (attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1))
    if not one_row or not broadcasts(keep.shape[0], batch) or keep.shape[1] != kv_len:
        raise ValueError(
            f"attn_mask must be [{batch}, {kv_len}] or [{batch}, 1, 1, {kv_len}], one row of keys "
            f"for all queries and heads, got shape {tuple(attn_mask.shape)}. Other masks: a "
            "BlockMask for video_attn.attention(..., precision='sage_fp16')"
        )
    if attn_mask.device != q.device:
        raise ValueError(f"attn_mask is on {attn_mask.device}, but q is on {q.device}")
    if bool((keep[:, 1:] & ~keep[:, :-1]).any()):
        raise ValueError(
            "attn_mask must be True for the first keys of each batch item and False for the rest: "
            "here False comes before True. Move the padding to the end"
        )
    size = _MASK_BLOCK
    starts = torch.arange(0, kv_len, size, dtype=torch.int32, device=q.device)
    lens = (keep.sum(-1, dtype=torch.int32)[:, None] - starts).clamp(0, size)
    every = keep.new_ones(1, 1, -(-q_len // size), len(starts))
    return BlockMask.from_dense(every, size, size, None, lens, q_len=q_len, kv_len=kv_len)


def check_layout(tensor_layout: str) -> None:
    if not isinstance(tensor_layout, str):
        raise TypeError(
            "tensor_layout must be 'HND' or 'NHD', got a "
            f"{type(tensor_layout).__name__}: a mask is not the fourth argument of sageattn"
        )
    if tensor_layout not in LAYOUTS:
        raise ValueError(f"tensor_layout must be 'HND' or 'NHD', got {tensor_layout!r}")


def refuse_dropout(dropout_p: float) -> None:
    if check_number("dropout_p", dropout_p, "0") != 0:
        raise ValueError(f"dropout_p must be 0: the kernels are for inference, got {dropout_p}")


def _check_precision(precision: str) -> None:
    if precision not in _PRECISIONS:
        raise ValueError(
            f"precision must be None or one of {', '.join(_PRECISIONS)}; got {precision!r}"
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    options: QuantizationOptions,
    tensor_layout: str,
    is_causal: bool,
    sm_scale: float | None,
    return_lse: bool,
    attn_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`video_attn.attention` with the arguments of ``sageattention``."""
    check_layout(tensor_layout)
    mask = None
    if attn_mask is not None:
        mask = padding_mask(attn_mask, q, k, tensor_layout, is_causal)
    return attention(
        q, k, v, mask, precision=precision, scale=sm_scale, is_causal=is_causal,
        return_lse=return_lse, layout=LAYOUTS[tensor_layout], backend=backend, quantization=options,
    )  # type: ignore[call-overload]  # fmt: skip


def first_served(
    q: Tensor, k: Tensor, v: Tensor, is_causal: bool, recipes: tuple[str, ...],
    backend: str | None = None,
) -> int:  # fmt: skip
    """Which of ``recipes`` is the first that a kernel, or the forced backend, serves for q, k and
    v; the last where none does.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            return len(recipes) - 1  # attention() says what is wrong
    return _first_served(
        q.device, q.dtype, index(q.shape[3]), index(v.shape[3]), bool(is_causal), recipes, backend
    )


@constant_result
def _first_served(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    is_causal: bool,
    recipes: tuple[str, ...],
    backend: str | None,
) -> int:
    """Plain values in and out, so that compiled code keeps the answer."""
    if not is_here(device):
        return len(recipes) - 1
    forced = forced_backend(backend)
    for number, recipe in enumerate(recipes):
        precision, options = parse_recipe(recipe)
        problem = Problem.of(
            "forward", device, dtype, head_dim, head_dim_v, is_causal=is_causal,
            precision=precision, quantization=options,
        )  # fmt: skip
        served = serving(problem)
        if (forced[0] in served) if forced else any(name != "reference" for name in served):
            return number
    return len(recipes) - 1
