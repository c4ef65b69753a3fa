"""What a backend is asked to do: a forward or a backward pass, said once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .block_mask import BlockMask
from .kernels.launch import Side
from .quantize import QuantizationOptions
from .registry import Problem


class ForwardCall(NamedTuple):
    """One forward pass over checked tensors.

    Args:
        q: [B, Hq, Sq, D]. k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv]; no dimension is 0, the last
            stride is 1.
        mask: None for dense attention. scale: of the scores, > 0.
        is_causal: dense only, aligned at the bottom right.
        precision: "native" or a quantized one. quantization: its options, None for "native".
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask | None
    scale: float
    is_causal: bool = False
    precision: str = "native"
    quantization: QuantizationOptions | None = None

    @property
    def problem(self) -> Problem:
        """What decides which backend serves this call."""
        return problem_of(
            "forward", self.q, self.k, self.v, self.mask, is_causal=self.is_causal,
            precision=self.precision, quantization=self.quantization,
        )  # fmt: skip

    def empty_results(self) -> tuple[Tensor, Tensor]:
        """Uninitialised (out [B, Hq, Sq, Dv] in the memory order of q, lse [B, Hq, Sq])."""
        return empty_like_heads(self.q, self.v.shape[3]), empty_lse(self.q)


class BackwardCall(NamedTuple):
    """One backward pass: the gradients of a :class:`ForwardCall` of precision "native".

    Args:
        grad_out: like out, last stride 1. grad_lse: like lse, or None: zero.
        q, k, v, mask, scale, is_causal: those of the forward pass. out, lse: its results.
        deterministic: the gradients must be bitwise repeatable.
        results: where dq, dk, dv go; None: into memory of their own.
    """

    grad_out: Tensor
    grad_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    mask: BlockMask | None
    scale: float
    is_causal: bool = False
    deterministic: bool = False
    results: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def problem(self) -> Problem:
        """What decides which backend serves this call."""
        return problem_of("backward", self.q, self.k, self.v, self.mask, is_causal=self.is_causal)

    def empty_results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Uninitialised (dq, dk, dv), each in the memory order of its tensor."""
        if self.results is not None:
            return self.results
        dq, dk, dv = (empty_like_heads(x, x.shape[3]) for x in (self.q, self.k, self.v))
        return dq, dk, dv


class RankCall(NamedTuple):
    """The first steps of video sparse attention: block means, scores, the best blocks, coarse part.

    Args:
        q: [B, Hq, Sq, D]. k: [B, Hkv, Sk, D]. v: [B, Hkv, Sk, Dv], or None without a coarse part;
            the last stride is 1.
        q_side, kv_side: their blocks. top_k: key blocks for each query block. scale: of the scores.
        score_dtype: half precision that means and scores are rounded to for the choice; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor | None
    q_side: Side
    kv_side: Side
    top_k: int
    scale: float
    score_dtype: torch.dtype | None = None


class Ranking(NamedTuple):
    """The results of a :class:`RankCall`.

    Args:
        selected: int32 [B, Hq, Nq, top_k], ascending. counts: int32 [B, Hq, Nq], all top_k.
        coarse: [B, Hq, Nq, Dv] in the dtype of v, or None without v.
        means: of q, k and v (or None), [B, H, N, D] in their dtype.
    """

    selected: Tensor
    counts: Tensor
    coarse: Tensor | None
    means: tuple[Tensor, Tensor, Tensor | None]


class BlockOps(NamedTuple):
    """Means of blocks and the choice of the best ones, the first steps of video sparse attention.

    Args:
        refusal: ``(device type, architecture)``; why these cannot run there, or None.
        block_mean: ``(x [B, H, S, D], mean [B, H, N, D], side)``; fills ``mean``.
        block_mean_backward: ``(grad [B, H, N, D], dx [B, H, S, D], side)``; fills ``dx``.
        select_top_k: ``(scores [B, H, Nq, Nk], indices int32 [B, H, Nq, k], k, key lens)``; fills
            ``indices``.
        rank: all of a :class:`RankCall` at once; None: by the functions above and torch.
        add_coarse: ``(out [B, H, S, Dv], coarse [B, H, N, Dv], gate, side)``; adds gate * coarse of
            its block to the valid rows of ``out``. The gate is a number or a tensor [B|1, H|1,
            S|1, Dv|1] whose last stride is 1. None: by torch.
    """

    refusal: Callable[[str, str], str | None]
    block_mean: Callable[[Tensor, Tensor, Side], None]
    block_mean_backward: Callable[[Tensor, Tensor, Side], None]
    select_top_k: Callable[[Tensor, Tensor, int, Tensor | None], None]
    rank: Callable[[RankCall], Ranking] | None = None
    add_coarse: Callable[[Tensor, Tensor, Tensor | float, Side], None] | None = None


def by_heads(call: BackwardCall, bytes_per_list: int) -> Iterator[BackwardCall]:
    """A call as calls of some key heads each, which fill the results of the whole call.

    As many heads as need 1/20 of the bytes of q, k and v, with ``bytes_per_list`` for every list of
    the mask; at least one.
    """
    assert call.mask is not None and call.results is not None
    group = call.q.shape[1] // call.k.shape[1]
    one_head = call.mask.kv_indices.shape[0] * group * bytes_per_list
    room = sum(x.numel() * x.element_size() for x in (call.q, call.k, call.v)) // 20
    step = max(1, room // one_head)
    for first in range(0, call.k.shape[1], step):
        keys = slice(first, first + step)
        heads = slice(first * group, (first + step) * group)
        dq, dk, dv = call.results
        yield call._replace(
            grad_out=call.grad_out[:, heads],
            grad_lse=None if call.grad_lse is None else call.grad_lse[:, heads],
            q=call.q[:, heads], k=call.k[:, keys], v=call.v[:, keys], out=call.out[:, heads],
            lse=call.lse[:, heads], mask=call.mask.of_heads(heads),
            results=(dq[:, heads], dk[:, keys], dv[:, keys]),
        )  # fmt: skip


def problem_of(
    direction: Literal["forward", "backward"],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | None,
    *,
    is_causal: bool = False,
    precision: str = "native",
    quantization: QuantizationOptions | None = None,
) -> Problem:
    """The Problem that a call with these tensors poses to the registry."""
    q_size, kv_size = (None, None) if mask is None else (mask.q_block_size, mask.kv_block_size)
    return Problem.of(
        direction, q.device, q.dtype, q.shape[3], v.shape[3], q_size, kv_size,
        is_causal, precision, quantization,
    )  # fmt: skip


def empty_like_heads(x: Tensor, head_dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, H, S, head_dim] in the memory order of ``x`` (BHSD or BSHD in memory)."""
    batch, heads, length, _ = x.shape
    _, head, token, _ = x.stride()
    if head < token:
        strides = heads * length * head_dim, head_dim, heads * head_dim, 1
    else:
        strides = heads * length * head_dim, length * head_dim, head_dim, 1
    # With strides it takes half the time: it is all that most calls do in torch.
    return x.new_empty_strided((batch, heads, length, head_dim), strides, dtype=dtype)


def empty_lse(q: Tensor) -> Tensor:
    """Uninitialised fp32 [B, Hq, Sq] (fp64 for fp64 inputs)."""
    batch, heads, length, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty_strided((batch, heads, length), (heads * length, length, 1), dtype=dtype)
